"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), and grouped-query attention beside it.

MLA has two forms over the same weights and the same cache:
  `attend_expanded` up-projects the latents to keys and values and runs ordinary attention: training and prefill.
  `attend_absorbed` moves the up-projections onto the query and the output and attends over the latents themselves:
  decode, where the cache is read once for all heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.axes import per_device, shard
from mla_jax.config import ModelConfig
from mla_jax.model.cache import Cache
from mla_jax.model.layers import normal, ones, rms_norm, zeros
from mla_jax.model.rope import rotate, rotation
from pallas_kernels import flash_attention, make_plan, mla_decode

FORMS = ('absorbed', 'expanded')


class Context(NamedTuple):
  """Where the tokens of a call stand. Computed once, shared by all layers."""

  cos_sin: tuple[jax.Array, jax.Array]
  segments_BT: jax.Array | None  # attention stays within equal ids; None: one segment
  positions_BT: jax.Array
  # Cached calls only. The T tokens are the newest of `lengths_B`; a row with fewer real ones is padded on the left.
  lengths_B: jax.Array | None = None
  valid_BT: jax.Array | None = None
  form: str = 'expanded'
  fresh: bool = False  # nothing was cached before this call: attend among the new tokens alone
  decode_plan: tuple | None = None  # absorbed form: how the chip's processors share the cache, for all layers


def context(config: ModelConfig, positions_BT, segments_BT=None) -> Context:
  """For a whole sequence without a cache."""
  return Context(_rotation(config, positions_BT), segments_BT, positions_BT)


def cached_context(config: ModelConfig, length: int, lengths_B, new_B, form: str, fresh: bool) -> Context:
  """For `length` new tokens a row, of which the last new_B are real, ending at position lengths_B - 1."""
  offset_T = jnp.arange(length) - length
  positions_BT = lengths_B[:, None] + offset_T
  valid_BT = offset_T >= -new_B[:, None]
  segments_BT = valid_BT.astype(jnp.int32)
  plan = None
  if config.attention == 'mla' and form == 'absorbed':
    plan = make_plan(lengths_B, tokens=length, heads=config.num_attention_heads)
  return Context(_rotation(config, positions_BT), segments_BT, positions_BT, lengths_B, valid_BT, form, fresh, plan)


def _rotation(config: ModelConfig, positions_BT):
  if config.attention == 'mla':
    return rotation(positions_BT, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling, config.rope_repeats)
  return rotation(positions_BT, config.qk_head_dim, config.rope_theta, config.rope_scaling)


def attend(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale):
  """Causal attention of equally many heads."""
  def local(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments):
    return flash_attention(q_BTNH, k_BSNH, v_BSNV, scale=scale, causal=True, q_segments=q_segments,
                           kv_segments=kv_segments)

  return per_device(local, (q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments), ('BTNH', 'BSNH', 'BSNV', 'BT', 'BS'),
                    ('BTNV', (*q_BTNH.shape[:3], v_BSNV.shape[3])))


def attend_expanded(q_BTNH, c_BSJ, wuk_CNK, wuv_CNV, *, scale, q_segments, kv_segments):
  """Keys and values per head from the latents: k = [c W_UK ; k_rope], v = c W_UV (V2 report, eq. 9-11)."""
  with jax.named_scope('mla/expanded'):
    rank = wuk_CNK.shape[0]
    c_BSC, kr_BSR = c_BSJ[..., :rank], c_BSJ[..., rank:]
    k_BSNK = jnp.einsum('BSC,CNK->BSNK', c_BSC, wuk_CNK)
    v_BSNV = jnp.einsum('BSC,CNV->BSNV', c_BSC, wuv_CNV)
    kr_BSNR = jnp.broadcast_to(kr_BSR[:, :, None], (*k_BSNK.shape[:3], kr_BSR.shape[-1]))
    k_BSNH = jnp.concatenate([k_BSNK, kr_BSNR], axis=-1)
    return attend(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale)


def attend_absorbed(q_BTNH, pages_PSJ, table_BP, lengths_B, wuk_CNK, wuv_CNV, *, scale, plan=None):
  """W_UK joins the query and W_UV the output: scores = (q_nope W_UK^T) . c + q_rope . k_rope, out = (P c) W_UV."""
  with jax.named_scope('mla/absorbed'):
    nope = wuk_CNK.shape[-1]
    q_BTNC = jnp.einsum('BTNK,CNK->BTNC', q_BTNH[..., :nope], wuk_CNK)
    q_BTNJ = jnp.concatenate([q_BTNC, q_BTNH[..., nope:]], axis=-1)
    o_BTNC = mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, scale=scale, value_width=wuk_CNK.shape[0], plan=plan)
    return jnp.einsum('BTNC,CNV->BTNV', o_BTNC, wuv_CNV)


class LatentAttention(nnx.Module):

  def __init__(self, config: ModelConfig, key):
    self.config = config
    c, keys = config, jax.random.split(key, 6)
    init = functools.partial(normal, std=c.initializer_range)
    if c.q_lora_rank:
      self.wdq_DQ = init(keys[0], (c.hidden_size, c.q_lora_rank), 'DQ')
      self.norm_q_Q = ones(c.q_lora_rank, 'Q')
      self.wuq_QNH = init(keys[1], (c.q_lora_rank, c.num_attention_heads, c.qk_head_dim), 'QNH')
    else:
      self.wq_DNH = init(keys[1], (c.hidden_size, c.num_attention_heads, c.qk_head_dim), 'DNH')
    self.wdkv_DJ = init(keys[2], (c.hidden_size, c.cache_width), 'DJ')
    if c.latent_norm:
      self.norm_kv_C = ones(c.kv_lora_rank, 'C')
    if c.attention_bias:
      self.bq_NH = zeros((c.num_attention_heads, c.qk_head_dim), 'NH')
      self.bdkv_J = zeros((c.cache_width,), 'J')
    self.wuk_CNK = init(keys[3], (c.kv_lora_rank, c.num_attention_heads, c.qk_nope_head_dim), 'CNK')
    self.wuv_CNV = init(keys[4], (c.kv_lora_rank, c.num_attention_heads, c.v_head_dim), 'CNV')
    self.wo_NVD = init(keys[5], (c.num_attention_heads, c.v_head_dim, c.hidden_size), 'NVD')

  def latents(self, x_BTD, ctx: Context):
    """Queries with their rope width rotated, and what the cache keeps: [norm(c_KV) ; RoPE(k_rope)]."""
    c = self.config
    with jax.named_scope('mla/latents'):
      if c.q_lora_rank:
        q_BTQ = rms_norm(jnp.einsum('BTD,DQ->BTQ', x_BTD, self.wdq_DQ[...]), self.norm_q_Q[...], c.rms_norm_eps)
        q_BTNH = jnp.einsum('BTQ,QNH->BTNH', q_BTQ, self.wuq_QNH[...])
      else:
        q_BTNH = jnp.einsum('BTD,DNH->BTNH', x_BTD, self.wq_DNH[...])
      c_BTJ = jnp.einsum('BTD,DJ->BTJ', x_BTD, self.wdkv_DJ[...])
      if c.attention_bias:
        q_BTNH, c_BTJ = q_BTNH + self.bq_NH[...], c_BTJ + self.bdkv_J[...]
      nope = c.qk_nope_head_dim
      q_BTNH = jnp.concatenate([q_BTNH[..., :nope], rotate(q_BTNH[..., nope:], ctx.cos_sin)], axis=-1)
      c_BTC = c_BTJ[..., :c.kv_lora_rank]
      if c.latent_norm:
        c_BTC = rms_norm(c_BTC, self.norm_kv_C[...], c.rms_norm_eps)
      kr_BTR = rotate(c_BTJ[..., c.kv_lora_rank:], ctx.cos_sin)
      return q_BTNH, jnp.concatenate([c_BTC, kr_BTR], axis=-1)

  def __call__(self, x_BTD, ctx: Context, cache: Cache | None = None, layer=0):
    """Returns (output [B, T, D], cache)."""
    q_BTNH, c_BTJ = self.latents(x_BTD, ctx)
    up = self.wuk_CNK[...], self.wuv_CNV[...]
    scale = self.config.softmax_scale
    if cache is not None:
      cache = cache.write(layer, c_BTJ, ctx.positions_BT, ctx.valid_BT)
      c_BTJ = c_BTJ.astype(cache.pages_PSJ.dtype)
    if cache is None or (ctx.fresh and ctx.form == 'expanded'):
      o_BTNV = attend_expanded(q_BTNH, c_BTJ, *up, scale=scale, q_segments=ctx.segments_BT, kv_segments=ctx.segments_BT)
    elif ctx.form == 'expanded':
      c_BSJ, valid_BS = cache.read(layer, ctx.lengths_B)
      o_BTNV = attend_expanded(q_BTNH, c_BSJ, *up, scale=scale, q_segments=ctx.segments_BT,
                               kv_segments=valid_BS.astype(jnp.int32))
    else:
      o_BTNV = attend_absorbed(q_BTNH, cache.pages_PSJ, cache.layer_table(layer), ctx.lengths_B, *up, scale=scale,
                               plan=ctx.decode_plan)
    return shard(jnp.einsum('BTNV,NVD->BTD', o_BTNV, self.wo_NVD[...]), 'BTD'), cache


class GroupedQueryAttention(nnx.Module):
  """Keys and values of G heads, each shared by N / G query heads; G = 1 is multi-query, G = N multi-head."""

  def __init__(self, config: ModelConfig, key):
    self.config = config
    c, keys = config, jax.random.split(key, 4)
    init = functools.partial(normal, std=c.initializer_range)
    self.wq_DNH = init(keys[0], (c.hidden_size, c.num_attention_heads, c.qk_head_dim), 'DNH')
    self.wk_DGH = init(keys[1], (c.hidden_size, c.kv_heads, c.qk_head_dim), 'DGH')
    self.wv_DGV = init(keys[2], (c.hidden_size, c.kv_heads, c.qk_head_dim), 'DGV')
    self.wo_NVD = init(keys[3], (c.num_attention_heads, c.qk_head_dim, c.hidden_size), 'NVD')
    if c.attention_bias:
      self.bq_NH = zeros((c.num_attention_heads, c.qk_head_dim), 'NH')
      self.bk_GH = zeros((c.kv_heads, c.qk_head_dim), 'GH')
      self.bv_GV = zeros((c.kv_heads, c.qk_head_dim), 'GV')

  def __call__(self, x_BTD, ctx: Context, cache: Cache | None = None, layer=0):
    """Returns (output [B, T, D], cache)."""
    q_BTNH = jnp.einsum('BTD,DNH->BTNH', x_BTD, self.wq_DNH[...])
    k_BSGH = jnp.einsum('BTD,DGH->BTGH', x_BTD, self.wk_DGH[...])
    v_BSGV = jnp.einsum('BTD,DGV->BTGV', x_BTD, self.wv_DGV[...])
    if self.config.attention_bias:
      q_BTNH, k_BSGH, v_BSGV = q_BTNH + self.bq_NH[...], k_BSGH + self.bk_GH[...], v_BSGV + self.bv_GV[...]
    q_BTNH, k_BSGH = rotate(q_BTNH, ctx.cos_sin), rotate(k_BSGH, ctx.cos_sin)
    kv_segments = ctx.segments_BT
    if cache is not None:
      entries_BTJ = jnp.stack([k_BSGH, v_BSGV], axis=2).reshape(*k_BSGH.shape[:2], -1)
      cache = cache.write(layer, entries_BTJ, ctx.positions_BT, ctx.valid_BT)
      if not ctx.fresh:
        entries_BSJ, valid_BS = cache.read(layer, ctx.lengths_B)
        kv_BS2GH = entries_BSJ.reshape(*entries_BSJ.shape[:2], 2, *k_BSGH.shape[2:])
        k_BSGH, v_BSGV, kv_segments = kv_BS2GH[:, :, 0], kv_BS2GH[:, :, 1], valid_BS.astype(jnp.int32)
    groups = q_BTNH.shape[2] // k_BSGH.shape[2]
    o_BTNV = attend(q_BTNH, jnp.repeat(k_BSGH, groups, axis=2), jnp.repeat(v_BSGV, groups, axis=2),
                    ctx.segments_BT, kv_segments, self.config.softmax_scale)
    return shard(jnp.einsum('BTNV,NVD->BTD', o_BTNV, self.wo_NVD[...]), 'BTD'), cache


def make_attention(config: ModelConfig, key) -> LatentAttention | GroupedQueryAttention:
  return (LatentAttention if config.attention == 'mla' else GroupedQueryAttention)(config, key)

"""The whole network: embedding, blocks scanned in two stacks (dense, then MoE), MTP modules, head.

Modules only hold weights. `split` gives the functional boundary: a static graph, and plain trees of arrays that
jitted functions take and return.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.axes import gather, is_variable, shard
from mla_jax.config import ModelConfig
from mla_jax.model.attention import cached_context, context
from mla_jax.model.block import Block, build_stack, scan_stack, take
from mla_jax.model.cache import Cache
from mla_jax.model.layers import Buffer, normal, ones, rms_norm, unembed
from mla_jax.model.mtp import MTPModule


class Transformer(nnx.Module):

  def __init__(self, config: ModelConfig, key):
    self.config = config
    c, keys = config, jax.random.split(key, 5)
    self.embedding_WD = normal(keys[0], (c.vocab_size, c.hidden_size), 'WD', c.initializer_range)
    if c.num_dense_layers:
      self.dense_blocks = build_stack(lambda k: Block(c, moe=False, key=k), c.num_dense_layers, keys[1])
    if c.num_moe_layers:
      self.moe_blocks = build_stack(lambda k: Block(c, moe=True, key=k), c.num_moe_layers, keys[2])
    self.norm_D = ones(c.hidden_size, 'D')
    if not c.tie_word_embeddings:
      self.head_WD = normal(keys[3], (c.vocab_size, c.hidden_size), 'WD', c.initializer_range)
    if c.num_nextn_predict_layers:
      self.mtp_modules = build_stack(lambda k: MTPModule(c, k), c.num_nextn_predict_layers, keys[4])
    if c.num_routers:  # selection bias of each: the main MoE layers', then the MTP modules'
      self.bias_LE = Buffer(jnp.zeros((c.num_routers, c.n_routed_experts), jnp.float32), axes='LE')

  def __call__(self, tokens_BT, *, positions_BT=None, segments_BT=None):
    """Logits of the next token, float32 [B, T, W], and the Balance of the MoE layers (or None)."""
    hidden_BTD, seen = self.hidden(tokens_BT, positions_BT, segments_BT)
    return self.logits(hidden_BTD), seen

  def embed(self, tokens_BT):
    return shard(gather(self.embedding_WD[...], 'WD')[tokens_BT], 'BTD')

  def logits(self, hidden_BTD):
    """Float32, from a hidden state after its norm; the MTP modules share it."""
    with jax.named_scope('head'):
      head_WD = self.embedding_WD if self.config.tie_word_embeddings else self.head_WD
      return shard(unembed(hidden_BTD, gather(head_WD[...], 'WD')), 'BTW')

  def hidden(self, tokens_BT, positions_BT=None, segments_BT=None, remat: str = 'none', unroll: bool = False):
    """Final hidden states, after the norm, and the Balance of the MoE layers. Segment 0 is padding."""
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    valid_BT = jnp.ones(tokens_BT.shape, bool) if segments_BT is None else segments_BT > 0
    ctx = context(self.config, positions_BT, segments_BT)
    x_BTD, _, seen = self._stacks(self.embed(tokens_BT), valid_BT, ctx, None, remat, unroll)
    return rms_norm(x_BTD, self.norm_D[...], self.config.rms_norm_eps), seen

  def mtp_hidden(self, depth: int, hidden_BTD, tokens_BT, positions_BT, segments_BT, valid_BT, remat: str = 'none'):
    """Module `depth` (1 is the first) over a whole sequence: tokens_BT[:, i] is token i + depth of the text.
    Returns (hidden after the module's norm, Balance or None)."""
    ctx = context(self.config, positions_BT, segments_BT)

    def apply(module, hidden_BTD, embedding_BTD, bias_E):
      hidden_BTD, _, seen = module(hidden_BTD, embedding_BTD, bias_E, valid_BT, ctx)
      return hidden_BTD, seen

    if remat != 'none':
      apply = jax.checkpoint(apply)
    return apply(take(self.mtp_modules, depth - 1), hidden_BTD, self.embed(tokens_BT), self._mtp_bias(depth))

  def cached(self, tokens_BT, cache: Cache, lengths_B, new_B=None, *, form: str = 'absorbed', fresh: bool = False):
    """Final hidden states of T new tokens a row over a paged cache, and the cache with them in it.

    The last new_B (default: all T) tokens of a row are real and end at position lengths_B - 1; what is before them is
    padding. `form` is 'absorbed' (attends over the latents) or 'expanded'; `fresh` promises that nothing was cached
    before, so that the expanded form need not read the cache."""
    ctx = self._cached_context(tokens_BT, lengths_B, new_B, form, fresh)
    x_BTD, cache, _ = self._stacks(self.embed(tokens_BT), ctx.valid_BT, ctx, cache)
    return rms_norm(x_BTD, self.norm_D[...], self.config.rms_norm_eps), cache

  def mtp_cached(self, depth: int, hidden_BTD, tokens_BT, cache: Cache, lengths_B, new_B=None, *,
                 form: str = 'absorbed', fresh: bool = False):
    """As `cached`, for module `depth`: where hidden_BTD[:, i] is of position p, tokens_BT[:, i] is token p + depth."""
    ctx = self._cached_context(tokens_BT, lengths_B, new_B, form, fresh)
    layer = self.config.num_hidden_layers + depth - 1
    hidden_BTD, cache, _ = take(self.mtp_modules, depth - 1)(
        hidden_BTD, self.embed(tokens_BT), self._mtp_bias(depth), ctx.valid_BT, ctx, cache, layer)
    return hidden_BTD, cache

  def _cached_context(self, tokens_BT, lengths_B, new_B, form, fresh):
    batch, length = tokens_BT.shape
    new_B = jnp.full(batch, length, jnp.int32) if new_B is None else new_B
    return cached_context(self.config, length, lengths_B, new_B, form, fresh)

  def _mtp_bias(self, depth: int):
    return self.bias_LE[...][self.config.num_moe_layers + depth - 1] if self.config.n_routed_experts else None

  def _stacks(self, x_BTD, valid_BT, ctx, cache: Cache | None, remat: str = 'none', unroll: bool = False):
    c, seen = self.config, None
    if c.num_dense_layers:
      x_BTD, cache, _ = scan_stack(self.dense_blocks, c.num_dense_layers, x_BTD, None, valid_BT, ctx, cache, 0, remat,
                                   unroll)
    if c.num_moe_layers:
      x_BTD, cache, seen = scan_stack(self.moe_blocks, c.num_moe_layers, x_BTD, self.bias_LE[...][:c.num_moe_layers],
                                      valid_BT, ctx, cache, c.num_dense_layers, remat, unroll)
    return x_BTD, cache, seen


class Split(NamedTuple):
  """A model in parts: `nnx.merge(graph, params, buffers)` puts it together inside a jitted function."""

  graph: nnx.GraphDef
  params: dict
  buffers: dict


def split(model: Transformer) -> Split:
  graph, params, buffers = nnx.split(model, nnx.Param, Buffer)
  return Split(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers))


def abstract(config: ModelConfig) -> Split:
  """Graph, and trees of abstract Variables that know their shape and letters; allocates nothing."""
  model = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))
  graph, params, buffers = nnx.split(model, nnx.Param, Buffer)
  return Split(graph, _plain(params), _plain(buffers))


def _plain(state):
  return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in state.items()}


def count_parameters(config: ModelConfig) -> int:
  """Weights and selection biases, MTP modules included, shared embedding and head once."""
  _, params, buffers = abstract(config)
  biases = buffers['bias_LE'].size if config.uses_selection_bias else 0
  return sum(v.size for v in jax.tree.leaves(params, is_leaf=is_variable)) + biases


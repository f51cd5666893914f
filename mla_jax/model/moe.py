"""DeepSeekMoE (arXiv 2401.06066) with the routers of V2-Lite, V2 and V3, and its balancing.

Dispatch drops no token: rows are sorted by expert and multiplied group by group (experts.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mla_jax.axes import TABLE, current_mesh, per_device, shard, undivided
from mla_jax.config import ConfigError, ModelConfig
from mla_jax.model.experts import experts
from mla_jax.model.layers import SwiGLU, normal


class Balance(NamedTuple):
  """What balancing needs to know of one layer, summed over the batch it saw."""

  load_E: jax.Array  # float32, tokens that chose each expert
  loss: jax.Array  # float32, sum over sequences of sum_e f_e P_e, without alpha


def _pieces(x, count: int):
  """A float32 array as the sum of `count` bfloat16 ones; three hold all of its 24 bits."""
  out = []
  for _ in range(count):
    # Rounded this way, for a compiler may take a cast to bfloat16 and back for nothing at all.
    piece = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    out.append(piece.astype(jnp.bfloat16))
    x = x - piece
  return out


def _dot(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _logits_from_bfloat16(x_BTD, router_DE):
  """x_BTD @ router_DE as in float32: exact products of bfloat16 pieces, summed in float32, at the speed of matrix units
  that have no float32."""
  return sum(jnp.split(_dot('BTD,DE->BTE', x_BTD, jnp.concatenate(_pieces(router_DE, 3), axis=1)), 3, axis=2))


def _logits_backward(saved, g_BTE):
  x_BTD, router_DE = saved
  g_3BTE, (w1_DE, w2_DE) = _pieces(g_BTE, 3), _pieces(router_DE, 2)
  drouter_DE = sum(jnp.split(_dot('BTD,BTE->DE', x_BTD, jnp.concatenate(g_3BTE, axis=2)), 3, axis=1))
  # What is left out is below 2^-16 of the sum of the terms' sizes; the result is rounded to bfloat16 anyway.
  dx_BTD = _dot('BTE,DE->BTD', jnp.concatenate([*g_3BTE[:2], g_3BTE[0]], axis=2),
                jnp.concatenate([w1_DE, w1_DE, w2_DE], axis=1))
  return dx_BTD.astype(x_BTD.dtype), drouter_DE


_logits_from_bfloat16.defvjp(lambda *operands: (_logits_from_bfloat16(*operands), operands), _logits_backward)


def router_logits(x_BTD, router_DE):
  """Float32 whatever the compute dtype: near-ties decide between experts."""
  if x_BTD.dtype == jnp.bfloat16 and router_DE.dtype == jnp.float32:
    return _logits_from_bfloat16(x_BTD, router_DE)
  return jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)


def scores(x_BTD, router_DE, scoring: str):
  """Affinities in float32, [B, T, E]."""
  logits_BTE = router_logits(x_BTD, router_DE)
  return jax.nn.sigmoid(logits_BTE) if scoring == 'sigmoid' else jax.nn.softmax(logits_BTE, axis=-1)


def choose(scores_BTE, bias_E, config: ModelConfig):
  """The experts of each token, int32 [B, T, X]. The bias selects; it never weighs (V3 report, eq. 16)."""
  if config.topk_method == 'noaux_tc':
    scores_BTE = scores_BTE + bias_E
  if config.topk_method != 'greedy' and config.n_group > 1:
    grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], config.n_group, -1)
    if config.topk_method == 'noaux_tc':
      group_score = jax.lax.top_k(grouped, 2)[0].sum(-1)
    else:
      group_score = grouped.max(-1)
    kept = jax.nn.one_hot(jax.lax.top_k(group_score, config.topk_group)[1], config.n_group, dtype=bool).any(-2)
    # -inf and not 0: a bias can make every score of a kept group negative.
    scores_BTE = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)
  return jax.lax.top_k(scores_BTE, config.num_experts_per_tok)[1]


def _token_by_token(select, scores_BTE, *whole, shape):
  """select(scores_BTE, *whole), [B, T, X], by each device for its own tokens: left to XLA for CPUs, top_k has
  every device gather and sort the whole batch."""
  # E has no letter here: all scores of a token stay together.
  return per_device(select, (scores_BTE, *whole), ('BT_', *('_' * x.ndim for x in whole)), ('BTX', shape))


def weigh(scores_BTE, experts_BTX, config: ModelConfig):
  weights_BTX = jnp.take_along_axis(scores_BTE, experts_BTX, axis=-1)
  if config.norm_topk_prob:
    weights_BTX = weights_BTX / (weights_BTX.sum(-1, keepdims=True) + 1e-20)
  return weights_BTX * config.routed_scaling_factor


def balance(scores_BTE, experts_BTX, valid_BT, config: ModelConfig) -> Balance:
  """Loads for the selection bias, and the sequence-wise balance loss sum_e f_e P_e with f_e = E / (X T) * count.

  V3 (sigmoid, eq. 17-20) counts the best X of the unbiased scores and normalises them to sum 1; V2 (softmax, eq. 23-25)
  counts the experts that were chosen."""
  valid_BT = valid_BT.astype(jnp.float32)

  def counts_BE(ids_BTX):
    hit_BTE = (ids_BTX[..., None] == jnp.arange(config.n_routed_experts)).any(-2)
    return jnp.einsum('BTE,BT->BE', hit_BTE.astype(jnp.float32), valid_BT)

  chosen_BE = counts_BE(experts_BTX)
  if not config.aux_loss_alpha:
    return Balance(chosen_BE.sum(0), jnp.zeros((), jnp.float32))
  probability_BTE = scores_BTE
  counted_BE = chosen_BE
  if config.scoring_func == 'sigmoid':
    probability_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    if config.topk_method == 'noaux_tc':
      best_BTX = _token_by_token(lambda scores_BTE: jax.lax.top_k(scores_BTE, experts_BTX.shape[-1])[1], scores_BTE,
                                 shape=experts_BTX.shape)
      counted_BE = counts_BE(best_BTX)
  length_B1 = jnp.maximum(valid_BT.sum(-1, keepdims=True), 1)
  f_BE = counted_BE * (config.n_routed_experts / config.num_experts_per_tok) / length_B1
  p_BE = jnp.einsum('BTE,BT->BE', probability_BTE, valid_BT) / length_B1
  return Balance(chosen_BE.sum(0), jnp.einsum('BE,BE->', f_BE, p_BE))


def rebalance(bias_LE, load_LE, speed):
  """bias += speed * sign(mean load - load), loads counted over the whole global batch (V3 report, section 2.1.2)."""
  return bias_LE + speed * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)


def dispatch(x_BTD, ids_BTX, weights_BTX, wi_ED2F, wo_EFD):
  """`experts` on whatever mesh there is. Over the expert axis, tokens are gathered, each shard computes its own
  experts, and the sums are scattered back: exact and dropless, with an exchange of every token."""
  def local(x_BTD, ids_BTX, weights_BTX, wi_ED2F, wo_EFD, first=0):
    tokens = (t.reshape(-1, t.shape[-1]) for t in (x_BTD, ids_BTX, weights_BTX))
    return experts(*tokens, wi_ED2F, wo_EFD, first).reshape(x_BTD.shape)

  mesh = current_mesh()
  if mesh is None:
    return local(x_BTD, ids_BTX, weights_BTX, wi_ED2F, wo_EFD)
  if told := undivided('B', x_BTD.shape[:1], mesh):
    # Rows held by several devices at once gave wrong gradients here (tests/training/test_mesh.py).
    raise ConfigError(f'{told[0]} devices of the mesh; use a batch that is, or a smaller mesh')
  batch, weights = PartitionSpec(TABLE['B']), PartitionSpec(TABLE['E'])

  def exchange(x_BTD, ids_BTX, weights_BTX, wi_ED2F, wo_EFD):
    first = jax.lax.axis_index('expert') * wi_ED2F.shape[0]
    tokens = [jax.lax.all_gather(t, 'expert', tiled=True) for t in (x_BTD, ids_BTX, weights_BTX)]
    return jax.lax.psum_scatter(local(*tokens, wi_ED2F, wo_EFD, first), 'expert', tiled=True)

  # XLA for CPUs copies what it gathers even from nobody else.
  body = local if mesh.shape['expert'] == 1 else exchange
  return jax.shard_map(body, in_specs=(batch, batch, batch, weights, weights), out_specs=batch,
                       check_vma=True)(x_BTD, ids_BTX, weights_BTX, wi_ED2F, wo_EFD)


class MixtureOfExperts(nnx.Module):

  def __init__(self, config: ModelConfig, key):
    self.config = config
    c, keys = config, jax.random.split(key, 4)
    std, width, hidden = c.initializer_range, c.hidden_size, c.moe_intermediate_size
    self.router_DE = normal(keys[0], (width, c.n_routed_experts), 'DE', std)
    self.wi_ED2F = normal(keys[1], (c.n_routed_experts, width, 2, hidden), 'ED2F', std)
    self.wo_EFD = normal(keys[2], (c.n_routed_experts, hidden, width), 'EFD', std)
    if c.n_shared_experts:
      self.shared = SwiGLU(width, c.n_shared_experts * hidden, std, keys[3])

  def __call__(self, x_BTD, bias_E, valid_BT) -> tuple[jax.Array, Balance]:
    with jax.named_scope('moe/route'):
      scores_BTE = scores(x_BTD, self.router_DE[...], self.config.scoring_func)
      ids_BTX = _token_by_token(lambda scores_BTE, bias_E: choose(scores_BTE, bias_E, self.config),
                                jax.lax.stop_gradient(scores_BTE), bias_E,
                                shape=(*scores_BTE.shape[:2], self.config.num_experts_per_tok))
      weights_BTX = weigh(scores_BTE, ids_BTX, self.config)
      seen = balance(scores_BTE, ids_BTX, valid_BT, self.config)
    y_BTD = dispatch(x_BTD, ids_BTX, weights_BTX, self.wi_ED2F[...], self.wo_EFD[...])
    if self.config.n_shared_experts:
      y_BTD = y_BTD + self.shared(x_BTD)
    return shard(y_BTD, 'BTD'), seen

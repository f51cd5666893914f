"""Grouped matmul of bfloat16 or float32 operands in FP8, forward and backward, as DeepSeek-V3 trains (report, 3.3).

Three products of e4m3 numbers, each with scales along its own contraction, each 128 of it added in float32:

  y    = x w        x in 1x128 tiles of a row, w in 128x128 blocks
  dx   = dy w^T     dy in 1x128 tiles of a row, the same blocks
  dw   = x^T dy     both in tiles of 128 rows and one column, rows of one group
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, mosaic_gpu, mosaic_tpu
from pallas_kernels.grouped_matmul import gpu, operands, reference, tpu, xla
from pallas_kernels.grouped_matmul.scales import quantise_blocks, quantise_rows, quantise_tiles, quantise_tokens


def differentiable(kernels):
  """An implementation from `forward` of quantised operands and `rhs_gradient_tokens`."""
  @functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
  def run(lhs_BK, rhs_GKN, group_sizes_G, order_M, powers_of_two, out_dtype, zero_tail):
    if order_M is None:
      lhs_MK, lhs_scales = quantise_tiles(lhs_BK, powers_of_two)
    else:
      lhs_MK, lhs_scales = quantise_rows(lhs_BK, _tokens(order_M, lhs_BK), powers_of_two)
    rhs_GKN, rhs_scales = quantise_blocks(rhs_GKN, powers_of_two)
    return kernels.forward(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail)

  def forward(*operands_and_options):
    # Saved as they are: others hold them anyway, and FP8 copies would take half as much again.
    return run(*operands_and_options), operands_and_options[:4]

  def backward(powers_of_two, _out_dtype, _zero_tail, saved, dy_MN):
    lhs_BK, rhs_GKN, group_sizes_G, order_M = saved
    dy_tiles_MN, dy_scales = quantise_tiles(dy_MN, powers_of_two)
    q_GKN, rhs_scales = quantise_blocks(rhs_GKN, powers_of_two)
    dlhs_MK = kernels.forward(dy_tiles_MN, q_GKN.swapaxes(1, 2), group_sizes_G, dy_scales, rhs_scales.swapaxes(1, 2),
                              lhs_BK.dtype, True)
    tokens_M = None
    if order_M is not None:
      tokens_M = _tokens(order_M, lhs_BK)
      # A gather and a sum: adding rows where they came from would sum in whatever order they arrive.
      place_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(len(order_M), dtype=order_M.dtype),
                                                        unique_indices=True)
      dlhs_BXK = dlhs_MK[place_M].reshape(len(lhs_BK), -1, lhs_BK.shape[1])
      dlhs_MK = dlhs_BXK.sum(1, dtype=jnp.float32).astype(lhs_BK.dtype)
    lhs = quantise_tokens(lhs_BK, group_sizes_G, powers_of_two, tokens_M)
    dy = quantise_tokens(dy_MN, group_sizes_G, powers_of_two)
    return dlhs_MK, kernels.rhs_gradient_tokens(*lhs, *dy, group_sizes_G, rhs_GKN.dtype), None, None

  run.defvjp(forward, backward)
  return run


def _tokens(order_M, lhs_BK):
  return order_M // (len(order_M) // len(lhs_BK))


registry = dispatch.Registry(
  'grouped_matmul_fp8',
  dispatch.Implementation('gpu', differentiable(gpu), ('gpu',), mosaic_gpu.unavailable,
                          interpreted=mosaic_gpu.interpreted, unsuitable=gpu.unsuitable_quantised),
  dispatch.Implementation('tpu', differentiable(tpu), ('tpu',), interpreted=mosaic_tpu.interpreted,
                          unsuitable=tpu.unsuitable),
  dispatch.Implementation('xla', differentiable(xla)),
  dispatch.Implementation('reference', differentiable(reference)),
)


@registry.public
def grouped_matmul_fp8(lhs_BK, rhs_GKN, group_sizes_G, order_M=None, powers_of_two=False, out_dtype=None,
                       zero_tail=True, implementation=None):
  """`grouped_matmul(lhs_BK, rhs_GKN, group_sizes_G)`, every product in FP8, those of the gradients to lhs and rhs too.

  Operands are quantised to e4m3 here, in each call: activations and gradients in 1x128 tiles, weights in 128x128
  blocks, the tokens of a gradient to rhs in tiles of 128 of one group (V3 report, section 3.3); each 128 of a
  contraction is added in float32. lhs and rhs, the master weights, are bfloat16, float16 or float32; their gradients
  have their dtypes. With normal numbers each product is 3.7% from the float32 one, in the Euclidean norm.

  order_M: int32, a permutation of M = B X numbers, X of them a token: row m of the product is of token order_M[m] // X,
    as sorting a router's choices gives it. Each token is then quantised once and its FP8 copies gathered. None: lhs has
    the rows, sorted.
  powers_of_two: round all scales up to powers of two, so that scaling loses nothing.
  Other arguments, rows past the sum of sizes and errors are as for `grouped_matmul`; out_dtype is lhs's by default. A
  number that is not finite makes its tile NaN.
  """
  operands.check('grouped_matmul_fp8', lhs_BK, rhs_GKN, group_sizes_G)
  for name, x in (('lhs', lhs_BK), ('rhs', rhs_GKN)):
    if x.dtype.name not in ('bfloat16', 'float16', 'float32'):
      raise ValueError(f'grouped_matmul_fp8: {name} is {x.dtype} and must be bfloat16, float16 or float32; '
                       'grouped_matmul takes what is quantised already')
  if order_M is not None and (order_M.ndim != 1 or not len(order_M) or len(order_M) % len(lhs_BK)
                              or order_M.dtype != jnp.int32):
    raise ValueError(f'grouped_matmul_fp8: order is {order_M.dtype}{list(order_M.shape)} and must be int32 [M], M a '
                     f"multiple of lhs's {len(lhs_BK)} rows")
  run = registry.choose(implementation, lhs_BK, rhs_GKN)
  arrays = dispatch.operands(lhs_BK, rhs_GKN, group_sizes_G, order_M)
  with jax.named_scope('grouped_matmul_fp8'):
    return run(*arrays, bool(powers_of_two), jnp.dtype(out_dtype or lhs_BK.dtype), bool(zero_tail))

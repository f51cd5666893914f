"""Grouped matmul: the experts' matrix product, rows sorted by expert."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, mosaic_gpu, mosaic_tpu
from pallas_kernels.grouped_matmul import gpu, operands, reference, tpu, xla

_FP8 = ('float8_e4m3fn', 'float8_e5m2')


def differentiable(kernels):
  """An implementation whose gradients are two more kernels: `forward`, `lhs_gradient` and `rhs_gradient`."""
  @functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
  def run(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
    return kernels.forward(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail)

  def forward(*operands_and_options):
    return run(*operands_and_options), operands_and_options[:3]

  def backward(_out_dtype, _zero_tail, saved, dy_MN):
    lhs_MK, rhs_GKN, group_sizes_G = saved
    dy_MN = dy_MN.astype(lhs_MK.dtype)
    dlhs_MK = kernels.lhs_gradient(dy_MN, rhs_GKN, group_sizes_G, lhs_MK.dtype)
    drhs_GKN = kernels.rhs_gradient(lhs_MK, dy_MN, group_sizes_G, rhs_GKN.dtype)
    return dlhs_MK, drhs_GKN, None, None, None

  run.defvjp(forward, backward)
  return run


registry = dispatch.Registry(
  'grouped_matmul',
  dispatch.Implementation('gpu', differentiable(gpu), ('gpu',), mosaic_gpu.unavailable,
                          interpreted=mosaic_gpu.interpreted, unsuitable=gpu.unsuitable),
  dispatch.Implementation('tpu', differentiable(tpu), ('tpu',), interpreted=mosaic_tpu.interpreted,
                          unsuitable=tpu.unsuitable),
  dispatch.Implementation('xla', differentiable(xla)),
  dispatch.Implementation('reference', reference.grouped_matmul),
)


@registry.public
def grouped_matmul(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales=None, rhs_scales=None, out_dtype=None, zero_tail=True,
                   implementation=None):
  """y_MN[m] = lhs_MK[m] @ rhs_GKN[g] for the group g that row m belongs to, accumulated in float32.

  Rows come sorted by group: the first group_sizes_G[0] are group 0's, and so on; sizes may be 0. Rows past their sum
  come back zero, and get zero gradients; with zero_tail=False an implementation may leave them unwritten.
  Differentiable in lhs and rhs.

  lhs_scales, rhs_scales: float32, with FP8 operands only: [M, ceil(K/128)] a 1x128 tile and
    [G, ceil(K/128), ceil(N/128)] a 128x128 block; the value is the product of element and scale (DeepSeek-V3, 3.3.2).
  out_dtype: lhs's by default, bfloat16 for FP8.
  implementation: None = the best for the platform, or a name of `grouped_matmul.implementations()`.

  Raises ValueError for shapes, dtypes or names that do not fit, NotImplementedError for an implementation that cannot
  run here and for gradients through FP8 operands: those are quantised, and rounding has none (`grouped_matmul_fp8`).
  """
  _check(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales)
  run = registry.choose(implementation, lhs_MK, rhs_GKN)
  fp8 = lhs_scales is not None
  out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if fp8 else lhs_MK.dtype))
  arrays = dispatch.operands(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales)
  if fp8:
    arrays = dispatch.refuse_gradients(
      'grouped_matmul has no gradients for FP8 operands; grouped_matmul_fp8 quantises and has', arrays)
  with jax.named_scope('grouped_matmul'):
    return run(*arrays, out_dtype, bool(zero_tail))


def _check(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales):
  operands.check('grouped_matmul', lhs_MK, rhs_GKN, group_sizes_G)
  (m, k), (groups, _, n) = lhs_MK.shape, rhs_GKN.shape
  if lhs_MK.dtype != rhs_GKN.dtype and not all(x.dtype.name in _FP8 for x in (lhs_MK, rhs_GKN)):
    raise ValueError(f'grouped_matmul: lhs is {lhs_MK.dtype} and rhs {rhs_GKN.dtype}; cast one to the other')
  if lhs_MK.dtype.name not in _FP8:
    if lhs_scales is not None or rhs_scales is not None:
      raise ValueError(f'grouped_matmul: scales belong to FP8 operands and lhs is {lhs_MK.dtype}; leave them out')
    return
  for name, scales, shape in (('lhs_scales', lhs_scales, (m, -(-k // 128))),
                              ('rhs_scales', rhs_scales, (groups, -(-k // 128), -(-n // 128)))):
    if scales is None or scales.shape != shape or scales.dtype != jnp.float32:
      raise ValueError(f'grouped_matmul: {name} is {None if scales is None else f"{scales.dtype}{list(scales.shape)}"} '
                       f'and must be float32{list(shape)} for FP8 operands')

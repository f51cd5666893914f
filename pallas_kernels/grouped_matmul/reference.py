"""Grouped matmul as one masked dense product: rows x experts, float32, differentiable by jax itself.

`forward` and `rhs_gradient_tokens` are for `grouped_matmul_fp8`, whose gradients are products of quantised numbers.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.scales import BLOCK, dequantise, padded_sizes


def grouped_matmul(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
  del zero_tail  # the tail belongs to no group and is zero anyway
  if lhs_scales is not None:
    lhs_MK, rhs_GKN = _as_rounded(lhs_MK, rhs_GKN)
    lhs_MK, rhs_GKN = dequantise(lhs_MK, lhs_scales, (1, 128)), dequantise(rhs_GKN, rhs_scales, (1, 128, 128))
  member_MG = _members(lhs_MK.shape[0], group_sizes_G)
  y_MGN = jnp.einsum('MK,GKN->MGN', lhs_MK.astype(jnp.float32), rhs_GKN.astype(jnp.float32), precision='highest')
  # Selected, not multiplied by 0: a row of one group must not see another group's infinities.
  return jnp.where(member_MG[:, :, None], y_MGN, 0).sum(1).astype(out_dtype)


forward = grouped_matmul


def rhs_gradient_tokens(lhs_PK, lhs_scales, dy_PN, dy_scales, group_sizes_G, out_dtype):
  lhs_PK, dy_PN = _as_rounded(lhs_PK, dy_PN)
  lhs_PK, dy_PN = dequantise(lhs_PK, lhs_scales, (BLOCK, 1)), dequantise(dy_PN, dy_scales, (BLOCK, 1))
  member_PG = _members(lhs_PK.shape[0], padded_sizes(group_sizes_G))

  def of_group(member_P):
    # Selected, as above.
    return jnp.einsum('PK,PN->KN', *(jnp.where(member_P[:, None], x, 0) for x in (lhs_PK, dy_PN)), precision='highest')

  return jnp.stack([of_group(member_P) for member_P in member_PG.T]).astype(out_dtype)


def _as_rounded(*quantised):
  # Where such numbers become float32 again, XLA for GPUs takes the two conversions for none.
  return jax.lax.optimization_barrier(quantised)


def _members(rows, group_sizes_G):
  """bool [rows, G]: which rows are each group's."""
  ends_G = jnp.cumsum(group_sizes_G)
  row_M1 = jnp.arange(rows)[:, None]
  return (row_M1 >= ends_G - group_sizes_G) & (row_M1 < ends_G)

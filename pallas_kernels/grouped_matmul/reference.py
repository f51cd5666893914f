"""Grouped matmul as one masked dense product: rows x experts, float32, differentiable by jax itself."""

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.scales import dequantise


def grouped_matmul(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
  del zero_tail  # the tail belongs to no group and is zero anyway
  if lhs_scales is not None:
    lhs_MK, rhs_GKN = dequantise(lhs_MK, lhs_scales, (1, 128)), dequantise(rhs_GKN, rhs_scales, (1, 128, 128))
  ends_G = jnp.cumsum(group_sizes_G)
  row_M1 = jnp.arange(lhs_MK.shape[0])[:, None]
  member_MG = (row_M1 >= ends_G - group_sizes_G) & (row_M1 < ends_G)
  y_MGN = jnp.einsum('MK,GKN->MGN', lhs_MK.astype(jnp.float32), rhs_GKN.astype(jnp.float32), precision='highest')
  # Selected, not multiplied by 0: a row of one group must not see another group's infinities.
  return jnp.where(member_MG[:, :, None], y_MGN, 0).sum(1).astype(out_dtype)

"""What the operands of both grouped matmuls must be."""

import jax.numpy as jnp

from pallas_kernels import dispatch


def check(op, lhs_MK, rhs_GKN, group_sizes_G):
  """Raises ValueError for shapes and dtypes that do not fit each other."""
  if lhs_MK.ndim != 2 or rhs_GKN.ndim != 3 or lhs_MK.shape[1] != rhs_GKN.shape[1]:
    raise ValueError(f'{op}: lhs {lhs_MK.shape} and rhs {rhs_GKN.shape} must be [M, K] and [G, K, N]')
  dispatch.refuse_empty(op, lhs=lhs_MK, rhs=rhs_GKN)
  groups = len(rhs_GKN)
  if group_sizes_G.shape != (groups,) or not jnp.issubdtype(group_sizes_G.dtype, jnp.integer):
    raise ValueError(f'{op}: group_sizes is {group_sizes_G.dtype}{list(group_sizes_G.shape)} and must be '
                     f'integers [{groups}], one a group of rhs')

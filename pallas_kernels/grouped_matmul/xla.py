"""Grouped matmul as a loop over visits: it costs what the rows cost, and reads only the experts that have rows.

A visit is a tile of rows of one group. It slices those rows and that group's weights, multiplies them, and writes
the rows that belong to the group; a tile that starts in one group may hold rows of the next ones, whose results are
discarded. `jax.lax.ragged_dot` computes every expert for every row on CPU and on older TPUs.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.scales import BLOCK, dequantise, padded_sizes

# Most rows a visit has. Small tiles copy a weight matrix too often, large ones waste rows at the ends of groups.
TILE = {'cpu': 64, 'gpu': 512, 'tpu': 512}


def forward(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
  del zero_tail  # the loop starts from zeros and no visit writes the tail

  def product(rows, g):
    lhs, rhs = rows(lhs_MK), _pick(rhs_GKN, g)
    if lhs_scales is not None:
      lhs, rhs = dequantise(lhs, rows(lhs_scales), (1, 128)), dequantise(rhs, _pick(rhs_scales, g), (128, 128))
    return jnp.einsum('mK,KN->mN', lhs, rhs, preferred_element_type=jnp.float32)

  return _map_rows(product, lhs_MK, rhs_GKN.shape[2], group_sizes_G, out_dtype)


def lhs_gradient(dy_MN, rhs_GKN, group_sizes_G, out_dtype):
  def product(rows, g):
    return jnp.einsum('mN,KN->mK', rows(dy_MN), _pick(rhs_GKN, g), preferred_element_type=jnp.float32)

  return _map_rows(product, dy_MN, rhs_GKN.shape[1], group_sizes_G, out_dtype)


def rhs_gradient(lhs_MK, dy_MN, group_sizes_G, out_dtype):
  return _rhs_gradient(lambda rows: (rows(lhs_MK), rows(dy_MN)), lhs_MK, dy_MN, group_sizes_G, out_dtype)


def rhs_gradient_tokens(lhs_PK, lhs_scales, dy_PN, dy_scales, group_sizes_G, out_dtype):
  def factors(rows):
    return [dequantise(rows(x), rows(scales, every=BLOCK), (BLOCK, 1))
            for x, scales in ((lhs_PK, lhs_scales), (dy_PN, dy_scales))]

  return _rhs_gradient(factors, lhs_PK, dy_PN, padded_sizes(group_sizes_G), out_dtype)


def _rhs_gradient(factors, lhs_MK, dy_MN, group_sizes_G, out_dtype):
  def body(visit, drhs_GKN):
    rows, mine_m1, g = visit
    # Both sides masked: the tail and other groups may hold NaN, and 0 times NaN is NaN.
    lhs_mK, dy_mN = (jnp.where(mine_m1, x, 0) for x in factors(rows))
    lhs_Km = lhs_mK.T
    if dispatch.platform(lhs_MK) == 'cpu':
      # Without the barrier XLA takes lhs_mK after all, and a product that splits over the pool's threads and waits for
      # them, while they compute for other devices.
      lhs_Km = jax.lax.optimization_barrier(lhs_Km)
    part_KN = jnp.einsum('Km,mN->KN', lhs_Km, dy_mN, preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(drhs_GKN, _pick(drhs_GKN, g) + part_KN, g, 0,
                                               allow_negative_indices=False)

  shape = (group_sizes_G.shape[0], lhs_MK.shape[1], dy_MN.shape[1])
  return _loop(body, jnp.zeros(shape, jnp.float32), lhs_MK, group_sizes_G).astype(out_dtype)


def _pick(x, g):
  return jax.lax.dynamic_index_in_dim(x, g, keepdims=False, allow_negative_indices=False)


def _map_rows(product, x_MK, width, group_sizes_G, out_dtype):
  """y [M, width] whose rows are product(rows, g); rows of no group stay zero."""
  def body(visit, y_MN):
    rows, mine_m1, g = visit
    y_mN = jnp.where(mine_m1, product(rows, g).astype(out_dtype), rows(y_MN))
    return rows(y_MN, y_mN)

  return _loop(body, jnp.zeros((x_MK.shape[0], width), out_dtype), x_MK, group_sizes_G)


def _loop(body, carry, x_MK, group_sizes_G):
  """carry after body((rows, mine_m1, g), carry) for each visit.

  rows(x) slices the visit's tile from x [M, ...], or from x [M / every, ...] if groups start at multiples of `every`, a
  power of two; rows(x, new) writes it; mine_m1 tells which of its rows are the group's. The last tiles of the array are
  moved up to stay inside it.
  """
  m = x_MK.shape[0]
  target = dispatch.platform(x_MK)
  groups = group_sizes_G.shape[0]
  # No more than the mean group has, rounded up to a power of two: in decoding most groups have one row or none.
  tile = min(TILE[target], m, 1 << (-(-m // groups) - 1).bit_length())
  limit = min(m, -(-m // tile) + groups)  # no group has more visits than rows
  tiles_G = (group_sizes_G + tile - 1) // tile
  last_visit_G, end_G = jnp.cumsum(tiles_G), jnp.cumsum(group_sizes_G)
  visit = jnp.arange(limit)
  group = jnp.searchsorted(last_visit_G, visit, side='right', method='compare_all')
  # Visits past the last one start at or after their group's end: none of their rows is the group's.
  group = jnp.minimum(group, groups - 1)
  end = end_G[group]
  first = end - group_sizes_G[group] + (visit - (last_visit_G - tiles_G)[group]) * tile
  start = jnp.minimum(first, m - tile)

  def step(i, carry):
    # No index is negative, which spares the loop what jax does for those (and `//` too).
    first_i, end_i, start_i, group_i = (_pick(x, i) for x in (first, end, start, group))
    row_m1 = start_i + jnp.arange(tile)[:, None]

    def rows(x, new=None, every=1):
      if new is None:
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.div(start_i, every), max(tile // every, 1),
                                            allow_negative_indices=False)
      return jax.lax.dynamic_update_slice_in_dim(x, new, start_i, 0, allow_negative_indices=False)

    return body((rows, (row_m1 >= first_i) & (row_m1 < end_i), group_i), carry)

  # The number of visits is data. A loop that stops there costs an accelerator a host round trip an iteration, so
  # there the bound is static.
  bound = last_visit_G[-1] if target == 'cpu' else limit
  return jax.lax.fori_loop(0, bound, step, dispatch.vary(carry, dispatch.varying_axes(x_MK)))

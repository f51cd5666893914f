"""Grouped matmul for TPU (Mosaic), as a grid over visits: a visit is a tile of rows and one of the groups with rows in
it.

The whole contraction of a tile is in VMEM, so a group's weights are read once however many tiles its rows fill: the
next visit asks for the same block and no copy is made. The number of visits is data, and so is the size of the grid.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu
from pallas_kernels.grouped_matmul.scales import BLOCK, padded_sizes
from pallas_kernels.mosaic_tpu import dot

CHUNK = 1024  # of the contraction in one product: the code of a product grows with it


def unsuitable(lhs_MK, rhs_GKN, **_):
  """For `dispatch.Implementation`: forward contracts K and the gradient to lhs N, and a tile holds all of either."""
  reason = mosaic_tpu.unsuitable(lhs_MK, rhs_GKN)
  longest, chip = max(rhs_GKN.shape[1:]), mosaic_tpu.chip(lhs_MK, rhs_GKN)
  if reason is None and _columns_that_fit(16, longest, lhs_MK.dtype.itemsize, 4, True, chip) < 128:
    reason = f'a contraction of {longest} does not fit in the {chip.vmem // mosaic_tpu.MIB} MiB of VMEM'
  return reason


def forward(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
  scales = ()
  if lhs_scales is not None:
    # Zeros complete the last block; a row of scales a block row, so that 128 columns need no common scale.
    k, n = lhs_MK.shape[1], rhs_GKN.shape[2]
    lhs_MK = jnp.pad(lhs_MK, ((0, 0), (0, -k % BLOCK)))
    rhs_GKN = jnp.pad(rhs_GKN, ((0, 0), (0, -k % BLOCK), (0, 0)))
    scales = lhs_scales, jnp.repeat(rhs_scales, BLOCK, axis=2)[..., :n]
  return _rows_times_group(lhs_MK, rhs_GKN, group_sizes_G, scales, out_dtype, zero_tail, rhs_transposed=False)


def lhs_gradient(dy_MN, rhs_GKN, group_sizes_G, out_dtype):
  return _rows_times_group(dy_MN, rhs_GKN, group_sizes_G, (), out_dtype, True, rhs_transposed=True)


def rhs_gradient(lhs_MK, dy_MN, group_sizes_G, out_dtype):
  (m, k), n, groups = lhs_MK.shape, dy_MN.shape[1], len(group_sizes_G)
  chip = mosaic_tpu.chip(lhs_MK, dy_MN)
  columns = max(128, chip.matmul_columns * 2 // lhs_MK.dtype.itemsize)
  tk, tn = _split(k, columns, chip), _split(n, columns // 2, chip)
  tm = _row_tile(m, groups, chip)
  visits = _visits(group_sizes_G, m, tm, empty_too=True)
  return mosaic_tpu.call(
    functools.partial(_rhs_gradient, part=chip.matmul_part), (*visits[:4], lhs_MK, dy_MN), prefetched=4,
    name='grouped_matmul_rhs_gradient',
    grid=(pl.cdiv(k, tk), pl.cdiv(n, tn), visits[4]), dimensions=('parallel', 'parallel', 'arbitrary'),
    in_specs=[pl.BlockSpec((tm, tk), lambda i, _, v, tile_V, *__: (tile_V[v], i)),
              pl.BlockSpec((tm, tn), lambda _, j, v, tile_V, *__: (tile_V[v], j))],
    out_shape=[((groups, k, n), out_dtype)],
    out_specs=[pl.BlockSpec((None, tk, tn), lambda i, j, v, _, group_V, *__: (group_V[v], i, j))],
    scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)])[0]


def _rhs_gradient(tile_V, group_V, start_G, end_G, lhs_mk, dy_mn, drhs_kn, sum_kn, *, part):
  v = pl.program_id(2)
  g = group_V[v]
  first_row, start, end = tile_V[v] * lhs_mk.shape[0], start_G[g], end_G[g]
  whole = (start <= first_row) & (first_row + lhs_mk.shape[0] <= end)

  @pl.when((v == 0) | (group_V[jnp.maximum(v - 1, 0)] != g))
  def _():
    sum_kn[...] = jnp.zeros_like(sum_kn)

  @pl.when(whole)
  def _():
    sum_kn[...] += dot(lhs_mk[...], dy_mn[...], (0, 0))

  @pl.when(~whole)
  def _():
    def add(rows, first_row):
      # Both sides masked: other groups and the tail may hold NaN, and 0 times NaN is NaN.
      lhs, dy = (jnp.where(_members((rows.size, x.shape[1]), first_row, start, end), x[rows, :], jnp.zeros((), x.dtype))
                 for x in (lhs_mk, dy_mn))
      sum_kn[...] += dot(lhs, dy, (0, 0))

    _parts(add, lhs_mk.shape[0], part, first_row, start, end)

  last = pl.num_programs(2) - 1

  @pl.when((v == last) | (group_V[jnp.minimum(v + 1, last)] != g))
  def _():
    drhs_kn[...] = sum_kn[...].astype(drhs_kn.dtype)


def rhs_gradient_tokens(lhs_PK, lhs_scales, dy_PN, dy_scales, group_sizes_G, out_dtype):
  """For operands of `scales.quantise_tokens`: a visit is a tile of 128 rows, all of one group."""
  (p, k), n, groups = lhs_PK.shape, dy_PN.shape[1], len(group_sizes_G)
  chip = mosaic_tpu.chip(lhs_PK, dy_PN)
  columns = max(128, chip.matmul_columns)
  tk, tn = _split(k, columns, chip), _split(n, columns // 2, chip)
  visits = _visits(padded_sizes(group_sizes_G), p, BLOCK, empty_too=True)

  def tile_of_lhs(width):
    return pl.BlockSpec((width, tk), lambda i, _, v, tile_V, *__: (tile_V[v], i))

  def tile_of_dy(width):
    return pl.BlockSpec((width, tn), lambda _, j, v, tile_V, *__: (tile_V[v], j))

  def scales_of(spec):
    # A middle axis of one: a block may be one row high where that is all there is.
    return pl.BlockSpec((None, *spec.block_shape), lambda *x: (spec.index_map(*x)[0], 0, spec.index_map(*x)[1]))

  return mosaic_tpu.call(
    functools.partial(_rhs_gradient_tokens, factor_dtype=_factor_dtype(lhs_PK, dy_PN, chip)),
    (*visits[:4], lhs_PK, lhs_scales[:, None], dy_PN, dy_scales[:, None]), prefetched=4,
    name='grouped_matmul_rhs_gradient',
    grid=(pl.cdiv(k, tk), pl.cdiv(n, tn), visits[4]), dimensions=('parallel', 'parallel', 'arbitrary'),
    in_specs=[tile_of_lhs(BLOCK), scales_of(tile_of_lhs(1)), tile_of_dy(BLOCK), scales_of(tile_of_dy(1))],
    out_shape=[((groups, k, n), out_dtype)],
    out_specs=[pl.BlockSpec((None, tk, tn), lambda i, j, v, _, group_V, *__: (group_V[v], i, j))],
    scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)])[0]


def _rhs_gradient_tokens(_, group_V, start_G, end_G, lhs_mk, lhs_scales_1k, dy_mn, dy_scales_1n, drhs_kn, sum_kn, *,
                         factor_dtype):
  v, last = pl.program_id(2), pl.num_programs(2) - 1
  g = group_V[v]

  @pl.when((v == 0) | (group_V[jnp.maximum(v - 1, 0)] != g))
  def _():
    sum_kn[...] = jnp.zeros_like(sum_kn)

  @pl.when(start_G[g] < end_G[g])
  def _():
    part_kn = dot(lhs_mk[...].astype(factor_dtype), dy_mn[...].astype(factor_dtype), (0, 0))
    sum_kn[...] += part_kn * mosaic_tpu.column_of_row(lhs_scales_1k[...]) * dy_scales_1n[...]

  @pl.when((v == last) | (group_V[jnp.minimum(v + 1, last)] != g))
  def _():
    drhs_kn[...] = sum_kn[...].astype(drhs_kn.dtype)


def _factor_dtype(a, b, chip):
  """bfloat16 holds the numbers of both FP8 formats, and all generations multiply it."""
  return a.dtype if chip.multiplies_fp8 and a.dtype == b.dtype else jnp.bfloat16


def _rows_times_group(x_MK, rhs_GKN, group_sizes_G, scales, out_dtype, zero_tail, rhs_transposed):
  """x @ rhs[g] for the rows of each group g, or x @ rhs[g]^T. scales: none, or [M, K/128] and [G, K/128, N]."""
  (m, k), groups = x_MK.shape, len(group_sizes_G)
  n = rhs_GKN.shape[1 if rhs_transposed else 2]
  chip = mosaic_tpu.chip(x_MK, rhs_GKN)
  tm, tn = _tiles(m, groups, n, k, x_MK.dtype.itemsize, jnp.dtype(out_dtype).itemsize, bool(scales), chip)
  if zero_tail:  # the rows of no group are a group that no weights belong to
    group_sizes_G = jnp.append(group_sizes_G, m - group_sizes_G.sum())
  *visits, count = _visits(group_sizes_G, m, tm, empty_too=False)

  def weights(axes):
    # The tail asks for the weights that are there already.
    def index(j, v, *prefetched):
      place = {'g': prefetched[-1][v], 'n': j, 'k': 0}
      return tuple(place[axis] for axis in axes)
    return index

  weights_V = jax.lax.cummax(jnp.where(visits[1] < groups, visits[1], 0))
  rhs_block = ((None, tn, k), weights('gnk')) if rhs_transposed else ((None, k, tn), weights('gkn'))
  in_specs = [pl.BlockSpec((tm, k), lambda _, v, tile_V, *__: (tile_V[v], 0)), pl.BlockSpec(*rhs_block)]
  if scales:
    in_specs += [pl.BlockSpec((tm, scales[0].shape[1]), lambda _, v, tile_V, *__: (tile_V[v], 0)),
                 pl.BlockSpec((None, scales[1].shape[1], tn), weights('gkn'))]
  contract = (1, 1) if rhs_transposed else (1, 0)
  return mosaic_tpu.call(
    functools.partial(_rows_kernel, groups=groups, contract=contract, factor_dtype=_factor_dtype(x_MK, rhs_GKN, chip),
                      part=chip.matmul_part),
    (*visits, weights_V, x_MK, rhs_GKN, *scales), prefetched=5, grid=(pl.cdiv(n, tn), count),
    dimensions=('parallel', 'arbitrary'), in_specs=in_specs, out_shape=[((m, n), out_dtype)],
    out_specs=[pl.BlockSpec((tm, tn), lambda j, v, tile_V, *_: (tile_V[v], j))],
    scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)], name='grouped_matmul')[0]


def _rows_kernel(tile_V, group_V, start_G, end_G, _, x_mK, rhs, *refs, groups, contract, factor_dtype, part):
  y_mn, sum_mn = refs[-2:]
  v = pl.program_id(1)
  g = group_V[v]
  sum_mn[...] = jnp.zeros_like(sum_mn)

  tm, start, end = sum_mn.shape[0], start_G[g], end_G[g]
  first_row = tile_V[v] * tm
  whole = (start <= first_row) & (first_row + tm <= end)

  def add(rows, _=None):
    if len(refs) > 2:
      _accumulate_scaled(rows, sum_mn, x_mK, rhs, *refs[:-2], factor_dtype)
    else:
      _accumulate(rows, sum_mn, x_mK, rhs, contract)

  pl.when((g < groups) & whole)(lambda: add(pl.ds(0, tm)))
  pl.when((g < groups) & ~whole)(lambda: _parts(add, tm, part, first_row, start, end))
  mine = _members(sum_mn.shape, first_row, start, end)
  first = (v == 0) | (tile_V[jnp.maximum(v - 1, 0)] != tile_V[v])

  # The block stays in VMEM while its tile's groups follow each other.
  @pl.when(first)
  def _():
    y_mn[...] = jnp.where(mine, sum_mn[...], 0).astype(y_mn.dtype)

  @pl.when(~first)
  def _():
    y_mn[...] = jnp.where(mine, sum_mn[...], y_mn[...].astype(jnp.float32)).astype(y_mn.dtype)


def _parts(add, tm, part, first_row, start, end):
  """add(rows, number of the first) for the parts of a tile that have rows of the group: the others cost nothing."""
  part = tm if tm % part else part

  def one(i, _):
    first = pl.multiple_of(i * part, part)
    add(pl.ds(first, part), first_row + first)

  low, high = (jnp.clip(x - first_row, 0, tm) for x in (start, end))
  jax.lax.fori_loop(low // part, pl.cdiv(high, part), one, None)


def _accumulate(rows, sum_mn, x_mK, rhs, contract):
  k = x_mK.shape[1]

  def add(start, size):
    chunk = pl.ds(start, size)
    sum_mn[rows, :] += dot(x_mK[rows, chunk], rhs[:, chunk] if contract[1] else rhs[chunk, :], contract)

  if k // CHUNK:
    jax.lax.fori_loop(0, k // CHUNK, lambda i, _: add(pl.multiple_of(i * CHUNK, CHUNK), CHUNK), None)
  if k % CHUNK:
    add(k // CHUNK * CHUNK, k % CHUNK)


def _accumulate_scaled(rows, sum_mn, x_mK, rhs_Kn, x_scales, rhs_scales, factor_dtype):
  """Each 128 of the contraction is scaled in float32 as it is added (DeepSeek-V3, 3.3.2)."""
  def add(block, _):
    chunk = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
    part_mn = dot(x_mK[rows, chunk].astype(factor_dtype), rhs_Kn[chunk, :].astype(factor_dtype))
    scales_mb = x_scales[rows, :]
    lane = jax.lax.broadcasted_iota(jnp.int32, scales_mb.shape, 1)
    scale_m1 = jnp.where(lane == block, scales_mb, 0).sum(1, keepdims=True)
    sum_mn[rows, :] += part_mn * scale_m1 * rhs_scales[pl.ds(block, 1), :]

  jax.lax.fori_loop(0, x_scales.shape[1], add, None)


def _members(shape, first_row, start, end):
  row = first_row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= start) & (row < end)


def _visits(group_sizes_G, m, tm, empty_too):
  """(tile_V, group_V, start_G, end_G, count): the visits in order of rows; the first `count` are real.

  empty_too: a group without rows has one visit, somewhere.
  """
  sizes_G = group_sizes_G.astype(jnp.int32)
  end_G = jnp.cumsum(sizes_G)
  start_G = end_G - sizes_G
  first_tile_G = jnp.minimum(start_G // tm, pl.cdiv(m, tm) - 1)
  visits_G = jnp.where(sizes_G > 0, (end_G - 1) // tm - first_tile_G + 1, int(empty_too))
  total_G = jnp.cumsum(visits_G)
  visit_V = jnp.arange(pl.cdiv(m, tm) + len(sizes_G))  # a group has at most one visit more than tiles begin in it
  group_V = jnp.minimum(jnp.searchsorted(total_G, visit_V, side='right', method='compare_all'), len(sizes_G) - 1)
  group_V = group_V.astype(jnp.int32)
  tile_V = first_tile_G[group_V] + visit_V - (total_G - visits_G)[group_V]
  return jnp.minimum(tile_V, pl.cdiv(m, tm) - 1).astype(jnp.int32), group_V, start_G, end_G, jnp.maximum(total_G[-1], 1)


def _row_tile(m, groups, chip):
  """Rows of a tile, a power of two.

  Visits cost (M/tm + G) (tm + w): at each boundary a tile has two, and each visit loads weights into the matrix unit,
  worth w rows. The least is at tm = sqrt(w M/G).
  """
  best = (chip.matmul_unit * max(m // groups, 1)) ** 0.5
  tile = 1 << max(4, round(best).bit_length() - 1)
  return min(tile, chip.matmul_rows, pl.cdiv(m, 16) * 16)


def _tiles(m, groups, n, k, itemsize, out_itemsize, scaled, chip):
  """Rows and columns of a tile of the product: as many columns as fit beside the rows; fewer rows if too few do."""
  tm = _row_tile(m, groups, chip)
  while tm > 16 and _columns_that_fit(tm, k, itemsize, out_itemsize, scaled, chip) < min(n, 512):
    tm //= 2
  fits = _columns_that_fit(tm, k, itemsize, out_itemsize, scaled, chip)
  return tm, _split(n, min(fits, chip.matmul_columns), chip)


def _columns_that_fit(tm, k, itemsize, out_itemsize, scaled, chip):
  """Columns whose blocks, twice for the copies under way, fit in VMEM beside the tile's rows."""
  rows = 2 * tm * k * itemsize + (2 * tm * 4 * 128 if scaled else 0)
  column = 2 * k * itemsize + tm * (2 * out_itemsize + 3 * 4) + (2 * k // BLOCK * 4 if scaled else 0)
  # A quarter is left for what the compiler keeps of a product's operands and result.
  return (mosaic_tpu.vmem_limit(chip) * 3 // 4 - rows) // column


def _split(n, most, chip):
  """Columns of a block, at most `most`: as even as whole lanes allow, and a block for each core where there are two."""
  unit = min(128, chip.matmul_columns)
  blocks = max(pl.cdiv(n, max(most // unit * unit, unit)), min(chip.cores, pl.cdiv(n, unit)))
  return n if blocks == 1 else pl.cdiv(pl.cdiv(n, blocks), unit) * unit

"""Grouped matmul for Hopper (Mosaic GPU): bfloat16 or float16, and block-scaled FP8 (e4m3), with both gradients.

Forward and the gradient to lhs are one kernel over visits (a tile of rows of one group), the other operand being the
group's weights or, read from the same array, their transpose. The gradient to rhs is a product for each group, its
contraction the group's rows; rows of other groups in its first and last chunk are set to zero in shared memory.

FP8 operands must have the contraction innermost for the tensor cores: rhs_GKN is best the transpose, made in the same
jit, of an array stored as [G, N, K]; XLA then copies nothing. For the gradient to rhs both are transposed, with each
group's rows completed to whole chunks of 128, so nothing needs clearing.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu
from pallas_kernels.grouped_matmul import gpu_schedule, scales
from pallas_kernels.grouped_matmul.gpu_pipeline import NEVER, PART, Job, Tiling, run

_I32 = jnp.int32
# Of 8 rows in the registers of a warpgroup: a thread has 16 bytes of one row.
BAND = plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (4, 64), (8,))), (-5, -4), (-3, -2), -1)
PANEL = 1024  # rows of tiles that go over all columns together, so that the weights they share stay in L2


def unsuitable(lhs_MK, rhs_GKN) -> str | None:
  """What about the operands it does not serve, in one clause, or None."""
  k, n = rhs_GKN.shape[1:]
  if lhs_MK.dtype != rhs_GKN.dtype or lhs_MK.dtype.name not in ('bfloat16', 'float16', 'float8_e4m3fn'):
    return f'it takes bfloat16, float16 or float8_e4m3fn and these are {lhs_MK.dtype} and {rhs_GKN.dtype}'
  multiple = scales.BLOCK if lhs_MK.dtype.itemsize == 1 else 64
  if k % multiple or n % 64 or 0 in rhs_GKN.shape:
    return f'it needs K a multiple of {multiple} and N of 64 for {lhs_MK.dtype} and they are {k} and {n}'
  return dispatch.divided(lhs_MK, rhs_GKN)


def forward(lhs_MK, rhs_GKN, group_sizes_G, lhs_scales, rhs_scales, out_dtype, zero_tail):
  if lhs_scales is None:
    return _rows_times_group(lhs_MK, rhs_GKN, group_sizes_G, (), out_dtype, zero_tail, transposed=False)
  rhs_GNK = rhs_GKN.swapaxes(1, 2)
  scales = lhs_scales, rhs_scales
  return _rows_times_group(lhs_MK, rhs_GNK, group_sizes_G, scales, out_dtype, zero_tail, transposed=True)


def lhs_gradient(dy_MN, rhs_GKN, group_sizes_G, out_dtype):
  return _rows_times_group(dy_MN, rhs_GKN, group_sizes_G, (), out_dtype, zero_tail=True, transposed=True)


def rhs_gradient(lhs_MK, dy_MN, group_sizes_G, out_dtype):
  lhs_MK, dy_MN = _whole_tiles(lhs_MK), _whole_tiles(dy_MN)
  (m, k), n, groups = lhs_MK.shape, dy_MN.shape[1], len(group_sizes_G)
  tiling = Tiling(cluster=_shared_dy(m, k, groups))
  table = gpu_schedule.largest_first(group_sizes_G, tiling.depth)
  job = _rhs_gradient_job(tiling, k, n, groups, lhs_MK.dtype)
  return run(job, tiling, (lhs_MK, dy_MN, table), (groups, k, n), out_dtype, name='grouped_matmul_rhs_gradient')


def unsuitable_quantised(lhs_MK, rhs_GKN) -> str | None:
  """`unsuitable` for operands that will be quantised."""
  k, n = rhs_GKN.shape[1:]
  if k % scales.BLOCK or n % scales.BLOCK or 0 in rhs_GKN.shape:
    return f'it needs K and N multiples of {scales.BLOCK} and they are {k} and {n}'
  return dispatch.divided(lhs_MK, rhs_GKN)


def rhs_gradient_tokens(lhs_PK, lhs_scales, dy_PN, dy_scales, group_sizes_G, out_dtype):
  """For operands of `scales.quantise_tokens`."""
  (p, k), n, groups = lhs_PK.shape, dy_PN.shape[1], len(group_sizes_G)
  tiling = Tiling(columns=128, depth=scales.BLOCK, slots=5, cluster=_shared_dy(p, k, groups))
  table = gpu_schedule.largest_first(scales.padded_sizes(group_sizes_G), tiling.depth)
  job = _rhs_gradient_job(tiling, k, n, groups, lhs_PK.dtype)
  # [tiles of 128 tokens, K or N, tokens]: a copy into shared memory is then contiguous, and XLA quantises and
  # transposes in one pass, where [K, P] takes another.
  lhs_TKB, dy_TNB = (x.reshape(-1, scales.BLOCK, x.shape[1]).swapaxes(1, 2) for x in (lhs_PK, dy_PN))
  operands = lhs_TKB, dy_TNB, table, lhs_scales, dy_scales
  return run(job, tiling, operands, (groups, k, n), out_dtype, name='grouped_matmul_rhs_gradient')


def _shared_dy(rows, k, groups) -> int:
  """Programs of a cluster. Short contractions would spend more time waiting for the other program than they save."""
  return 2 if rows >= 1024 * groups and pl.cdiv(k, 128) % 2 == 0 else 1


def _whole_tiles(x_MK):
  """Rows completed to a multiple of 8: TMA sees tiles of 8 rows."""
  rows = x_MK.shape[0]
  return jnp.pad(x_MK, ((0, -rows % gpu_schedule.ALIGNMENT), (0, 0))) if rows % gpu_schedule.ALIGNMENT else x_MK


def _rows_times_group(x_MC, weights, group_sizes_G, scales, out_dtype, zero_tail, transposed):
  """y_MN[m] = x_MC[m] @ weights[g], weights being [G, C, N], or [G, N, C] if transposed."""
  rows, n = x_MC.shape[0], weights.shape[1 if transposed else 2]
  x_MC = _whole_tiles(x_MC)
  m, c = x_MC.shape
  tiling = _rows_tiling(n, bool(scales))
  table = gpu_schedule.visits(group_sizes_G, m, tiling.rows, zero_tail, tiling.cluster)
  operands = x_MC, weights, table
  if scales:
    lhs_scales, rhs_scales = scales
    operands += jnp.pad(lhs_scales, ((0, m - rows), (0, 0))).T, rhs_scales
  job = _rows_job(tiling, c, n, x_MC.dtype, bool(scales), transposed)
  return run(job, tiling, operands, (m, n), out_dtype, name='grouped_matmul')[:rows]


def _rows_tiling(n, fp8):
  wasteful = pl.cdiv(n, 256) * 256 > 1.05 * pl.cdiv(n, 128) * 128  # 256 columns
  if fp8:
    narrow = Tiling(columns=128, depth=scales.BLOCK, slots=5, cluster=2)
    return narrow if wasteful else dataclasses.replace(narrow, columns=256, slots=4, late=False)
  return Tiling(rows=256, columns=128) if wasteful else Tiling(cluster=2)


def _panels(number, tall, wide, height):
  """(row, column) of tile `number`, in panels of `height` rows, down the columns of each."""
  panel = lax.div(number, _I32(height * wide))
  rest = number - panel * (height * wide)
  height_here = lax.min(tall - panel * height, _I32(height))
  column = lax.div(rest, height_here)
  return panel * height + (rest - column * height_here), column


def _rows_job(tiling, c, n, dtype, fp8, transposed) -> Job:
  steps, wide, own = c // tiling.depth, pl.cdiv(n, tiling.columns), tiling.own_rows
  pair = tiling.cluster == 2

  def tall(refs):
    return lax.div(refs[2][0, 0] + (tiling.cluster - 1), _I32(tiling.cluster))

  def locate(refs, number, rank):
    row, column = _panels(number, tall(refs), wide, PANEL // (tiling.rows * tiling.cluster))
    visit = 1 + row * tiling.cluster + rank
    tile = {key: refs[2][visit, i] for i, key in enumerate(gpu_schedule.VISIT)}
    tile |= {'column': column * tiling.columns, 'steps': tile['real'] * steps}
    if pair:
      # Both programs of a cluster load, so that they stay in step. Only visits to the same group share the weights.
      other = 1 + row * tiling.cluster + (1 - rank)
      tile['steps'] = lax.max(tile['real'], refs[2][other, 4]) * steps
      tile['same'] = (refs[2][other, 0] == tile['group']).astype(_I32)
    return tile

  def load(refs, tile, k, slot, ready):
    row, column = pl.multiple_of(tile['row8'] * 8, 8), pl.multiple_of(tile['column'], tiling.columns)
    chunk = pl.ds(k * tiling.depth, tiling.depth)
    plgpu.copy_gmem_to_smem(refs[0].at[pl.ds(row, tiling.rows), chunk], slot[0], ready)
    if fp8:
      plgpu.copy_gmem_to_smem(refs[3].at[k, pl.ds(row, tiling.rows)], slot[2], ready)
    columns = pl.ds(column, tiling.columns)
    weights = refs[1].at[tile['group'], columns, chunk] if transposed else refs[1].at[tile['group'], chunk, columns]
    fetch = functools.partial(plgpu.copy_gmem_to_smem, weights, slot[1], ready)
    if pair:
      pl.when(tile['same'] == 1)(lambda: fetch(collective_axes='rank'))
      pl.when(tile['same'] == 0)(fetch)
    else:
      fetch()

  def factors(slot, warpgroup, columns):
    rows = pl.ds(pl.multiple_of(warpgroup * own, 64), own)
    return slot[0].at[rows], _columns_of(slot[1], columns).T if transposed else slot[1]

  def live(tile, warpgroup):
    return (tile['real'] > 0) & (tile['last'] > warpgroup * own) & (tile['first'] < warpgroup * own + own)

  def keep(tile, warpgroup):
    whole = (tile['first'] <= warpgroup * own) & (tile['last'] >= warpgroup * own + own)
    return {'row8': tile['row8'], 'column': tile['column'], 'from_step': lax.select(whole, _I32(0), _I32(NEVER))}

  def target(out, where, row, rows, column, width):
    return out.at[pl.ds(row, rows), pl.ds(pl.multiple_of(where['column'], tiling.columns) + column, width)]

  def write(out, buffers, piece, where, row, column):
    def copy():
      buffers[0][...] = piece
      plgpu.commit_smem()
      first = pl.multiple_of(where['row8'] * 8 + row, 8)
      plgpu.copy_smem_to_gmem(buffers[0], target(out, where, first, 64, column, piece.shape[1]), commit_group=False)

    if 'first' in where:
      pl.when((where['first'] <= row) & (where['last'] >= row + 64))(copy)
    else:  # kept for later: whole
      copy()

  def write_part(whole, out, buffers, piece, tile, row, column):
    """The group's rows of a piece: a copy for each bit of their number."""
    first, last = (lax.clamp(_I32(0), tile[key] - row, _I32(64)) for key in ('first', 'last'))
    count = last - first

    @pl.when((count > 0) & (count < 64 + whole))
    def _():
      buffers[1][...] = piece
      plgpu.commit_smem()
      start = first
      for rows in (64, 32, 16, 8, 4, 2, 1)[not whole:]:
        there = target(out, tile, tile['row8'] * 8 + row + start, rows, column, piece.shape[1])
        mosaic_gpu.copy_where((count & rows) != 0, buffers[1].at[pl.ds(start, rows)], there)
        start = start + (count & rows)

  def row_scales(slot, warpgroup):
    return _vector(slot[2], warpgroup * own, own, mosaic_gpu.ROW), None

  def block_scales(refs, tile, k):
    blocks = pl.cdiv(n, scales.BLOCK)
    first = lax.div(tile['column'], _I32(scales.BLOCK))
    return [refs[4][tile['group'], k, lax.min(first + part, _I32(blocks - 1))]
            for part in range(tiling.columns // PART)]

  weights = (tiling.columns, tiling.depth) if transposed else (tiling.depth, tiling.columns)
  swizzle = 128 // dtype.itemsize
  slots = ((tiling.rows, tiling.depth), dtype, swizzle), (weights, dtype, swizzle)
  if fp8:
    slots += ((tiling.rows,), jnp.float32, None),
  scaling = {'scales': row_scales, 'scale': block_scales} if fp8 else {}
  return Job(slots, 2 + fp8, lambda refs: tall(refs) * wide, locate, load, factors, keep, write, write_part, live=live,
             **scaling)


def _columns_of(array_NC, columns):
  return array_NC if columns is None else array_NC.at[columns]


def _vector(array, start, size, layout):
  return plgpu.load(array.at[pl.ds(pl.multiple_of(start, 64), size)], layout=layout)


def _rhs_gradient_job(tiling, k, n, groups, dtype) -> Job:
  pair, depth, own, fp8 = tiling.cluster, tiling.depth, tiling.own_rows, dtype.itemsize == 1
  shared = 'rank' if pair > 1 else None
  tall, wide = pl.cdiv(k, tiling.rows * pair), pl.cdiv(n, tiling.columns)

  def locate(refs, number, rank):
    group = lax.div(number, _I32(tall * wide))
    row, column = _panels(number - group * (tall * wide), tall, wide, PANEL // (tiling.rows * pair))
    tile = {key: refs[2][group, i] for i, key in enumerate(gpu_schedule.GROUP)}
    return tile | {'row': (row * pair + rank) * tiling.rows, 'column': column * tiling.columns, 'steps': tile['chunks']}

  def chunk_of(tile, step):
    """The first chunk comes second: while others' rows in it are cleared, the one before it is multiplied."""
    return lax.select((tile['chunks'] > 2) & (step < 2), 1 - step, step)

  def load(refs, tile, k, slot, ready):
    lhs_columns = pl.ds(pl.multiple_of(tile['row'], tiling.rows), tiling.rows)
    dy_columns = pl.ds(pl.multiple_of(tile['column'], tiling.columns), tiling.columns)
    if not fp8:
      rows = pl.ds(pl.multiple_of(tile['row8'] * 8 + chunk_of(tile, k) * depth, 8), depth)
      plgpu.copy_gmem_to_smem(refs[0].at[rows, lhs_columns], slot[0], ready)
      plgpu.copy_gmem_to_smem(refs[1].at[rows, dy_columns], slot[1], ready, collective_axes=shared)
      return
    chunk = lax.div(tile['row8'], _I32(depth // 8)) + k
    plgpu.copy_gmem_to_smem(refs[0].at[chunk, lhs_columns], slot[0], ready)
    plgpu.copy_gmem_to_smem(refs[1].at[chunk, dy_columns], slot[1], ready, collective_axes=shared)
    plgpu.copy_gmem_to_smem(refs[3].at[chunk, lhs_columns], slot[2], ready)
    plgpu.copy_gmem_to_smem(refs[4].at[chunk, dy_columns], slot[3], ready)

  def own_columns(array, warpgroup, width):
    return array.at[:, pl.ds(pl.multiple_of(warpgroup * width, 64), width)]

  def factors(slot, warpgroup, columns):
    if fp8:
      return slot[0].at[pl.ds(pl.multiple_of(warpgroup * own, 64), own)], _columns_of(slot[1], columns).T
    return own_columns(slot[0], warpgroup, own).T, slot[1]

  def token_scales(slot, warpgroup):
    return _vector(slot[2], warpgroup * own, own, mosaic_gpu.ROW), plgpu.load(slot[3], layout=mosaic_gpu.COLUMN)

  def clear(tile, step, slot, warpgroup, cleared):
    start, bands = chunk_of(tile, step) * depth, depth // 8
    first, last = tile['first'] - start, tile['last'] - start

    def store(band, masked):
      for array in slot:  # both operands: 0 times another group's infinity is NaN
        rows = array.at[pl.ds(pl.multiple_of(band * 8, 8), 8)]
        value = plgpu.layout_cast(jnp.zeros(rows.shape, dtype), BAND)
        if masked:
          row = band * 8 + plgpu.broadcasted_iota(_I32, rows.shape, 0, layout=BAND)
          value = jnp.where((row >= first) & (row < last), plgpu.load(rows, layout=BAND), value)
        rows[...] = value

    @pl.when((first > 0) | (last < depth))
    def _():
      # In bands of 8 rows: others' rows may lie in the first and in `end`, and fill those after it.
      end = lax.clamp(_I32(1), lax.div(last, _I32(8)), _I32(bands))
      cut = warpgroup * end
      pl.when(cut < bands)(lambda: store(cut, masked=True))
      pl.loop(end + 1 + warpgroup, bands, step=2)(lambda band: store(band, masked=False))
      plgpu.commit_smem()
      plgpu.barrier_arrive(cleared)
      plgpu.barrier_wait(cleared)

  def keep(tile, _):
    return {key: tile[key] for key in ('group', 'row', 'column')} | {'from_step': _I32(0)}

  def write(out, buffers, piece, where, row, column):
    buffers[0][...] = piece
    plgpu.commit_smem()
    rows = pl.ds(pl.multiple_of(where['row'], tiling.rows) + row, 64)
    columns = pl.ds(pl.multiple_of(where['column'], tiling.columns) + column, piece.shape[1])
    plgpu.copy_smem_to_gmem(buffers[0], out.at[where['group'], rows, columns], commit_group=False)

  def tiles(_):
    return _I32(groups * tall * wide)

  if fp8:
    slots = (((tiling.rows, depth), dtype, 128), ((tiling.columns, depth), dtype, 128),
             ((tiling.rows,), jnp.float32, None), ((tiling.columns,), jnp.float32, None))
    return Job(slots, 4, tiles, locate, load, factors, keep, write, scales=token_scales, turning=True)
  slots = ((depth, tiling.rows), dtype, 64), ((depth, tiling.columns), dtype, 64)
  return Job(slots, 2, tiles, locate, load, factors, keep, write, clear=clear, turning=True)

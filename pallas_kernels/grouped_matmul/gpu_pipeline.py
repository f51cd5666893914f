"""A persistent matrix product on Hopper: the loop that the grouped matmul kernels share.

A program (one a streaming multiprocessor) has two warpgroups that multiply, each one half of a tile's rows, and a third
that loads by TMA into a ring of slots. It walks the tiles `program`, `program + programs`, ...,
and every other round of them backwards where a job is `turning`.

- Tiles of 128x256: wgmma's 64x256 reads the fewest bytes of shared memory per product, and the chip is at its power
  limit, so that bytes moved are time.
- Two programs with tiles side by side form a cluster and fetch what they share from L2 once (multicast).
- A tile's result stays in registers, rounded, and is written while the next tile is multiplied; with 2048 columns to
  contract, writing it at once costs 6% of the time. (Not so FP8 tiles 256 columns wide, whose sums and products fill
  the registers.)
- A tile's position is read one tile ahead.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu

NEVER = 1 << 30
PART = 128  # columns of a product in FP8


@dataclasses.dataclass(frozen=True)
class Tiling:
  """rows, columns: of a program's tile; depth: of the contraction, a slot; slots: of the ring; buffers: of 64x128 bytes
  for each warpgroup, through which results leave. cluster: programs that share loads. late: whether results of
  16 bits are written while the next tile is multiplied, for which they need registers; others never are."""

  rows: int = 128
  columns: int = 256
  depth: int = 64
  slots: int = 4
  buffers: int = 2
  cluster: int = 1
  late: bool = True

  @property
  def own_rows(self):
    """Rows of a warpgroup."""
    return self.rows // 2


@dataclasses.dataclass(frozen=True)
class Job:
  """What is multiplied. `refs` are the operands in GMEM; a tile is a dict of int32 scalars.

  tiles(refs): how many there are, those of a cluster counted once.
  locate(refs, number, rank): the tile of a cluster's program `rank`. 'steps': slots to load and multiply.
  load(refs, tile, k, slot, ready): starts the copies of step k into the slot's arrays; `loads` of them.
  factors(slot, warpgroup, columns): the two operands of wgmma; columns: a slice of the tile's, or None for all.
  keep(tile, warpgroup): what `write` needs to write the result later, and 'from_step': 0, or NEVER where it may not.
  write(out, buffers, piece, kept, row, column): copies a 64-row piece out; row and column count from the tile's first.
  write_part(whole, ...): the same for a piece of which not all rows are the tile's, given the tile, and with `whole`
    for one that is; called at once, never later. None: all rows of all tiles are theirs.
  live(tile, warpgroup): whether the warpgroup has anything to multiply; None: always.
  clear(tile, k, slot, warpgroup, cleared): sets to zero what does not belong to the tile. None: nothing.
  scales(slot, warpgroup): for FP8, what multiplies a step's product before it is added: a number a row, and a number a
    column or None. None: ones.
  scale(refs, tile, k): numbers in GMEM that multiply step k's product too, one for each `PART` columns; read a step
    ahead. None: ones.
  turning: whether every other round of tiles goes to the programs in the opposite order. Where tiles come by size, the
    program with the largest one of a round has the smallest one of the next.
  """

  slots: tuple[Any, ...]  # (shape, dtype, columns of a swizzle tile or None) of the arrays of a slot
  loads: int
  tiles: Any
  locate: Any
  load: Any
  factors: Any
  keep: Any
  write: Any
  write_part: Any = None
  live: Any = None
  clear: Any = None
  scales: Any = None
  scale: Any = None
  turning: bool = False


def run(job: Job, tiling: Tiling, operands, shape, dtype, *, name):
  """The product as an array; it varies over the manual mesh axes that the operands vary over."""
  programs = mosaic_gpu.multiprocessors(*operands) // tiling.cluster
  clustered = {'cluster': (tiling.cluster,), 'cluster_names': ('rank',)} if tiling.cluster > 1 else {}
  free = plgpu.Barrier(num_barriers=tiling.slots, num_arrivals=2)
  if clustered:
    free = plgpu.ClusterBarrier(collective_axes=('rank',), num_barriers=tiling.slots, num_arrivals=2)
  width = 128 // dtype.itemsize  # columns of a piece
  pieces = (2, tiling.buffers, 64, width)
  scratch = [
    *(plgpu.SMEM((tiling.slots, *s), d, transforms=_swizzled(swizzle) if swizzle else ())
      for s, d, swizzle in job.slots),
    # Two views: TMA takes whole pieces from the one and any number of rows from the other.
    plgpu.RefUnion(plgpu.SMEM(pieces, dtype, transforms=_swizzled(width)), plgpu.SMEM(pieces, dtype)),
    plgpu.Barrier(num_barriers=tiling.slots, num_arrivals=job.loads), free, plgpu.Barrier(num_arrivals=2)]
  axes = dispatch.varying_axes(*operands)
  operands = [dispatch.vary(x, axes) for x in operands]

  def body(*refs):
    inputs, out, scratch_refs = refs[:len(operands)], refs[len(operands)], refs[len(operands) + 1:]
    # Mosaic ignores the index of a dimension that holds one tile, where the slice is one tile: 64 columns past the end
    # of an array of 64 are those at its start. So pieces that lie past the end of every tile are left out.
    pieces = [(row, column) for row in range(0, tiling.own_rows, 64)
              for column in range(0, min(tiling.columns, shape[-1]), width)]
    _Program(job, tiling, programs, jnp.dtype(dtype), width, pieces, inputs, out, scratch_refs).run()

  body.__name__ = name  # in profiles
  return plgpu.kernel(
    body, out_type=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operands[0]).manual_axis_type),
    scratch_types=scratch, grid=(programs,), grid_names=('program',), num_threads=3, thread_name='warpgroup',
    **clustered, compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(*operands)


def _swizzled(columns):
  return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)


class _Program:
  """One program's part of the work."""

  def __init__(self, job, tiling, programs, dtype, width, pieces, refs, out, scratch):
    self.job, self.tiling, self.programs, self.dtype, self.width = job, tiling, programs, dtype, width
    self.pieces = pieces  # (row, column) of the 64 x `width` parts of a warpgroup's tile, in which results leave
    self.refs, self.out = refs, out
    *self.slots, self.buffers, self.ready, self.free, self.cleared = scratch
    self.late = tiling.late and dtype.itemsize == 2  # a float32 result and the next tile's sums do not both fit
    self.warpgroup, self.program = lax.axis_index('warpgroup'), lax.axis_index('program')
    self.rank = lax.axis_index('rank') if tiling.cluster > 1 else jnp.int32(0)

  def run(self):
    self.count = self.job.tiles(self.refs)
    self.own = lax.div(self.count - self.program + (self.programs - 1), jnp.int32(self.programs))
    pl.when(self.warpgroup < 2)(self.multiply)
    pl.when(self.warpgroup == 2)(self.load)

  def tile(self, i):
    place, begin = self.program, i * self.programs
    if self.job.turning:
      here = lax.min(self.count - begin, jnp.int32(self.programs))
      place = lax.select(lax.rem(i, jnp.int32(2)) == 1, here - 1 - place, place)
    return self.job.locate(self.refs, lax.min(place + begin, self.count - 1), self.rank)

  def slot(self, number):
    return [array.at[number] for array in self.slots]

  def after(self, slot):
    return lax.select(slot == self.tiling.slots - 1, jnp.int32(0), slot + 1)

  def before(self, slot):
    return lax.select(slot == 0, jnp.int32(self.tiling.slots - 1), slot - 1)

  def load(self):
    plgpu.set_max_registers(24, action='decrease')

    def step(tile, k, carry):
      slot, filled = carry
      pl.when(filled >= self.tiling.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
      self.job.load(self.refs, tile, k, self.slot(slot), self.ready.at[slot])
      return self.after(slot), lax.min(filled + 1, jnp.int32(self.tiling.slots))

    def one(i, carry):
      tile = self.tile(i)
      return lax.fori_loop(0, tile['steps'], lambda k, carry: step(tile, k, carry), carry)

    slot, filled = lax.fori_loop(0, self.own, one, (jnp.int32(0), jnp.int32(0)))

    # The other program of a cluster may not signal a barrier in the shared memory of a program that is gone.
    def wait(_, slot):
      plgpu.barrier_wait(self.free.at[slot])
      return self.after(slot)

    lax.fori_loop(0, filled, wait, lax.select(filled < self.tiling.slots, jnp.int32(0), slot))

  def multiply(self):
    plgpu.set_max_registers(240, action='increase')
    first = self.tile(jnp.int32(0))
    nothing = self.job.keep(first, self.warpgroup) | {'from_step': jnp.int32(NEVER)}
    previous = (self.zeros(self.dtype), nothing) if self.late else ()

    def one(i, carry):
      slot, tile, previous = carry
      ahead = self.tile(i + 1)
      live = True if self.job.live is None else self.job.live(tile, self.warpgroup)
      if live is True:
        result, slot = self.product(tile, slot, previous)
      else:
        result, slot = lax.cond(live, lambda: self.product(tile, slot, previous),
                                lambda: self.skip(tile, slot, previous))
      return slot, ahead, (result, self.job.keep(tile, self.warpgroup)) if self.late else ()

    _, _, previous = lax.fori_loop(0, self.own, one, (jnp.int32(0), first, previous))
    if self.late:
      self.write_now(*previous)
    plgpu.wait_smem_to_gmem(0)

  def product(self, tile, slot, previous):
    """(result to write later, next slot); what was to be written later is written on the way."""
    steps = tile['steps']
    sums, slot = self.scaled_sums(tile, slot, previous) if self.job.scales else self.sums(tile, slot, previous)
    if not self.late:
      self.write_all(sums, tile)
      return (), slot
    for j in range(len(self.pieces)):
      pl.when((j >= steps) & (previous[1]['from_step'] == 0))(lambda j=j: self.write(j, *previous))
    result = [x.astype(self.dtype) for x in sums]
    self.write_rest(result, tile)
    return result, slot

  def sums(self, tile, slot, previous):
    def accumulate(sums):
      def step(k, slot):
        plgpu.barrier_wait(self.ready.at[slot])
        if self.job.clear:
          self.job.clear(tile, k, self.slot(slot), self.warpgroup, self.cleared)
        plgpu.wgmma(sums, *self.job.factors(self.slot(slot), self.warpgroup, None))
        self.write_late(k, previous)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(self.free.at[self.before(slot)], predicate=k > 0)
        return self.after(slot)

      end = lax.fori_loop(0, tile['steps'], step, slot)
      result = sums[...]
      plgpu.barrier_arrive(self.free.at[self.before(end)], predicate=tile['steps'] > 0)
      return [result], end

    return pl.run_scoped(accumulate, plgpu.ACC((self.tiling.own_rows, self.tiling.columns), jnp.float32))

  def scaled_sums(self, tile, slot, previous):
    """Each step's product is scaled and added in float32: FP8 is summed in fewer bits (DeepSeek-V3, 3.3.2). `PART`
    columns at a time: the product of 256 would not fit beside their sums."""
    own, parts, steps = self.tiling.own_rows, range(0, self.tiling.columns, PART), tile['steps']

    def scale(k):
      return self.job.scale(self.refs, tile, k) if self.job.scale else ()

    def step(k, carry):
      slot, scale_here, sums = carry
      # A load takes longer than the product of a step.
      scale_ahead = scale(lax.min(k + 1, steps - 1))
      plgpu.barrier_wait(self.ready.at[slot])
      scale_M, scale_N = self.job.scales(self.slot(slot), self.warpgroup)

      def product_of(start):
        def multiply(product):
          plgpu.wgmma(product, *self.job.factors(self.slot(slot), self.warpgroup, pl.ds(start, PART)))
          if start == parts[0]:
            self.write_late(k, previous)
          return product[...]

        return pl.run_scoped(multiply, plgpu.ACC((own, PART), jnp.float32))

      new_sums = []
      for part, start in enumerate(parts):
        product = product_of(start)
        if start == parts[-1]:
          plgpu.barrier_arrive(self.free.at[slot])
        if scale_N is not None:
          product = product * lax.broadcast_in_dim(scale_N, product.shape, [1])
        scale_here_M = scale_M * scale_here[part] if self.job.scale else scale_M
        new_sums.append(sums[part] + product * lax.broadcast_in_dim(scale_here_M, product.shape, [0]))
      return self.after(slot), scale_ahead, new_sums

    slot, _, sums = lax.fori_loop(0, steps, step, (slot, scale(0), self.zeros(jnp.float32)))
    return sums, slot

  def skip(self, tile, slot, previous):
    """Passes over the tile's slots; its result, where it has rows, is zero."""
    def step(_, slot):
      plgpu.barrier_wait(self.ready.at[slot])
      plgpu.barrier_arrive(self.free.at[slot])
      return self.after(slot)

    slot = lax.fori_loop(0, tile['steps'], step, slot)
    if not self.late:
      self.write_all(self.zeros(self.dtype), tile)
      return (), slot
    self.write_now(*previous)
    self.write_rest(self.zeros(self.dtype), tile)
    return self.zeros(self.dtype), slot

  def zeros(self, dtype):
    """A tile's zeros, in arrays of as many columns as its sums'."""
    width = PART if self.job.scales else self.tiling.columns
    return [plgpu.layout_cast(jnp.zeros((self.tiling.own_rows, width), dtype), plgpu.Layout.WGMMA)
            for _ in range(0, self.tiling.columns, width)]

  def write_late(self, k, previous):
    if self.late:
      for j in range(len(self.pieces)):
        pl.when(k == j + previous[1]['from_step'])(lambda j=j: self.write(j, *previous))

  def write_now(self, result, kept):
    @pl.when(kept['from_step'] == 0)
    def _():
      for j in range(len(self.pieces)):
        self.write(j, result, kept)

  def write_rest(self, result, tile):
    if self.job.write_part:
      @pl.when(self.job.keep(tile, self.warpgroup)['from_step'] != 0)
      def _():
        # `write_part` for its whole pieces too: fewer branches. See `mosaic_gpu.copy_where`.
        for j in range(len(self.pieces)):
          self.write(j, result, tile, functools.partial(self.job.write_part, True))

  def write_all(self, result, tile):
    parts = [functools.partial(self.job.write_part, False)] if self.job.write_part else []
    for j in range(len(self.pieces)):
      self.write(j, result, tile, self.job.write, *parts)

  def write(self, j, result, where, *ways):
    row, column = self.pieces[j]
    part, column_of_part = divmod(column, result[0].shape[1])
    piece = result[part][row:row + 64, column_of_part:column_of_part + self.width].astype(self.dtype)
    buffers = [view.at[self.warpgroup, j % self.tiling.buffers] for view in self.buffers]
    plgpu.wait_smem_to_gmem(self.tiling.buffers - 1, wait_read_only=True)
    for way in ways or [self.job.write]:
      way(self.out, buffers, piece, where, self.warpgroup * self.tiling.own_rows + row, column)
    plgpu.commit_smem_to_gmem_group()

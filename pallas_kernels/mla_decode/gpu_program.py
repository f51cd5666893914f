"""One program of the latent decode kernel: 64 rows of queries against the keys of its part of the plan.

Warpgroup 0 (`left`) owns O[:, :half] and the scores of even blocks of 64 keys, warpgroup 1 (`right`) O[:, half:] and
those of odd blocks, warpgroup 2 loads. A step is a pair of blocks:

  left   scores of block 2i      weights * keys 2i       weights of 2i+1 (of right) * keys 2i+1, scores of 2i+2
  right  scores of block 2i+1    weights * keys 2i+1     weights of 2i (of left) * keys 2i,      scores of 2i+3

They tell each other the running maximum through `maxima` and their weights through the RoPE tiles of the keys, which
are dead once the scores are there.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode import schedule
from pallas_kernels.mla_decode.gpu_call import BLOCK, ROWS, Call, Refs
from pallas_kernels.mosaic_gpu import LOG2_E, LOWEST, MATRIX, ROW, across, any_in_warp, opaque_zero, raised, zeros

MERGE = 8  # partial results read at a time


def _accumulate(issue, *accumulators):
  """issue(*references) adds to them by wgmma; returns the sums after waiting for all of it."""
  return pl.run_state(lambda refs: issue(*refs))(tuple(plgpu.ACC.init(a) for a in accumulators))


def _columns(x_M, like_MN):
  return across(x_M, like_MN.shape, 0)


def _row_of(value):
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def _rescaled(m_old, m_new, o, l):
  def scale():
    shrink = jnp.exp2(m_old - m_new)
    return o * _columns(shrink, o), l * shrink

  return lax.cond(any_in_warp(m_new - m_old), scale, lambda: (o, l))


class Program:
  """Pieces of requests come one after the other; (request, step) pairs of the plan say where they begin and end."""

  def __init__(self, call: Call, refs: Refs):
    self.call, self.refs = call, refs
    self.score_scale = call.scale * LOG2_E
    self.warpgroup, self.part = lax.axis_index('wg'), lax.axis_index('part')
    member = lax.axis_index('member') if call.cluster > 1 else 0
    self.block = lax.axis_index('group') * call.cluster + member if call.groups > 1 else jnp.int32(member)
    self.semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((call.parts * call.blocks,)))
    self.first, self.first_step = refs.begin[self.part, 0], refs.begin[self.part, 1]
    self.last, self.last_step = refs.begin[self.part + 1, 0], refs.begin[self.part + 1, 1]
    self.segments = self.last - self.first + (self.last_step > 0).astype(jnp.int32)

  def run(self):
    # Registers of a thread, in the warpgroups that compute and in the one that loads; pages below a block are more
    # addresses.
    computing, loading = (240, 24) if self.call.copies == 1 else (216, 72)
    pl.when(self.warpgroup == 0)(lambda: self.consume(0, self.left, computing))
    pl.when(self.warpgroup == 1)(lambda: self.consume(1, self.right, computing))
    pl.when(self.warpgroup == 2)(lambda: self.load(loading))

  def segment(self, i):
    """(request, its length, its steps, first step here, end of the steps here)."""
    request = self.first + i
    length = self.refs.lengths[request]
    steps = lax.div(length + schedule.STEP_KEYS - 1, jnp.int32(schedule.STEP_KEYS))
    begin = jnp.where(i == 0, self.first_step, 0)
    end = jnp.where(request == self.last, self.last_step, steps)
    return request, length, steps, begin, end

  # What computes.

  def consume(self, side, work, registers):
    plgpu.set_max_registers(registers, action='increase')

    @pl.loop(0, self.segments)
    def _(i):
      request, length, steps, begin, end = self.segment(i)
      plgpu.barrier_wait(self.refs.q_ready)
      o, l, m = lax.cond(begin < end, lambda: work(length, begin, end),
                         lambda: (zeros(ROWS, self.call.half), _row_of(0.0), _row_of(LOWEST)))
      self.finish(o, l, m, side, request, (begin > 0) | (end < steps))

    self.merge(side)
    if self.call.cluster > 1:  # a program must not end while its neighbour may still arrive on its barriers
      plgpu.barrier_arrive(self.refs.done)
      plgpu.barrier_wait(self.refs.done)

  def left(self, length, begin, end):
    r, dtype = self.refs, self.call.dtype

    def scores(acc, z, last_free=None, load=True):
      pl.when(load)(lambda: plgpu.barrier_wait(r.k_ready.at[0]))
      plgpu.wgmma(acc, r.q_left.at[z], r.k_left.at[z].T)
      if last_free is not None:
        plgpu.wgmma_wait(1)
        self.free(last_free)
      pl.when(load)(lambda: plgpu.barrier_wait(r.k_ready2.at[0]))
      plgpu.wgmma(acc, r.q_right.at[z], r.k_right.at[z].T)
      plgpu.wgmma(acc, r.q_rope.at[z], r.k_rope.at[z].T)

    zero = opaque_zero()
    s, = _accumulate(lambda acc: scores(acc, zero), zeros(ROWS, BLOCK))

    def step(i, carry):
      o, s, l, m = carry
      zero = opaque_zero()
      s = self.masked(s, 2 * i, length)
      m0 = raised(m, s.max(axis=1) * self.score_scale)
      r.maxima[0] = m0
      plgpu.barrier_arrive(r.max0_told)
      p = jnp.exp2(s * self.score_scale - _columns(m0, s))
      o, l = _rescaled(m, m0, o, l)
      l = l + p.sum(axis=1)
      p16 = p.astype(dtype)
      self.clear_tail(r.k_left, 0, 2 * i, length)
      o, = _accumulate(lambda acc: plgpu.wgmma(acc, p16, r.k_left.at[zero]), o)
      self.free(0)
      plgpu.barrier_wait(r.max1_told)
      m1 = plgpu.load(r.maxima.at[1], layout=ROW)
      rise = any_in_warp(m1 - m0)

      def scale_weights():
        weights = p16.astype(jnp.float32)
        return (weights * _columns(jnp.exp2(m0 - m1), weights)).astype(dtype)

      r.k_rope[0] = lax.cond(rise, scale_weights, lambda: p16)  # this block's RoPE tile is dead
      plgpu.commit_smem()
      plgpu.barrier_arrive(r.weights0_told)
      o, l = _rescaled(m0, m1, o, l)
      self.clear_tail(r.k_left, 1, 2 * i + 1, length)
      plgpu.barrier_wait(r.weights1_told)

      def second(o_acc, s_acc):
        plgpu.wgmma(o_acc, r.k_rope.at[zero + 1], r.k_left.at[zero + 1])
        scores(s_acc, zero, last_free=2, load=i + 1 < end)

      o, s = _accumulate(second, o, zeros(ROWS, BLOCK))
      return o, s, l, m1

    o, _, l, m = lax.fori_loop(begin, end, step, (zeros(ROWS, self.call.half), s, _row_of(0.0), _row_of(LOWEST)))
    return o, l, m

  def right(self, length, begin, end):
    r, dtype = self.refs, self.call.dtype

    def scores(acc, z, load=True):
      pl.when(load)(lambda: plgpu.barrier_wait(r.k_ready.at[1]))
      plgpu.wgmma(acc, r.q_right.at[z], r.k_right.at[z + 1].T)
      pl.when(load)(lambda: plgpu.barrier_wait(r.k_ready2.at[1]))
      plgpu.wgmma(acc, r.q_left.at[z], r.k_left.at[z + 1].T)
      plgpu.wgmma(acc, r.q_rope.at[z], r.k_rope.at[z + 1].T)

    zero = opaque_zero()
    s, = _accumulate(lambda acc: scores(acc, zero), zeros(ROWS, BLOCK))

    def step(i, carry):
      o, s, l, m = carry
      zero = opaque_zero()
      s = self.masked(s, 2 * i + 1, length)
      top = s.max(axis=1) * self.score_scale
      plgpu.barrier_wait(r.max0_told)
      m0 = plgpu.load(r.maxima.at[0], layout=ROW)
      m1 = raised(m0, top)
      r.maxima[1] = m1
      plgpu.barrier_arrive(r.max1_told)
      p = jnp.exp2(s * self.score_scale - _columns(m1, s))
      p16 = p.astype(dtype)
      r.k_rope[1] = p16
      o, l = _rescaled(m, m1, o, l)
      l = l + p.sum(axis=1)
      self.clear_tail(r.k_right, 1, 2 * i + 1, length)
      self.clear_tail(r.k_right, 0, 2 * i, length)
      plgpu.commit_smem()

      def values(acc):
        plgpu.wgmma(acc, p16, r.k_right.at[zero + 1])
        plgpu.barrier_wait(r.weights0_told)
        plgpu.wgmma(acc, r.k_rope.at[zero], r.k_right.at[zero])
        plgpu.barrier_arrive(r.weights1_told)
        plgpu.wgmma_wait(1)
        self.free(3)

      o, = _accumulate(values, o)
      self.free(1)
      s, = _accumulate(lambda acc: scores(acc, zero, load=i + 1 < end), zeros(ROWS, BLOCK))
      return o, s, l, m1

    o, _, l, m = lax.fori_loop(begin, end, step, (zeros(ROWS, self.call.half), s, _row_of(0.0), _row_of(LOWEST)))
    return o, l, m

  def masked(self, s, key_block, length):
    """Scores of keys the row does not see become -inf: past the length, or newer than the row's token."""
    t = self.call.t

    def masked():
      key = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=MATRIX) + key_block * BLOCK
      limit = length
      if t > 1:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0, layout=MATRIX) + self.block * ROWS
        limit = length - t + 1 + lax.div(row, jnp.full_like(row, self.call.heads))
      return jnp.where(key < limit, s, -jnp.inf)

    return lax.cond((key_block + 1) * BLOCK > length - t + 1, masked, lambda: s)

  def clear_tail(self, k, slot, key_block, length):
    """Rows past the length become zero in this warpgroup's half of a block."""
    @pl.when((key_block + 1) * BLOCK > length)
    def _():
      for column in range(0, self.call.half, 64):
        tile = k.at[slot, :, pl.ds(column, 64)]
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=MATRIX) + key_block * BLOCK
        kept = plgpu.load(tile, layout=MATRIX, optimized=False)
        tile[...] = jnp.where(row < length, kept, jnp.zeros_like(kept))
      plgpu.commit_smem()

  def free(self, i):
    if self.call.cluster > 1:
      # One thread of the warpgroup arrives for all four warps: they must all be past their reads.
      plgpu.commit_smem()
    plgpu.barrier_arrive(self.refs.k_free.at[i])

  def finish(self, o, l, m, side, request, split):
    """Writes a piece's result: where others share the request, in float32 for `merge`."""
    r, block = self.refs, self.block
    r.sums[side] = l
    plgpu.barrier_arrive(r.sums_told)
    plgpu.barrier_wait(r.sums_told)
    total = plgpu.load(r.sums.at[0], layout=ROW) + plgpu.load(r.sums.at[1], layout=ROW)
    some = total > 0
    o = o * _columns(1 / jnp.where(some, total, 1.0), o)
    lse2 = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), -jnp.inf)
    columns = pl.ds(side * self.call.half, self.call.half)

    @pl.when(split)
    def _():
      slot = 2 * self.part + (request != self.first).astype(jnp.int32)
      r.part_o[slot, pl.ds(block * ROWS, ROWS), columns] = o
      if side == 0:
        r.part_lse[slot, pl.ds(block * ROWS, ROWS)] = lse2
      plgpu.commit_smem()  # all threads have stored before one of them signals
      pl.semaphore_signal(self.semaphores.at[r.parts[request, 0] * self.call.blocks + block])

    @pl.when(jnp.logical_not(split))
    def _():
      staged = r.q_left if side == 0 else r.q_right  # the queries are dead after the last scores
      staged[0] = o.astype(self.call.dtype)
      if side == 0:
        r.maxima[0] = lse2 * (1 / LOG2_E)
      plgpu.commit_smem()
      rows = self.call.tile_rows
      here = pl.ds(block * ROWS, rows)
      plgpu.copy_smem_to_gmem(staged.at[0, pl.ds(0, rows)], r.o.at[request, here, columns])
      if side == 0:
        plgpu.copy_smem_to_gmem(r.maxima.at[0, pl.ds(0, rows)], r.lse.at[request, here])
      plgpu.wait_smem_to_gmem(0)

    plgpu.barrier_arrive(r.q_free)

  def merge(self, side):
    """Both ends of this part may be pieces of requests shared with other parts: sum them, each part its rows."""
    r, call, block = self.refs, self.call, self.block
    row_layout = plgpu.Layout.WG_STRIDED((call.value_width,), call.value_width // 128)

    def request_of(i):
      request, _, steps, begin, end = self.segment(i)
      split = (begin > 0) | (end < steps)

      @pl.when(split)
      def _():
        lo, hi = r.parts[request, 0], r.parts[request, 1]
        pl.semaphore_wait(self.semaphores.at[lo * call.blocks + block], 2 * (hi - lo + 1), decrement=False)
        slot0 = 2 * lo + (r.begin[lo, 0] != request).astype(jnp.int32)
        sharers = 2 * (hi - lo + 1)
        own = jnp.minimum(call.tile_rows, call.rows - block * ROWS)  # the last tile may have fewer

        @pl.loop(0, lax.div(own - (2 * (self.part - lo) + side) + sharers - 1, sharers))
        def _(j):
          row = block * ROWS + 2 * (self.part - lo) + side + j * sharers

          def some(c, carry):
            top, total, o = carry
            pieces = [lo + c * MERGE + u for u in range(MERGE)]
            slots = [jnp.where(p == lo, slot0, 2 * jnp.minimum(p, hi)) for p in pieces]
            lse2 = [jnp.where(p <= hi, r.part_lse[s, row], -jnp.inf) for p, s in zip(pieces, slots, strict=True)]
            rows_C = [plgpu.load(r.part_o.at[s, row], layout=row_layout, optimized=False) for s in slots]
            new = functools.reduce(jnp.maximum, lse2, top)
            shrink = jnp.exp2(top - new)
            weights = [jnp.exp2(x - new) for x in lse2]
            total = total * shrink + sum(weights)
            o = o * shrink
            for w, x in zip(weights, rows_C, strict=True):
              o = o + x * w
            return new, total, o

          o0 = plgpu.layout_cast(jnp.zeros((call.value_width,), jnp.float32), row_layout)
          top, total, o = lax.fori_loop(0, lax.div(hi - lo + MERGE, jnp.int32(MERGE)), some,
                                        (jnp.float32(LOWEST), jnp.float32(0), o0))
          seen = total > 0
          total = jnp.where(seen, total, 1.0)
          r.o[request, row] = (o * (1 / total)).astype(call.dtype)
          r.lse[request, row] = jnp.where(seen, (top + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)

    pl.when(self.segments > 0)(lambda: request_of(jnp.int32(0)))
    pl.when(self.segments > 1)(lambda: request_of(self.segments - 1))

  # What loads.

  def load(self, registers):
    r, half, rope = self.refs, self.call.half, self.call.rope
    plgpu.set_max_registers(registers, action='decrease')

    def run(i, loaded):
      request, length, _, begin, end = self.segment(i)

      def load_keys(j):
        second = (2 * j + 1) * BLOCK < length
        even, odd = self.pages_of(request, 2 * j), self.pages_of(request, 2 * j + 1)

        def when_free(b):
          pl.when(loaded + j - begin > 0)(lambda: plgpu.barrier_wait(r.k_free.at[b]))

        when_free(0)
        self.load_block(even, 2 * j, True, r.k_left, 0, 0, half, r.k_ready.at[0])
        when_free(3)
        self.load_block(odd, 2 * j + 1, second, r.k_right, 1, half, half, r.k_ready.at[1])
        when_free(1)
        self.load_block(even, 2 * j, True, r.k_right, 0, half, half, r.k_ready2.at[0])
        self.load_block(even, 2 * j, True, r.k_rope, 0, 2 * half, rope, r.k_ready2.at[0])
        when_free(2)
        self.load_block(odd, 2 * j + 1, second, r.k_left, 1, 0, half, r.k_ready2.at[1])
        self.load_block(odd, 2 * j + 1, second, r.k_rope, 1, 2 * half, rope, r.k_ready2.at[1])

      # The first keys before the queries, whose place the last request's output still passes through.
      pl.when(begin < end)(lambda: load_keys(begin))
      pl.when(i > 0)(lambda: plgpu.barrier_wait(r.q_free))
      rows = self.call.tile_rows
      here = pl.ds(self.block * ROWS, rows)
      for tile, column, columns in ((r.q_left, 0, half), (r.q_right, half, half), (r.q_rope, 2 * half, rope)):
        plgpu.copy_gmem_to_smem(r.q.at[request, here, pl.ds(column, columns)], tile.at[0, pl.ds(0, rows)], r.q_ready)
      pl.loop(begin + 1, end)(load_keys)
      return loaded + jnp.maximum(end - begin, 0)

    lax.fori_loop(0, self.segments, run, jnp.int32(0))

  def pages_of(self, request, key_block):
    """The pages that a block's copies read; a look-up takes longer than a wait, so it comes before the waits."""
    page = self.call.page
    indices = [lax.div(key_block * BLOCK + c * page, jnp.int32(page)) for c in range(self.call.copies)]
    return [jnp.clip(self.refs.table[request, jnp.minimum(i, self.call.max_pages - 1)], 0, self.call.num_pages - 1)
            for i in indices]

  def load_block(self, physical, key_block, exists, k, slot, column, columns, ready):
    """The copies of a block into one tile; a block past the request's last is not read, only reported."""
    page = self.call.page
    size = min(page, BLOCK)
    source_rows = pl.ds(lax.rem(key_block * BLOCK, jnp.int32(page)) if page > BLOCK else 0, size)

    @pl.when(exists)
    def _():
      for c, p in enumerate(physical):
        plgpu.copy_gmem_to_smem(self.refs.pages.at[p, source_rows, pl.ds(column, columns)],
                                k.at[slot, pl.ds(c * size, size)], ready,
                                collective_axes='member' if self.call.cluster > 1 else None)

    @pl.when(jnp.logical_not(exists))
    def _():
      for _ in physical:
        plgpu.barrier_arrive(ready)

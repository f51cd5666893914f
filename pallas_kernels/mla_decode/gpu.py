"""Latent attention over a paged cache on Hopper (Mosaic GPU): keys and values are one tile in shared memory.

A program holds 64 rows, a row being one head of one query token, and walks the keys of its requests two blocks of 64
at a time. The output accumulator, 64 x 512 float32, fills half of the register file, so two warpgroups share it by
columns: `left` owns O[:, :256] and the scores of even blocks, `right` owns O[:, 256:] and those of odd blocks; they
exchange weights and running maxima through shared memory. While one computes exponentials the other multiplies. A
third warpgroup loads by TMA. (FlashMLA's schedule, github.com/deepseek-ai/FlashMLA, here for any page size, several
query tokens and any split.)

Ours:
- Rows that read the same keys form a cluster of two programs; each block is fetched once from L2 for both (multicast).
- Each program runs one piece of `schedule.Plan`, and programs that share a request wait for each other at the end and
  merge their float32 partial results, each its share of the rows: one launch, no second kernel. All programs are on
  the chip at once (one a streaming multiprocessor), so the wait ends.
- The tail of the last block is cleared in shared memory: unused cache rows may hold NaN, and 0 * NaN is NaN.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.mla_decode import schedule
from pallas_kernels.mosaic_gpu import MATRIX, ROW, TILES, across, any_in_warp, multiprocessors, opaque_zero, zeros

ROWS = BLOCK = 64
MERGE = 8  # partial results read at a time
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of a running maximum: finite, so that exp2 of a masked score minus it is 0 and not NaN
LAZY = 8.0  # how far, in powers of two, a score may exceed the running maximum before that follows


def _blocks(rows: int) -> int:
  return -(-rows // ROWS)


def make_plan(lengths_B, rows: int) -> schedule.Plan:
  """For rows = T * N: one program a streaming multiprocessor, those of the same keys in one part."""
  return schedule.make(lengths_B, _most_parts(lengths_B, rows))


def _most_parts(operand, rows: int) -> int:
  return max(1, multiprocessors(operand) // _blocks(rows))


def unsuitable(q_BTNJ, pages_PSJ, *, value_width) -> str | None:
  """What about the operands this kernel does not serve, or None."""
  if reason := dispatch.divided(q_BTNJ, pages_PSJ):
    return reason
  width, page = pages_PSJ.shape[2], pages_PSJ.shape[1]
  if not q_BTNJ.dtype == pages_PSJ.dtype == jnp.bfloat16:
    return f'it takes bfloat16 and queries are {q_BTNJ.dtype}, the cache {pages_PSJ.dtype}'
  if value_width not in (128, 256, 512) or width - value_width != 64:
    return (f'it takes a latent of 128, 256 or 512 and a RoPE width of 64, and these are {value_width} and '
            f'{width - value_width}')
  if page not in (16, 32) and page % BLOCK:
    return f'it takes pages of 16, 32 or a multiple of {BLOCK} tokens and these have {page}'
  rows, most = q_BTNJ.shape[1] * q_BTNJ.shape[2], multiprocessors(q_BTNJ) * ROWS
  if rows > most:
    return f'it takes up to {most} rows (query tokens x heads) and these are {rows}'
  return None


def mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, plan, scale, value_width):
  batch, t, heads, width = q_BTNJ.shape
  rows = t * heads
  lengths_B = lengths_B.astype(jnp.int32)
  q_BMJ = q_BTNJ.reshape(batch, rows, width)
  padded = -(-rows // 8) * 8  # TMA writes whole swizzle tiles of 8 rows
  # The maximum of scores is that of scale * scores only where scale > 0: its sign, or its being 0, goes to the queries.
  if scale <= 0:
    q_BMJ, scale = q_BMJ * np.sign(scale).astype(q_BMJ.dtype), abs(scale) or 1.0
  q_BMJ = jnp.pad(q_BMJ, ((0, 0), (0, padded - rows), (0, 0)))
  plan = make_plan(lengths_B, rows) if plan is None else plan
  parts, most = len(plan.begin_P2) - 1, _most_parts(q_BTNJ, rows)
  # Programs that share a request wait for each other: all of them must be on the chip at once.
  if parts > most or len(plan.parts_B2) != batch:
    raise ValueError(f'mla_decode: the plan is of {parts} parts for {len(plan.parts_B2)} sequences, and this call '
                     f'takes at most {most} for {batch}; make it with make_plan(lengths, tokens={t}, heads={heads})')
  kernel = _kernel(batch, padded, t, heads, width, value_width, pages_PSJ.shape, table_BP.shape[1],
                   parts, q_BTNJ.dtype.name, scale)
  # One after the other under vmap: a launch's programs find each other by semaphores that a second one would share.
  kernel = jax.custom_batching.sequential_vmap(kernel)
  o_BMC, lse_BM, *_ = kernel(q_BMJ, pages_PSJ, table_BP.astype(jnp.int32), lengths_B, *plan)
  outputs = o_BMC[:, :rows].reshape(batch, t, heads, value_width), lse_BM[:, :rows].reshape(batch, t, heads)
  return dispatch.vary(outputs, dispatch.varying_axes(q_BTNJ))


def _accumulate(issue, *accumulators):
  """issue(*references) adds to them by wgmma; returns the sums after waiting for all of it."""
  return pl.run_state(lambda refs: issue(*refs))(tuple(plgpu.ACC.init(a) for a in accumulators))


def _columns(x_M, like_MN):
  return across(x_M, like_MN.shape, 0)


@functools.cache
def _kernel(batch, rows, t, heads, width, value_width, pages_shape, max_pages, parts, dtype, scale):
  blocks = _blocks(rows)
  cluster = 2 if blocks % 2 == 0 else 1
  groups = blocks // cluster
  half, rope = value_width // 2, width - value_width
  num_pages, page = pages_shape[:2]
  copies = max(1, BLOCK // page)
  score_scale = scale * LOG2_E
  dtype = jnp.dtype(dtype)
  merged = min(rows, ROWS)
  row_layout = plgpu.Layout.WG_STRIDED((value_width,), value_width // 128)
  # Of a thread, in the warpgroups that compute and in the one that loads; pages below a block are more addresses.
  registers = (240, 24) if copies == 1 else (216, 72)

  def body(q_g, kv_g, table_g, lengths_g, begin_g, parts_g, o_g, lse_g, part_o_g, part_lse_g,
           q_left, q_right, q_rope, k_left, k_right, k_rope, max_s, sum_s,
           q_ready, q_free, k_ready, k_ready2, k_free, b_max0, b_max1, b_p0, b_p1, b_sum, done):
    wg, part = lax.axis_index('wg'), lax.axis_index('part')
    member = lax.axis_index('member') if cluster > 1 else 0
    block = lax.axis_index('group') * cluster + member if groups > 1 else jnp.int32(member)
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((parts * blocks,)))
    first, first_step = begin_g[part, 0], begin_g[part, 1]
    last, last_step = begin_g[part + 1, 0], begin_g[part + 1, 1]
    segments = last - first + (last_step > 0).astype(jnp.int32)

    def segment(i):
      """(request, its length, its steps, first step here, end of the steps here)."""
      request = first + i
      length = lengths_g[request]
      steps = lax.div(length + schedule.STEP_KEYS - 1, jnp.int32(schedule.STEP_KEYS))
      begin = jnp.where(i == 0, first_step, 0)
      end = jnp.where(request == last, last_step, steps)
      return request, length, steps, begin, end

    def raised(m, top):
      """The running maximum. Left alone while no score is above it by 2^8: weights stay below 2^8 then, which costs no
      precision, and the accumulator needs no rescaling (FlashAttention-4's rule)."""
      return jnp.where(top > m + LAZY, top, m)

    def rescaled(m_old, m_new, o, l):
      def scale():
        shrink = jnp.exp2(m_old - m_new)
        return o * _columns(shrink, o), l * shrink

      return lax.cond(any_in_warp(m_new - m_old), scale, lambda: (o, l))

    def row_of(value):
      return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)

    def mask(s, key_block, length):
      """Scores of keys the row does not see become -inf: past the length, or newer than the row's token."""
      def masked():
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=MATRIX) + key_block * BLOCK
        limit = length
        if t > 1:
          row = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0, layout=MATRIX) + block * ROWS
          limit = length - t + 1 + lax.div(row, jnp.full_like(row, heads))
        return jnp.where(key < limit, s, -jnp.inf)

      return lax.cond((key_block + 1) * BLOCK > length - t + 1, masked, lambda: s)

    def clear_tail(k, slot, key_block, length):
      """Rows past the length become zero in this warpgroup's half of a block."""
      @pl.when((key_block + 1) * BLOCK > length)
      def _():
        for column in range(0, half, 64):
          tile = k.at[slot, :, pl.ds(column, 64)]
          row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=MATRIX) + key_block * BLOCK
          kept = plgpu.load(tile, layout=MATRIX, optimized=False)
          tile[...] = jnp.where(row < length, kept, jnp.zeros_like(kept))
        plgpu.commit_smem()

    def free(i):
      if cluster > 1:
        # One thread of the warpgroup arrives for all four warps: they must all be past their reads.
        plgpu.commit_smem()
      plgpu.barrier_arrive(k_free.at[i])

    def epilogue(o, l, m, side, request, split):
      sum_s[side] = l
      plgpu.barrier_arrive(b_sum)
      plgpu.barrier_wait(b_sum)
      total = plgpu.load(sum_s.at[0], layout=ROW) + plgpu.load(sum_s.at[1], layout=ROW)
      some = total > 0
      o = o * _columns(1 / jnp.where(some, total, 1.0), o)
      lse2 = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), -jnp.inf)
      columns = pl.ds(side * half, half)

      @pl.when(split)
      def _():
        slot = 2 * part + (request != first).astype(jnp.int32)
        part_o_g[slot, pl.ds(block * ROWS, ROWS), columns] = o
        if side == 0:
          part_lse_g[slot, pl.ds(block * ROWS, ROWS)] = lse2
        plgpu.commit_smem()  # all threads have stored before one of them signals
        pl.semaphore_signal(semaphores.at[parts_g[request, 0] * blocks + block])

      @pl.when(jnp.logical_not(split))
      def _():
        staged = q_left if side == 0 else q_right  # the queries are dead after the last scores
        staged[0] = o.astype(dtype)
        if side == 0:
          max_s[0] = lse2 * (1 / LOG2_E)
        plgpu.commit_smem()
        here = pl.ds(block * ROWS, merged)
        plgpu.copy_smem_to_gmem(staged.at[0, pl.ds(0, merged)], o_g.at[request, here, columns])
        if side == 0:
          plgpu.copy_smem_to_gmem(max_s.at[0, pl.ds(0, merged)], lse_g.at[request, here])
        plgpu.wait_smem_to_gmem(0)

      plgpu.barrier_arrive(q_free)

    def merge(side):
      """Both ends of this part may be pieces of requests shared with other parts: sum them, each part its rows."""
      def request_of(i):
        request, _, steps, begin, end = segment(i)
        split = (begin > 0) | (end < steps)

        @pl.when(split)
        def _():
          lo, hi = parts_g[request, 0], parts_g[request, 1]
          pl.semaphore_wait(semaphores.at[lo * blocks + block], 2 * (hi - lo + 1), decrement=False)
          slot0 = 2 * lo + (begin_g[lo, 0] != request).astype(jnp.int32)
          sharers = 2 * (hi - lo + 1)
          own = jnp.minimum(merged, rows - block * ROWS)  # the last block may have fewer

          @pl.loop(0, lax.div(own - (2 * (part - lo) + side) + sharers - 1, sharers))
          def _(j):
            row = block * ROWS + 2 * (part - lo) + side + j * sharers

            def some(c, carry):
              top, total, o = carry
              pieces = [lo + c * MERGE + u for u in range(MERGE)]
              slots = [jnp.where(p == lo, slot0, 2 * jnp.minimum(p, hi)) for p in pieces]
              lse2 = [jnp.where(p <= hi, part_lse_g[s, row], -jnp.inf) for p, s in zip(pieces, slots, strict=True)]
              rows_C = [plgpu.load(part_o_g.at[s, row], layout=row_layout,
                                   optimized=False) for s in slots]
              new = functools.reduce(jnp.maximum, lse2, top)
              shrink = jnp.exp2(top - new)
              weights = [jnp.exp2(x - new) for x in lse2]
              total = total * shrink + sum(weights)
              o = o * shrink
              for w, x in zip(weights, rows_C, strict=True):
                o = o + x * w
              return new, total, o

            o0 = plgpu.layout_cast(jnp.zeros((value_width,), jnp.float32), row_layout)
            top, total, o = lax.fori_loop(0, lax.div(hi - lo + MERGE, jnp.int32(MERGE)), some,
                                          (jnp.float32(LOWEST), jnp.float32(0), o0))
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            o_g[request, row] = (o * (1 / total)).astype(dtype)
            lse_g[request, row] = jnp.where(seen, (top + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)

      pl.when(segments > 0)(lambda: request_of(jnp.int32(0)))
      pl.when(segments > 1)(lambda: request_of(segments - 1))

    def consumer(side, work):
      plgpu.set_max_registers(registers[0], action='increase')

      @pl.loop(0, segments)
      def _(i):
        request, length, steps, begin, end = segment(i)
        plgpu.barrier_wait(q_ready)
        o, l, m = lax.cond(begin < end, lambda: work(length, begin, end),
                           lambda: (zeros(ROWS, half), row_of(0.0), row_of(LOWEST)))
        epilogue(o, l, m, side, request, (begin > 0) | (end < steps))

      merge(side)
      if cluster > 1:  # a program must not end while its neighbour may still arrive on its barriers
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    def left(length, begin, end):
      def scores(acc, z, last_free=None, load=True):
        pl.when(load)(lambda: plgpu.barrier_wait(k_ready.at[0]))
        plgpu.wgmma(acc, q_left.at[z], k_left.at[z].T)
        if last_free is not None:
          plgpu.wgmma_wait(1)
          free(last_free)
        pl.when(load)(lambda: plgpu.barrier_wait(k_ready2.at[0]))
        plgpu.wgmma(acc, q_right.at[z], k_right.at[z].T)
        plgpu.wgmma(acc, q_rope.at[z], k_rope.at[z].T)

      zero = opaque_zero()
      s, = _accumulate(lambda acc: scores(acc, zero), zeros(ROWS, BLOCK))

      def step(i, carry):
        o, s, l, m = carry
        zero = opaque_zero()
        s = mask(s, 2 * i, length)
        m0 = raised(m, s.max(axis=1) * score_scale)
        max_s[0] = m0
        plgpu.barrier_arrive(b_max0)
        p = jnp.exp2(s * score_scale - _columns(m0, s))
        o, l = rescaled(m, m0, o, l)
        l = l + p.sum(axis=1)
        p16 = p.astype(dtype)
        clear_tail(k_left, 0, 2 * i, length)
        o, = _accumulate(lambda acc: plgpu.wgmma(acc, p16, k_left.at[zero]), o)
        free(0)
        plgpu.barrier_wait(b_max1)
        m1 = plgpu.load(max_s.at[1], layout=ROW)
        rise = any_in_warp(m1 - m0)

        def scale_weights():
          weights = p16.astype(jnp.float32)
          return (weights * _columns(jnp.exp2(m0 - m1), weights)).astype(dtype)

        k_rope[0] = lax.cond(rise, scale_weights, lambda: p16)  # this block's RoPE tile is dead
        plgpu.commit_smem()
        plgpu.barrier_arrive(b_p0)
        o, l = rescaled(m0, m1, o, l)
        clear_tail(k_left, 1, 2 * i + 1, length)
        plgpu.barrier_wait(b_p1)

        def second(o_acc, s_acc):
          plgpu.wgmma(o_acc, k_rope.at[zero + 1], k_left.at[zero + 1])
          scores(s_acc, zero, last_free=2, load=i + 1 < end)

        o, s = _accumulate(second, o, zeros(ROWS, BLOCK))
        return o, s, l, m1

      o, _, l, m = lax.fori_loop(begin, end, step, (zeros(ROWS, half), s, row_of(0.0), row_of(LOWEST)))
      return o, l, m

    def right(length, begin, end):
      def scores(acc, z, load=True):
        pl.when(load)(lambda: plgpu.barrier_wait(k_ready.at[1]))
        plgpu.wgmma(acc, q_right.at[z], k_right.at[z + 1].T)
        pl.when(load)(lambda: plgpu.barrier_wait(k_ready2.at[1]))
        plgpu.wgmma(acc, q_left.at[z], k_left.at[z + 1].T)
        plgpu.wgmma(acc, q_rope.at[z], k_rope.at[z + 1].T)

      zero = opaque_zero()
      s, = _accumulate(lambda acc: scores(acc, zero), zeros(ROWS, BLOCK))

      def step(i, carry):
        o, s, l, m = carry
        zero = opaque_zero()
        s = mask(s, 2 * i + 1, length)
        top = s.max(axis=1) * score_scale
        plgpu.barrier_wait(b_max0)
        m0 = plgpu.load(max_s.at[0], layout=ROW)
        m1 = raised(m0, top)
        max_s[1] = m1
        plgpu.barrier_arrive(b_max1)
        p = jnp.exp2(s * score_scale - _columns(m1, s))
        p16 = p.astype(dtype)
        k_rope[1] = p16
        o, l = rescaled(m, m1, o, l)
        l = l + p.sum(axis=1)
        clear_tail(k_right, 1, 2 * i + 1, length)
        clear_tail(k_right, 0, 2 * i, length)
        plgpu.commit_smem()

        def values(acc):
          plgpu.wgmma(acc, p16, k_right.at[zero + 1])
          plgpu.barrier_wait(b_p0)
          plgpu.wgmma(acc, k_rope.at[zero], k_right.at[zero])
          plgpu.barrier_arrive(b_p1)
          plgpu.wgmma_wait(1)
          free(3)

        o, = _accumulate(values, o)
        free(1)
        s, = _accumulate(lambda acc: scores(acc, zero, load=i + 1 < end), zeros(ROWS, BLOCK))
        return o, s, l, m1

      o, _, l, m = lax.fori_loop(begin, end, step, (zeros(ROWS, half), s, row_of(0.0), row_of(LOWEST)))
      return o, l, m

    def pages_of(request, key_block):
      """The pages that a block's copies read; a look-up takes longer than a wait, so it comes before the waits."""
      indices = [lax.div(key_block * BLOCK + c * page, jnp.int32(page)) for c in range(copies)]
      return [jnp.clip(table_g[request, jnp.minimum(i, max_pages - 1)], 0, num_pages - 1) for i in indices]

    def load_block(physical, key_block, exists, k, slot, column, columns, ready):
      """The copies of a block into one tile; a block past the request's last is not read, only reported."""
      size = min(page, BLOCK)
      source_rows = pl.ds(lax.rem(key_block * BLOCK, jnp.int32(page)) if page > BLOCK else 0, size)

      @pl.when(exists)
      def _():
        for c, p in enumerate(physical):
          plgpu.copy_gmem_to_smem(kv_g.at[p, source_rows, pl.ds(column, columns)],
                                  k.at[slot, pl.ds(c * size, size)], ready,
                                  collective_axes='member' if cluster > 1 else None)

      @pl.when(jnp.logical_not(exists))
      def _():
        for _ in physical:
          plgpu.barrier_arrive(ready)

    def producer():
      plgpu.set_max_registers(registers[1], action='decrease')

      def run(i, loaded):
        request, length, _, begin, end = segment(i)

        def load_keys(j):
          second = (2 * j + 1) * BLOCK < length
          even, odd = pages_of(request, 2 * j), pages_of(request, 2 * j + 1)

          def when_free(b):
            pl.when(loaded + j - begin > 0)(lambda: plgpu.barrier_wait(k_free.at[b]))

          when_free(0)
          load_block(even, 2 * j, True, k_left, 0, 0, half, k_ready.at[0])
          when_free(3)
          load_block(odd, 2 * j + 1, second, k_right, 1, half, half, k_ready.at[1])
          when_free(1)
          load_block(even, 2 * j, True, k_right, 0, half, half, k_ready2.at[0])
          load_block(even, 2 * j, True, k_rope, 0, 2 * half, rope, k_ready2.at[0])
          when_free(2)
          load_block(odd, 2 * j + 1, second, k_left, 1, 0, half, k_ready2.at[1])
          load_block(odd, 2 * j + 1, second, k_rope, 1, 2 * half, rope, k_ready2.at[1])

        # The first keys before the queries, whose place the last request's output still passes through.
        pl.when(begin < end)(lambda: load_keys(begin))
        pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
        here = pl.ds(block * ROWS, merged)
        for tile, column, columns in ((q_left, 0, half), (q_right, half, half), (q_rope, 2 * half, rope)):
          plgpu.copy_gmem_to_smem(q_g.at[request, here, pl.ds(column, columns)], tile.at[0, pl.ds(0, merged)], q_ready)
        pl.loop(begin + 1, end)(load_keys)
        return loaded + jnp.maximum(end - begin, 0)

      lax.fori_loop(0, segments, run, jnp.int32(0))

    pl.when(wg == 0)(lambda: consumer(0, left))
    pl.when(wg == 1)(lambda: consumer(1, right))
    pl.when(wg == 2)(producer)

  barrier = plgpu.Barrier
  if cluster > 1:
    k_free = plgpu.ClusterBarrier(collective_axes=('member',), num_barriers=4)
    done = plgpu.ClusterBarrier(collective_axes=('member',), num_arrivals=2)
  else:
    k_free, done = barrier(num_barriers=4), barrier()
  f32 = jnp.float32
  return plgpu.kernel(
    body,
    out_type=(jax.ShapeDtypeStruct((batch, rows, value_width), dtype), jax.ShapeDtypeStruct((batch, rows), f32),
              jax.ShapeDtypeStruct((2 * parts, blocks * ROWS, value_width), f32),
              jax.ShapeDtypeStruct((2 * parts, blocks * ROWS), f32)),
    scratch_types=[*(plgpu.SMEM((1, ROWS, n), dtype, transforms=TILES) for n in (half, half, rope)),
                   *(plgpu.SMEM((2, BLOCK, n), dtype, transforms=TILES) for n in (half, half, rope)),
                   plgpu.SMEM((2, ROWS), f32), plgpu.SMEM((2, ROWS), f32),
                   barrier(num_arrivals=3), barrier(num_arrivals=2),
                   barrier(num_arrivals=copies, num_barriers=2), barrier(num_arrivals=2 * copies, num_barriers=2),
                   k_free, barrier(), barrier(), barrier(), barrier(), barrier(num_arrivals=2), done],
    grid=(groups, parts), grid_names=('group', 'part'), num_threads=3, thread_name='wg', kernel_name='mla_decode',
    **(dict(cluster=(cluster,), cluster_names=('member',)) if cluster > 1 else {}),
    compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                         lowering_semantics=plgpu.LoweringSemantics.Warpgroup))

"""Gradients of attention on Hopper (Mosaic GPU): one kernel for the queries', one for the keys' and values'.

Each computes the scores and their gradients anew and keeps its results in registers, so nothing is added up in memory
and the result is the same in every run. In both a warpgroup owns 64 rows, a third warpgroup loads by TMA, and programs
stay on the chip and work through a table of tiles, as in gpu.py. Scores start from -lse / scale and do.v from
dlse - do.o, as accumulators of wgmma: the subtractions cost no registers and no instructions.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.gpu_tiles import ROWS, items, load_ids
from pallas_kernels.mosaic_gpu import COLUMN, LOG2_E, ROW, accumulator, across, tiles, wait_for, zeros

BLOCK = 64  # rows of the other side a step
STAGES = 3


def queries(call, q_BTNH, k_BSNH, v_BSNV, do_BTNV, start_BNT, dstart_BNT, ids):
  """dq_BTNH, as long as q; start and dstart: what scores and do.v start from, whole tiles long."""
  table, counts = call.work('queries', BLOCK, ids or None)
  exponent = call.scale * LOG2_E
  square = accumulator(ROWS, BLOCK)

  def body(q_gmem, k_gmem, v_gmem, do_gmem, start_gmem, dstart_gmem, table_gmem, counts_gmem, *refs):
    ids_gmem, (dq_gmem, q_smem, do_smem, k_smem, v_smem, dq_smem, start_smem, dstart_smem, q_ready, q_free, k_ready,
               k_free, v_ready, v_free) = refs[:len(ids)], refs[len(ids):]
    count, item = items(table_gmem, counts_gmem, lax.axis_index('program'))
    slot = functools.partial(mosaic_gpu.slot, stages=STAGES)

    def consume(me):
      def tile(i, done):
        batch, head, start, first, blocks = item(i)
        start += me * ROWS
        last = first + blocks - 1
        hide = call.hider(ids_gmem, batch, start, BLOCK)

        def ahead(ready, step):
          # Also what keeps ptxas from moving the next wait for a product before the exponentials: it ends a basic
          # block.
          pl.when(step < blocks)(lambda: plgpu.barrier_wait(ready.at[slot(done + step)]))

        plgpu.barrier_wait(q_ready.at[me])
        row_start, row_dstart = plgpu.load(start_smem.at[me], layout=ROW), plgpu.load(dstart_smem.at[me], layout=ROW)

        def products(scores, dweights, step):
          zero, now = mosaic_gpu.opaque_zero(), slot(done + step)
          scores[...] = across(row_start, (ROWS, BLOCK), 0)
          dweights[...] = across(row_dstart, (ROWS, BLOCK), 0)
          plgpu.wgmma(scores, q_smem.at[me + zero], k_smem.at[now].T)
          plgpu.wgmma(dweights, do_smem.at[me + zero], v_smem.at[now].T)

        def score_gradients(scores, dweights, step, younger):
          """float32, without the factor scale; younger: products started since that of dweights."""
          weights = jnp.exp2(hide(wait_for(scores, 1 + younger), last - step) * exponent)
          weights = lax.optimization_barrier(weights)
          ahead(k_ready, step + 1)
          dscores = lax.optimization_barrier(weights * wait_for(dweights, younger))
          plgpu.barrier_arrive(v_free.at[slot(done + step)])
          ahead(v_ready, step + 1)
          return dscores

        def first_block(scores, dweights):
          plgpu.barrier_wait(k_ready.at[slot(done)])
          plgpu.barrier_wait(v_ready.at[slot(done)])
          products(scores, dweights, 0)
          return score_gradients(scores, dweights, 0, 0).astype(q_gmem.dtype)

        def step(i, carry):
          dq, dscores = carry
          old = slot(done + i - 1)

          def block(scores, dweights, total):
            total[...] = dq
            products(scores, dweights, i)
            plgpu.wgmma(total, dscores, k_smem.at[old])
            new = score_gradients(scores, dweights, i, 1)
            new_dq = wait_for(total, 0)
            plgpu.barrier_arrive(k_free.at[old])
            return new_dq, new.astype(q_gmem.dtype)

          return pl.run_scoped(block, square, square, accumulator(ROWS, call.width))

        carry = zeros(ROWS, call.width), pl.run_scoped(first_block, square, square)
        dq, dscores = lax.fori_loop(1, blocks, step, carry)
        plgpu.barrier_arrive(q_free.at[me])
        old = slot(done + blocks - 1)
        dq = mosaic_gpu.multiply_add(dq, dscores, k_smem.at[old])
        plgpu.barrier_arrive(k_free.at[old])
        mosaic_gpu.store_tile((dq * call.scale).astype(q_gmem.dtype), dq_smem.at[me],
                              lambda columns: dq_gmem.at[batch, pl.ds(start, ROWS), head, columns])
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    def load():
      def tile(i, done):
        batch, head, start, first, blocks = item(i)
        for w in range(2):
          rows = pl.ds(start + w * ROWS, ROWS)
          pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
          for gmem, smem in ((q_gmem.at[batch, rows, head], q_smem), (do_gmem.at[batch, rows, head], do_smem),
                             (start_gmem.at[batch, head, rows], start_smem),
                             (dstart_gmem.at[batch, head, rows], dstart_smem)):
            plgpu.copy_gmem_to_smem(gmem, smem.at[w], q_ready.at[w])

        def block(i, _):
          rows = pl.ds((first + blocks - 1 - i) * BLOCK, BLOCK)
          mosaic_gpu.fetch(done + i, STAGES, k_free, k_ready, (k_gmem.at[batch, rows, head], k_smem))
          mosaic_gpu.fetch(done + i, STAGES, v_free, v_ready, (v_gmem.at[batch, rows, head], v_smem))

        lax.fori_loop(0, blocks, block, None)
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))

    mosaic_gpu.split_roles(consume, load)

  smem = functools.partial(tiles, q_BTNH.dtype)
  numbers = plgpu.SMEM((2, ROWS), jnp.float32)
  one, both = plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES, num_arrivals=2)
  return mosaic_gpu.persistent(
    body, (q_BTNH, k_BSNH, v_BSNV, do_BTNV, start_BNT, dstart_BNT, table, counts, *ids),
    ((q_BTNH.shape, q_BTNH.dtype),),
    (smem(2, ROWS, call.width), smem(2, ROWS, call.value_width), smem(STAGES, BLOCK, call.width),
     smem(STAGES, BLOCK, call.value_width), smem(2, ROWS, 64), numbers, numbers,
     plgpu.Barrier(num_barriers=2, num_arrivals=4), plgpu.Barrier(num_barriers=2), one, both, one, both),
    len(table), name='flash_attention_dq')[0]


def keys(call, q_BTNH, k_BSNH, v_BSNV, do_BTNV, start_BNT, dstart_BNT, ids):
  """(dk_BSNH, dv_BSNV), as long as k and v. Everything is transposed: keys are the rows, queries the columns."""
  table, counts = call.work('keys', BLOCK, ids or None)
  exponent = call.scale * LOG2_E
  square = accumulator(ROWS, BLOCK)

  def body(q_gmem, k_gmem, v_gmem, do_gmem, start_gmem, dstart_gmem, table_gmem, counts_gmem, *refs):
    ids_gmem, (dk_gmem, dv_gmem, k_smem, v_smem, q_smem, do_smem, out_smem, start_smem, dstart_smem, k_ready, k_free,
               q_ready, q_free, do_ready, do_free) = refs[:len(ids)], refs[len(ids):]
    count, item = items(table_gmem, counts_gmem, lax.axis_index('program'))
    slot = functools.partial(mosaic_gpu.slot, stages=STAGES)

    def consume(me):
      def tile(i, done):
        batch, head, start, first, blocks = item(i)
        start += me * ROWS
        k_ids = load_ids(ids_gmem[1].at[batch, pl.ds(start, ROWS)], ROW) if ids else None

        def start_from(acc, numbers, now):
          acc[...] = across(plgpu.load(numbers.at[now], layout=COLUMN), (ROWS, BLOCK), 1)

        def weights(scores, step, masked):
          if masked:
            q_start = (first + step) * BLOCK
            both = None
            if ids:
              both = load_ids(ids_gmem[0].at[batch, pl.ds(q_start, BLOCK)], COLUMN), k_ids
            scores = call.hide(scores, q_start, start, 1, both, past_the_end=False)
          return jnp.exp2(scores * exponent).astype(q_gmem.dtype)

        def first_weights(scores):
          plgpu.barrier_wait(q_ready.at[slot(done)])
          start_from(scores, start_smem, slot(done))
          plgpu.wgmma(scores, k_smem.at[me + mosaic_gpu.opaque_zero()], q_smem.at[slot(done)].T)
          return weights(scores[...], 0, call.causal or call.segmented)

        def second_half(p, dv, now):
          """(dv, gradients of the scores) of a block whose weights are p."""
          def products(dweights, total):
            total[...] = dv
            plgpu.barrier_wait(do_ready.at[now])
            start_from(dweights, dstart_smem, now)
            plgpu.wgmma(dweights, v_smem.at[me + mosaic_gpu.opaque_zero()], do_smem.at[now].T)
            plgpu.wgmma(total, p, do_smem.at[now])
            dscores = lax.optimization_barrier((p.astype(jnp.float32) * wait_for(dweights, 1)).astype(q_gmem.dtype))
            new_dv = wait_for(total, 0)
            plgpu.barrier_arrive(do_free.at[now])
            return new_dv, dscores

          return pl.run_scoped(products, square, accumulator(ROWS, call.value_width))

        def step(i, carry, masked):
          dk, dv, dscores = carry
          now, old = slot(done + i), slot(done + i - 1)

          def first_half(scores, total):
            total[...] = dk
            plgpu.barrier_wait(q_ready.at[now])
            start_from(scores, start_smem, now)
            plgpu.wgmma(scores, k_smem.at[me + mosaic_gpu.opaque_zero()], q_smem.at[now].T)
            plgpu.wgmma(total, dscores, q_smem.at[old])
            p = lax.optimization_barrier(weights(wait_for(scores, 1), i, masked))
            new_dk = wait_for(total, 0)
            plgpu.barrier_arrive(q_free.at[old])
            return new_dk, p

          new_dk, p = pl.run_scoped(first_half, square, accumulator(ROWS, call.width))
          return new_dk, *second_half(p, dv, now)

        plgpu.barrier_wait(k_ready.at[me])
        p = pl.run_scoped(first_weights, square)
        carry = zeros(ROWS, call.width), *second_half(p, zeros(ROWS, call.value_width), slot(done))
        # Blocks with queries that do not see all of the keys come first, in a loop of their own: what the mask needs
        # would otherwise be kept in registers throughout.
        masked = blocks if call.segmented else jnp.int32(1)
        if call.causal and not call.segmented:
          hidden = lax.div(lax.max(start + (2 * ROWS - 2 - call.lag), jnp.int32(0)), jnp.int32(BLOCK))
          masked = lax.min(lax.max(hidden - first, jnp.int32(1)), blocks)
        if call.causal or call.segmented:
          carry = lax.fori_loop(1, masked, functools.partial(step, masked=True), carry)
        if not call.segmented:
          carry = lax.fori_loop(masked, blocks, functools.partial(step, masked=False), carry)
        dk, dv, dscores = carry
        plgpu.barrier_arrive(k_free.at[me])
        old = slot(done + blocks - 1)
        dk = mosaic_gpu.multiply_add(dk, dscores, q_smem.at[old])
        plgpu.barrier_arrive(q_free.at[old])
        for x, gmem in ((dv, dv_gmem), (dk * call.scale, dk_gmem)):
          mosaic_gpu.store_tile(x.astype(q_gmem.dtype), out_smem.at[me],
                                lambda columns, gmem=gmem: gmem.at[batch, pl.ds(start, ROWS), head, columns])
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    def load():
      def tile(i, done):
        batch, head, start, first, blocks = item(i)
        for w in range(2):
          rows = pl.ds(start + w * ROWS, ROWS)
          pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(k_free.at[w]))
          plgpu.copy_gmem_to_smem(k_gmem.at[batch, rows, head], k_smem.at[w], k_ready.at[w])
          plgpu.copy_gmem_to_smem(v_gmem.at[batch, rows, head], v_smem.at[w], k_ready.at[w])

        def block(i, _):
          rows = pl.ds((first + i) * BLOCK, BLOCK)
          mosaic_gpu.fetch(done + i, STAGES, q_free, q_ready, (q_gmem.at[batch, rows, head], q_smem),
                           (start_gmem.at[batch, head, rows], start_smem))
          mosaic_gpu.fetch(done + i, STAGES, do_free, do_ready, (do_gmem.at[batch, rows, head], do_smem),
                           (dstart_gmem.at[batch, head, rows], dstart_smem))

        lax.fori_loop(0, blocks, block, None)
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))

    mosaic_gpu.split_roles(consume, load)

  smem = functools.partial(tiles, q_BTNH.dtype)
  numbers = plgpu.SMEM((STAGES, BLOCK), jnp.float32)
  both = plgpu.Barrier(num_barriers=STAGES, num_arrivals=2)
  return mosaic_gpu.persistent(
    body, (q_BTNH, k_BSNH, v_BSNV, do_BTNV, start_BNT, dstart_BNT, table, counts, *ids),
    ((k_BSNH.shape, k_BSNH.dtype), (v_BSNV.shape, v_BSNV.dtype)),
    (smem(2, ROWS, call.width), smem(2, ROWS, call.value_width), smem(STAGES, BLOCK, call.width),
     smem(STAGES, BLOCK, call.value_width), smem(2, ROWS, 64), numbers, numbers,
     plgpu.Barrier(num_barriers=2, num_arrivals=2), plgpu.Barrier(num_barriers=2), both, both, both, both),
    len(table), name='flash_attention_dkv')

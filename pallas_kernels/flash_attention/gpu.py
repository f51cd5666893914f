"""Attention on Hopper (Mosaic GPU): forward, and the gradients of gpu_backward.py.

A program holds 128 queries, 64 a warpgroup, and walks their blocks of 128 keys from the diagonal downwards; a third
warpgroup loads by TMA. A warpgroup starts the scores of the next block and the output of this one together and takes
the exponentials of the first while the second still runs; the two warpgroups take turns to start, so that one's
products cover the other's exponentials (FlashAttention-3, arXiv 2407.08608, 3.1 and 3.2). Programs stay on the chip and
work through a table that gives each its tiles, dearest first; the next tile's queries arrive while the last one's
output is divided and written.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu
from pallas_kernels.flash_attention import gpu_backward
from pallas_kernels.flash_attention.gpu_tiles import ROWS, Attention, items, padded_ids, whole_swizzles
from pallas_kernels.mosaic_gpu import (
  LOG2_E,
  LOWEST,
  ROW,
  accumulator,
  across,
  any_in_warp,
  raised,
  tiles,
  wait_for,
  zeros,
)

BLOCK = 128  # keys a step
STAGES = 2  # blocks of keys, and of values, in shared memory


def unsuitable(q_BTNH, k_BSNH, v_BSNV) -> str | None:
  """What about these operands the kernels do not serve, in one clause, or None."""
  if q_BTNH.dtype != jnp.bfloat16:
    return f'it takes bfloat16 and these are {q_BTNH.dtype}'
  width, value_width = q_BTNH.shape[3], v_BSNV.shape[3]
  if width not in (64, 128, 192) or value_width not in (64, 128):
    return f'it takes widths 64, 128 or 192 of q with 64 or 128 of v, and these are {width} and {value_width}'
  return dispatch.divided(q_BTNH, k_BSNH, v_BSNV)


def forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  """(o_BTNV, lse_BTN)."""
  call, sign = _call(q_BTNH, k_BSNH, v_BSNV, q_segments, scale, causal)
  q, k, v = map(whole_swizzles, (q_BTNH * sign if sign != 1 else q_BTNH, k_BSNH, v_BSNV))
  o_BTNV, lse_BNT = _forward(call, q, k, v, _ids(call, q_segments, kv_segments))
  return o_BTNV[:, :call.t], lse_BNT[..., :call.t].swapaxes(1, 2)


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  call, sign = _call(q_BTNH, k_BSNH, v_BSNV, q_segments, scale, causal)
  q, k, v, do = map(whole_swizzles, (q_BTNH * sign if sign != 1 else q_BTNH, k_BSNH, v_BSNV, do_BTNV))
  # d score = p (do.v - do.o + dlse), p = exp(score - lse). Both kernels start a product from a row's number instead of
  # zero: the scores from -lse / scale, do.v from dlse - do.o.
  do_o_BTN = jnp.einsum('BTNV,BTNV->BTN', do_BTNV, o_BTNV, preferred_element_type=jnp.float32)
  blind_BTN = lse_BTN == -jnp.inf
  starts = (jnp.where(blind_BTN, LOWEST, lse_BTN * (-1 / call.scale)), jnp.where(blind_BTN, 0, dlse_BTN - do_o_BTN))
  starts = [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -call.t % (2 * ROWS)))) for x in starts]
  ids = _ids(call, q_segments, kv_segments)
  dq_BTNH = gpu_backward.queries(call, q, k, v, do, *starts, ids)[:, :call.t]
  dk_BSNH, dv_BSNV = gpu_backward.keys(call, q, k, v, do, *starts, ids)
  return dq_BTNH * sign if sign != 1 else dq_BTNH, dk_BSNH[:, :call.s], dv_BSNV[:, :call.s]


def _call(q_BTNH, k_BSNH, v_BSNV, q_segments, scale, causal):
  """The call, and by what the queries are to be multiplied: the maximum of scores is that of scale * scores only where
  scale > 0, so its sign, or its being 0, goes to the queries."""
  batch, t, heads, width = q_BTNH.shape
  sign = int(np.sign(scale))
  call = Attention(batch, heads, t, k_BSNH.shape[1], width, v_BSNV.shape[3], abs(scale) or 1.0, causal,
                   q_segments is not None, mosaic_gpu.multiprocessors(q_BTNH))
  return call, sign


def _ids(call, q_segments, kv_segments):
  if not call.segmented:
    return ()
  return padded_ids(q_segments, call.t, 'queries'), padded_ids(kv_segments, call.s, 'keys')


def _forward(call, q_BTNH, k_BSNH, v_BSNV, ids):
  """(o, as long as q; float32 lse [B, N, T up to whole tiles])."""
  table, counts = call.work('queries', BLOCK, ids or None)
  exponent = call.scale * LOG2_E

  def body(q_gmem, k_gmem, v_gmem, table_gmem, counts_gmem, *refs):
    ids_gmem, (o_gmem, lse_gmem, q_smem, k_smem, v_smem, o_smem, lse_smem, q_ready, q_free, k_ready, k_free, v_ready,
               v_free, turns) = refs[:len(ids)], refs[len(ids):]
    count, item = items(table_gmem, counts_gmem, lax.axis_index('program'))
    slot = functools.partial(mosaic_gpu.slot, stages=STAGES)

    def softmax(scores, maximum, total):
      """(exp2(scores - new reference), that reference, total, by what earlier results shrink), all in powers of two.
      The reference is the maximum so far, or up to 2^8 below it."""
      top = scores.max(axis=1) * exponent
      new = raised(maximum, top)
      shrink = jnp.exp2(maximum - new)
      weights = jnp.exp2(scores * exponent - across(new, scores.shape, 0))
      return weights, new, total * shrink + weights.sum(axis=1), shrink

    def consume(me):
      if me == 1:
        plgpu.barrier_arrive(turns.at[0])

      def tile(i, done):
        """done: blocks that the program has been through before this tile."""
        batch, head, start, first, blocks = item(i)
        start += me * ROWS
        last = first + blocks - 1
        hide = call.hider(ids_gmem, batch, start, BLOCK)

        def await_keys(step):
          # Also what keeps ptxas from moving the wait for the output before the exponentials: it ends a basic block.
          pl.when(step < blocks)(lambda: plgpu.barrier_wait(k_ready.at[slot(done + step)]))

        def first_scores(scores):
          plgpu.wgmma(scores, q_smem.at[me + mosaic_gpu.opaque_zero()], k_smem.at[slot(done)].T)
          return scores[...]

        def rows_of(*numbers):
          return (plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW) for x in numbers)

        plgpu.barrier_wait(q_ready.at[me])
        plgpu.barrier_wait(k_ready.at[slot(done)])
        scores = pl.run_scoped(first_scores, accumulator(ROWS, BLOCK))
        plgpu.barrier_arrive(k_free.at[slot(done)])
        weights, maximum, total, _ = softmax(hide(scores, last), *rows_of(LOWEST, 0.))
        await_keys(1)

        def step(i, carry):
          o, maximum, total, weights = carry
          keys, values = slot(done + i), slot(done + i - 1)

          def products(scores, output):
            output[...] = o
            plgpu.barrier_wait(turns.at[me])
            plgpu.wgmma(scores, q_smem.at[me + mosaic_gpu.opaque_zero()], k_smem.at[keys].T)
            plgpu.barrier_wait(v_ready.at[values])
            plgpu.wgmma(output, weights, v_smem.at[values])
            plgpu.barrier_arrive(turns.at[1 - me])
            new_scores = wait_for(scores, 1)
            plgpu.barrier_arrive(k_free.at[keys])
            new, *rest, shrink = lax.optimization_barrier(softmax(hide(new_scores, last - i), maximum, total))
            await_keys(i + 1)
            new_o = wait_for(output, 0)
            plgpu.barrier_arrive(v_free.at[values])
            # Rounded only now: ptxas would serialise products that run while another's operand registers are written.
            risen = any_in_warp(rest[0] - maximum)
            new_o = lax.cond(risen, lambda: new_o * across(shrink, new_o.shape, 0), lambda: new_o)
            return new_o, *rest, new.astype(q_gmem.dtype)

          return pl.run_scoped(products, accumulator(ROWS, BLOCK),
                               accumulator(ROWS, call.value_width))

        carry = zeros(ROWS, call.value_width), maximum, total, weights.astype(q_gmem.dtype)
        o, maximum, total, weights = lax.fori_loop(1, blocks, step, carry)
        plgpu.barrier_arrive(q_free.at[me])
        values = slot(done + blocks - 1)
        plgpu.barrier_wait(v_ready.at[values])
        o = mosaic_gpu.multiply_add(o, weights, v_smem.at[values])
        plgpu.barrier_arrive(v_free.at[values])
        seen = total > 0
        o = o * across(jnp.where(seen, 1 / total, 0.), o.shape, 0)
        lse = jnp.where(seen, maximum * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        lse_smem[me] = lse
        rows = pl.ds(start, ROWS)
        mosaic_gpu.store_tile(o.astype(q_gmem.dtype), o_smem.at[me],
                              lambda columns: o_gmem.at[batch, rows, head, columns])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_gmem.at[batch, head, rows])
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    def load():
      def tile(i, done):
        batch, head, start, first, blocks = item(i)
        for w in range(2):
          pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
          plgpu.copy_gmem_to_smem(q_gmem.at[batch, pl.ds(start + w * ROWS, ROWS), head], q_smem.at[w], q_ready.at[w])

        def block(i, _):
          rows = pl.ds((first + blocks - 1 - i) * BLOCK, BLOCK)
          mosaic_gpu.fetch(done + i, STAGES, k_free, k_ready, (k_gmem.at[batch, rows, head], k_smem))
          mosaic_gpu.fetch(done + i, STAGES, v_free, v_ready, (v_gmem.at[batch, rows, head], v_smem))

        lax.fori_loop(0, blocks, block, None)
        return done + blocks

      lax.fori_loop(0, count, tile, jnp.int32(0))

    mosaic_gpu.split_roles(consume, load)

  smem = functools.partial(tiles, q_BTNH.dtype)
  one, both = plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES, num_arrivals=2)
  pair = plgpu.Barrier(num_barriers=2)
  batch, t, heads, _ = q_BTNH.shape
  o_shape, lse_shape = (batch, t, heads, call.value_width), (batch, heads, -(-t // (2 * ROWS)) * 2 * ROWS)
  return mosaic_gpu.persistent(
    body, (q_BTNH, k_BSNH, v_BSNV, table, counts, *ids), ((o_shape, q_BTNH.dtype), (lse_shape, jnp.float32)),
    (smem(2, ROWS, call.width), smem(STAGES, BLOCK, call.width), smem(STAGES, BLOCK, call.value_width),
     smem(2, ROWS, 64), plgpu.SMEM((2, ROWS), jnp.float32), pair, pair, one, both, one, both, pair),
    len(table), name='flash_attention_forward')

"""Latent attention over a paged cache on Hopper (Mosaic GPU): keys and values are one tile in shared memory.

A program holds 64 rows, a row being one head of one query token, and walks the keys of its requests two blocks of 64
at a time (`gpu_program.py`). The output accumulator, 64 x 512 float32, fills half of the register file, so two
warpgroups share it by columns; they exchange weights and running maxima through shared memory. While one computes
exponentials the other multiplies. A third warpgroup loads by TMA. (FlashMLA's schedule,
github.com/deepseek-ai/FlashMLA, here for any page size, several query tokens and any split.)

Ours:
- Rows that read the same keys form a cluster of two programs; each block is fetched once from L2 for both (multicast).
- Each program runs one piece of `schedule.Plan`, and programs that share a request wait for each other at the end and
  merge their float32 partial results, each its share of the rows: one launch, no second kernel. All programs are on
  the chip at once (one a streaming multiprocessor), so the wait ends.
- The tail of the last block is cleared in shared memory: unused cache rows may hold NaN, and 0 * NaN is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.mla_decode import schedule
from pallas_kernels.mla_decode.gpu_call import BLOCK, ROWS, Call, Refs, results, scratch
from pallas_kernels.mla_decode.gpu_program import Program
from pallas_kernels.mosaic_gpu import multiprocessors


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
  kernel = _kernel(Call(batch, padded, t, heads, width, value_width, *pages_PSJ.shape[:2], table_BP.shape[1], parts,
                        q_BTNJ.dtype, scale))
  # One after the other under vmap: a launch's programs find each other by semaphores that a second one would share.
  kernel = jax.custom_batching.sequential_vmap(kernel)
  o_BMC, lse_BM, *_ = kernel(q_BMJ, pages_PSJ, table_BP.astype(jnp.int32), lengths_B, *plan)
  outputs = o_BMC[:, :rows].reshape(batch, t, heads, value_width), lse_BM[:, :rows].reshape(batch, t, heads)
  return dispatch.vary(outputs, dispatch.varying_axes(q_BTNJ))


@functools.cache
def _kernel(c: Call):
  def body(*refs):
    Program(c, Refs(*refs)).run()

  clustered = dict(cluster=(c.cluster,), cluster_names=('member',)) if c.cluster > 1 else {}
  return plgpu.kernel(
    body, out_type=results(c), scratch_types=scratch(c), grid=(c.groups, c.parts), grid_names=('group', 'part'),
    **clustered, num_threads=3, thread_name='wg', kernel_name='mla_decode', compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup))

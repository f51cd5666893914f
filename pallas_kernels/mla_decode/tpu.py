"""Latent attention over a paged cache for TPU (Mosaic): one pass over each sequence's pages, copied in while the
previous chunk is multiplied.

The cache has one head, so the T N queries of a sequence are the rows of one matrix and each page is read once for all
of them. A work item is a block of those rows; nearly always that is the whole sequence. The copies of the next item's
first pages start during the last chunk of the one before, so only a core's very first chunk is waited for in full.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu

MAX_ROWS = 1024  # of an item: 8 query tokens of 128 heads read the cache once


def mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, plan, scale, value_width):
  """`plan` is ignored: a device has one or two cores and a batch fills them."""
  del plan
  chip = mosaic_tpu.chip(q_BTNJ, pages_PSJ)
  batch, t, heads, width = q_BTNJ.shape
  page, max_pages = pages_PSJ.shape[1], table_BP.shape[1]
  rows = t * heads
  block = min(MAX_ROWS, pl.cdiv(rows, 16) * 16)
  blocks = pl.cdiv(rows, block)
  q_BMJ = jnp.pad(q_BTNJ.reshape(batch, rows, width), ((0, 0), (0, blocks * block - rows), (0, 0)))

  # Keys that the last row of each item sees; items that only even out the cores see none.
  lengths_B = jnp.clip(lengths_B, 0, max_pages * page).astype(jnp.int32)
  last_token = (jnp.minimum((jnp.arange(blocks) + 1) * block, rows) - 1) // heads
  keys_W = jnp.maximum(lengths_B[:, None] - t + 1 + last_token, 0).reshape(-1)
  items = batch * blocks
  share = pl.cdiv(items, chip.cores)
  keys_W = jnp.pad(keys_W, (0, chip.cores * share - items))
  q_WMJ = jnp.pad(q_BMJ.reshape(items, block, width), ((0, len(keys_W) - items), (0, 0), (0, 0)))

  chunk_pages = max(1, min(max_pages, chip.decode_keys // page))
  dtype = jnp.promote_types(q_BTNJ.dtype, pages_PSJ.dtype)
  kernel = functools.partial(_kernel, scale=scale, heads=heads, t=t, blocks=blocks, share=share, dtype=dtype)

  def item(core, i, *_):
    return core * share + i, 0, 0

  def table_row(offset):
    # SMEM holds two rows, not the table: 128 sequences of 128k keys would need all of a chip's megabyte.
    def index(core, i, *_):
      return jnp.minimum((core * share + i + offset) // blocks, batch - 1), 0, 0
    return pl.BlockSpec((None, 1, max_pages), index, memory_space=pltpu.SMEM)

  o_WMC, lse_W1M = mosaic_tpu.call(
    kernel, (lengths_B, keys_W, table_BP[:, None], table_BP[:, None], q_WMJ, pages_PSJ),
    prefetched=2, grid=(chip.cores, share), dimensions=('parallel', 'arbitrary'), name='mla_decode',
    in_specs=[table_row(0), table_row(1), pl.BlockSpec((None, block, width), item), pl.BlockSpec(memory_space=pl.ANY)],
    out_shape=[((len(keys_W), block, value_width), q_BTNJ.dtype), ((len(keys_W), 1, block), jnp.float32)],
    out_specs=[pl.BlockSpec((None, block, value_width), item), pl.BlockSpec((None, 1, block), item)],
    scratch_shapes=[pltpu.VMEM((2, chunk_pages, page, width), pages_PSJ.dtype), pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((1,), jnp.int32), pltpu.VMEM((block, 1), jnp.float32),
                    pltpu.VMEM((block, 1), jnp.float32), pltpu.VMEM((block, value_width), jnp.float32)])
  o_BMC = o_WMC[:items].reshape(batch, blocks * block, value_width)[:, :rows]
  lse_BM = lse_W1M[:items].reshape(batch, blocks * block)[:, :rows]
  return o_BMC.reshape(batch, t, heads, value_width), lse_BM.reshape(batch, t, heads)


def _kernel(lengths_B, keys_W, table_1P, next_table_1P, q_MJ, pages_PSJ, o_MC, lse_1M, chunk_2PSJ, arrived_2, slot_1,
            max_M1, total_M1, sum_MC, *, scale, heads, t, blocks, share, dtype):
  core, i = pl.program_id(0), pl.program_id(1)
  w = core * share + i
  chunk_pages, page, width = chunk_2PSJ.shape[1:]
  chunk_keys, value_width = chunk_pages * page, sum_MC.shape[1]
  keys = keys_W[w]
  chunks = pl.cdiv(keys, chunk_keys)

  def copies(do, w, table_1P, chunk, slot):
    first = chunk * chunk_pages
    count = jnp.minimum(pl.cdiv(keys_W[w], page) - first, chunk_pages)

    def one(p, _):
      source = pages_PSJ.at[table_1P[0, first + p]]
      do(pltpu.make_async_copy(source, chunk_2PSJ.at[slot, p], arrived_2.at[slot]))

    jax.lax.fori_loop(0, count, one, None)

  def start(copy):
    copy.start()

  def wait(copy):
    copy.wait()

  def start_next_item(slot):
    @pl.when(i + 1 < share)
    def _():
      copies(start, w + 1, next_table_1P, 0, slot)

  @pl.when(i == 0)
  def _():
    slot_1[0] = 0
    copies(start, w, table_1P, 0, 0)

  @pl.when(chunks == 0)
  def _():
    start_next_item(slot_1[0])

  max_M1[...] = jnp.full_like(max_M1, -jnp.inf)
  total_M1[...] = jnp.zeros_like(total_M1)
  sum_MC[...] = jnp.zeros_like(sum_MC)
  # Row r is of query token r // heads, which sees a key more than the one before; exact in float32 below 4M rows.
  row_M1 = jax.lax.broadcasted_iota(jnp.int32, max_M1.shape, 0) + (w % blocks) * max_M1.shape[0]
  token_M1 = ((row_M1.astype(jnp.float32) + 0.5) * (1 / heads)).astype(jnp.int32)
  limit_M1 = lengths_B[jnp.minimum(w // blocks, lengths_B.shape[0] - 1)] - t + 1 + token_M1

  def step(c, _):
    slot = slot_1[0]

    @pl.when(c + 1 < chunks)
    def _():
      copies(start, w, table_1P, c + 1, 1 - slot)

    @pl.when(c + 1 == chunks)
    def _():
      start_next_item(1 - slot)

    copies(wait, w, table_1P, c, slot)
    left = keys - c * chunk_keys

    @pl.when(left < chunk_keys)
    def _():
      # Rows past the end hold anything, and 0 * NaN is NaN: they are cleared, not only given no weight.
      shape = (chunk_pages, page, width)
      key = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * page + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
      chunk_2PSJ[slot] = jnp.where(key < left, chunk_2PSJ[slot], jnp.zeros((), chunk_2PSJ.dtype))

    cache_SJ = chunk_2PSJ[slot].reshape(chunk_keys, width).astype(dtype)
    scores_MS = scale * mosaic_tpu.dot(q_MJ[...].astype(dtype), cache_SJ, (1, 1))
    key_MS = jax.lax.broadcasted_iota(jnp.int32, scores_MS.shape, 1) + c * chunk_keys
    scores_MS = jnp.where(key_MS < limit_M1, scores_MS, -jnp.inf)
    old_max_M1 = max_M1[...]
    new_max_M1 = jnp.maximum(old_max_M1, scores_MS.max(1, keepdims=True))
    base_M1 = jnp.where(new_max_M1 == -jnp.inf, 0, new_max_M1)
    weights_MS = jnp.exp(scores_MS - base_M1)
    shrink_M1 = jnp.exp(old_max_M1 - base_M1)
    max_M1[...] = new_max_M1
    total_M1[...] = total_M1[...] * shrink_M1 + weights_MS.sum(1, keepdims=True)
    sum_MC[...] = sum_MC[...] * shrink_M1 + mosaic_tpu.dot(weights_MS.astype(dtype), cache_SJ[:, :value_width])
    slot_1[0] = 1 - slot

  jax.lax.fori_loop(0, chunks, step, None)
  total = total_M1[...]
  o_MC[...] = (sum_MC[...] / jnp.where(total == 0, 1, total)).astype(o_MC.dtype)
  lse_1M[...] = mosaic_tpu.row_of_column(jnp.where(total == 0, -jnp.inf, max_M1[...] + jnp.log(total)))

"""Attention for TPU (Mosaic): a grid over batch, heads and those pairs (block of queries, block of keys) that can see
each other, which are listed ahead, so that a causal program has no step above the diagonal.

Forward goes through a query block's pairs in order with the softmax's state in VMEM. Backward goes through a key
block's pairs and recomputes the probabilities transposed, keys by queries: statistics of queries are then rows, which
broadcast for free, and of its five products only the queries' gradient needs a transpose. That gradient stays in VMEM
for a whole head, so one kernel makes all three, in a fixed order of additions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu import dot


def forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  """(o_BTNV, lse_BTN)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  t, width = q_BTNH.shape[1], v_BSNV.shape[3]
  q_BNTH, k_BNSH, v_BNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  pairs = [(i, j) for i in range(grid.q_blocks) for j in range(grid.k_blocks) if grid.sees(i, j) or j == 0]
  o_BNTV, lse_BN1T = grid.call(
    functools.partial(_forward, scale=scale), pairs, (q_BNTH, k_BNSH, v_BNSV), (q_segments, kv_segments),
    in_specs=[grid.q_rows(q_BNTH), grid.k_rows(k_BNSH), grid.k_rows(v_BNSV)],
    out_shape=[((*q_BNTH.shape[:3], width), q_BTNH.dtype), ((*q_BNTH.shape[:2], 1, q_BNTH.shape[2]), jnp.float32)],
    out_specs=[grid.q_rows(width), grid.q_lanes()],
    scratch_shapes=[pltpu.VMEM((grid.q_block, 1), jnp.float32), pltpu.VMEM((grid.q_block, 1), jnp.float32),
                    pltpu.VMEM((grid.q_block, width), jnp.float32), pltpu.VMEM((grid.q_block, 1), jnp.int32)],
    name='flash_attention')
  return o_BNTV[:, :, :t].swapaxes(1, 2), lse_BN1T[:, :, 0, :t].swapaxes(1, 2)


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  # d score = p (do.v - do.o + dlse): the softmax's own two terms and the log-sum-exp's, whose gradient is p.
  shift_BTN = dlse_BTN - jnp.einsum('BTNV,BTNV->BTN', do_BTNV, o_BTNV, preferred_element_type=jnp.float32)
  lse_BTN = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)
  t, s = q_BTNH.shape[1], k_BSNH.shape[1]
  part = _gradient_queries(q_BTNH, k_BSNH)
  dq, dk, dv = [], 0, 0
  for start in range(0, t, part):
    # The queries that one call's VMEM holds, and the keys that they see.
    end = min(start + part, t)
    seen = min(max(end + s - t, 1), s) if causal else s
    rows, keys = slice(start, end), slice(seen)
    segments = None if q_segments is None else q_segments[:, rows], None if q_segments is None else kv_segments[:, keys]
    grid = _Grid(q_BTNH[:, rows], k_BSNH[:, keys], causal, offset=start + s - t)
    part_dq, part_dk, part_dv = _gradients(
      grid, q_BTNH[:, rows], k_BSNH[:, keys], v_BSNV[:, keys], segments, scale, lse_BTN[:, rows], do_BTNV[:, rows],
      shift_BTN[:, rows], q_BTNH.dtype if part >= t else jnp.float32)
    dq.append(part_dq)
    rest = ((0, 0), (0, s - seen), (0, 0), (0, 0))
    dk, dv = dk + jnp.pad(part_dk, rest), dv + jnp.pad(part_dv, rest)
  return jnp.concatenate(dq, axis=1), dk.astype(k_BSNH.dtype), dv.astype(v_BSNV.dtype)


def _gradients(grid, q_BTNH, k_BSNH, v_BSNV, segments, scale, lse_BTN, do_BTNV, shift_BTN, dtype):
  """Gradients of some queries, and what these queries add to the gradients of keys and values, in `dtype`."""
  (_, t, _, h), (_, s, _, v) = q_BTNH.shape, v_BSNV.shape
  q_BNTH, k_BNSH, v_BNSV, do_BNTV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV), grid.queries(do_BTNV)
  rows = [grid.queries(x[..., None]).swapaxes(2, 3) for x in (lse_BTN, shift_BTN)]
  last = grid.q_blocks - 1
  pairs = [(i, j) for j in range(grid.k_blocks) for i in range(grid.q_blocks) if grid.sees(i, j) or i == last]
  all_queries = q_BNTH.shape[2]
  dq_BNTH, dk_BNSH, dv_BNSV = grid.call(
    functools.partial(_backward, scale=scale), pairs, (q_BNTH, k_BNSH, v_BNSV, do_BNTV, *rows), segments,
    in_specs=[grid.q_rows(q_BNTH), grid.k_rows(k_BNSH), grid.k_rows(v_BNSV), grid.q_rows(do_BNTV), grid.q_lanes(),
              grid.q_lanes()],
    out_shape=[(q_BNTH.shape, q_BTNH.dtype), (k_BNSH.shape, dtype), (v_BNSV.shape, dtype)],
    out_specs=[pl.BlockSpec((None, None, all_queries, h), lambda b, n, *_: (b, n, 0, 0)), grid.k_rows(h),
               grid.k_rows(v)],
    scratch_shapes=[pltpu.VMEM((all_queries, h), jnp.float32), pltpu.VMEM((grid.k_block, h), jnp.float32),
                    pltpu.VMEM((grid.k_block, v), jnp.float32), pltpu.VMEM((grid.k_block, 1), jnp.int32)],
    name='flash_attention_gradients')
  return dq_BNTH[:, :, :t].swapaxes(1, 2), dk_BNSH[:, :, :s].swapaxes(1, 2), dv_BNSV[:, :, :s].swapaxes(1, 2)


def _gradient_queries(q_BTNH, k_BSNH):
  """Queries whose gradient a core holds: in float32, and twice in their own dtype as the output's buffers."""
  chip = mosaic_tpu.chip(q_BTNH, k_BSNH)
  lanes = pl.cdiv(q_BTNH.shape[3], 128) * 128
  fits = mosaic_tpu.vmem_limit(chip) // 2 // (lanes * (4 + 2 * q_BTNH.dtype.itemsize))
  return min(chip.attention_queries, fits // chip.attention_block * chip.attention_block)


class _Grid:
  """Queries and keys cut into blocks. Query t sees keys <= t + offset where the attention is causal."""

  def __init__(self, q_BTNH, k_BSNH, causal, offset=None):
    self.t, self.s, self.causal = q_BTNH.shape[1], k_BSNH.shape[1], causal
    self.offset = self.s - self.t if offset is None else offset
    block = mosaic_tpu.chip(q_BTNH, k_BSNH).attention_block
    # A short sequence is one block, of whole lanes: statistics of queries are stored along them.
    self.q_block, self.k_block = (min(block, pl.cdiv(n, 128) * 128) for n in (self.t, self.s))
    self.q_blocks, self.k_blocks = pl.cdiv(self.t, self.q_block), pl.cdiv(self.s, self.k_block)

  def sees(self, i, j):
    return not self.causal or j * self.k_block <= (i + 1) * self.q_block - 1 + self.offset

  def queries(self, x_BTNH):
    """Heads before positions, padded with zeros to whole blocks."""
    return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, self.q_blocks * self.q_block - self.t), (0, 0)))

  def keys(self, x_BSNH):
    return jnp.pad(x_BSNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, self.k_blocks * self.k_block - self.s), (0, 0)))

  def q_rows(self, x):
    width = x if isinstance(x, int) else x.shape[3]
    return pl.BlockSpec((None, None, self.q_block, width), lambda b, n, p, i_P, *_: (b, n, i_P[p], 0))

  def k_rows(self, x):
    width = x if isinstance(x, int) else x.shape[3]
    return pl.BlockSpec((None, None, self.k_block, width), lambda b, n, p, _, j_P, *__: (b, n, j_P[p], 0))

  def q_lanes(self):
    return pl.BlockSpec((None, None, 1, self.q_block), lambda b, n, p, i_P, *_: (b, n, 0, i_P[p]))

  def call(self, kernel, pairs, operands, segments, in_specs, **options):
    """kernel(where, segments' blocks or None, *refs) for each pair."""
    prefetched = list(np.array(pairs, np.int32).T)
    if segments[0] is not None:
      q_BT, k_BS = (jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, blocks * block - ids.shape[1])), mode='edge')
                    for ids, blocks, block in ((segments[0], self.q_blocks, self.q_block),
                                               (segments[1], self.k_blocks, self.k_block)))
      for ids, block in ((q_BT, self.q_block), (k_BS, self.k_block)):
        blocked = ids.reshape(len(ids), -1, block)
        prefetched += [blocked.min(2), blocked.max(2)]
      operands = (*operands, q_BT[:, None], k_BS[:, None])
      in_specs = [*in_specs, pl.BlockSpec((None, 1, self.q_block), lambda b, _, p, i_P, *__: (b, 0, i_P[p])),
                  pl.BlockSpec((None, 1, self.k_block), lambda b, _, p, __, j_P, *___: (b, 0, j_P[p]))]

    def with_pair(*refs):
      scalars, refs = refs[:len(prefetched)], refs[len(prefetched):]
      ids = refs[len(in_specs) - 2:len(in_specs)] if segments[0] is not None else None
      data = refs[:len(in_specs) - 2 if ids else len(in_specs)]
      kernel(_Pair(self, scalars, ids), *data, *refs[len(in_specs):])

    batch, heads = operands[0].shape[:2]
    return mosaic_tpu.call(with_pair, (*map(jnp.asarray, prefetched), *operands), prefetched=len(prefetched),
                           grid=(batch, heads, len(pairs)), dimensions=('parallel', 'parallel', 'arbitrary'),
                           in_specs=in_specs, **options)


class _Pair:
  """What a kernel knows of its pair of blocks."""

  def __init__(self, grid, scalars, ids):
    self.grid, self.ids = grid, ids
    self.p, self.pairs = pl.program_id(2), pl.num_programs(2)
    self.i, self.j = (x_P[self.p] for x_P in scalars[:2])
    self.scalars = scalars

  def changes(self, which, step):
    """Whether the pair `step` further has another query block (which = 0) or key block (1), or there is none."""
    other = self.p + step
    inside = (other >= 0) & (other < self.pairs)
    blocks_P = self.scalars[which]
    return ~inside | (blocks_P[jnp.clip(other, 0, self.pairs - 1)] != blocks_P[self.p])

  def computes(self, body):
    """body(masked) where some key may be seen; masked unless all certainly are."""
    grid = self.grid
    first_key, end_key = self.j * grid.k_block, (self.j + 1) * grid.k_block
    some, all_ = jnp.bool_(True), end_key <= grid.s
    if grid.causal:
      first_query = self.i * grid.q_block + grid.offset
      some &= first_key < first_query + grid.q_block
      all_ &= end_key - 1 <= first_query
    if self.ids is not None:
      batch = pl.program_id(0)
      q_low, q_high, k_low, k_high = (x[batch, block] for x, block in zip(
        self.scalars[2:], (self.i, self.i, self.j, self.j), strict=True))
      some &= (q_low <= k_high) & (k_low <= q_high)
      all_ &= (q_low == q_high) & (q_low == k_low) & (k_low == k_high)
    pl.when(some & all_)(lambda: body(False))
    pl.when(some & ~all_)(lambda: body(True))

  def visible(self, query, key, column, row):
    """Mask from positions within the blocks and, with segments, ids as a column and a row."""
    key = key + self.j * self.grid.k_block
    seen = key < self.grid.s
    if self.grid.causal:
      seen &= key <= query + self.i * self.grid.q_block + self.grid.offset
    if self.ids is not None:
      seen &= column == row
    return seen


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _forward(pair, q_TH, k_SH, v_SV, o_TV, lse_1T, max_T1, total_T1, sum_TV, ids_T1, *, scale):
  @pl.when(pair.changes(0, -1))
  def _():
    max_T1[...] = jnp.full_like(max_T1, -jnp.inf)
    total_T1[...] = jnp.zeros_like(total_T1)
    sum_TV[...] = jnp.zeros_like(sum_TV)
    if pair.ids:
      ids_T1[...] = mosaic_tpu.column_of_row(pair.ids[0][...])

  def body(masked):
    scores_TS = scale * dot(q_TH[...], k_SH[...], (1, 1))
    if masked:
      seen = pair.visible(_iota(scores_TS.shape, 0), _iota(scores_TS.shape, 1), *(
        (ids_T1[...], pair.ids[1][...]) if pair.ids else (None, None)))
      scores_TS = jnp.where(seen, scores_TS, -jnp.inf)
    old_max_T1 = max_T1[...]
    new_max_T1 = jnp.maximum(old_max_T1, scores_TS.max(1, keepdims=True))
    base_T1 = jnp.where(new_max_T1 == -jnp.inf, 0, new_max_T1) if masked else new_max_T1
    weights_TS, shrink_T1 = jnp.exp(scores_TS - base_T1), jnp.exp(old_max_T1 - base_T1)
    max_T1[...] = new_max_T1
    total_T1[...] = total_T1[...] * shrink_T1 + weights_TS.sum(1, keepdims=True)
    sum_TV[...] = sum_TV[...] * shrink_T1 + dot(weights_TS.astype(v_SV.dtype), v_SV[...])

  pair.computes(body)

  @pl.when(pair.changes(0, 1))
  def _():
    total = total_T1[...]
    o_TV[...] = (sum_TV[...] / jnp.where(total == 0, 1, total)).astype(o_TV.dtype)
    lse_1T[...] = mosaic_tpu.row_of_column(max_T1[...] + jnp.log(total))


def _backward(pair, q_TH, k_SH, v_SV, do_TV, lse_1T, shift_1T, dq_TH, dk_SH, dv_SV, sum_dq_TH, sum_dk_SH, sum_dv_SV,
              ids_S1, *, scale):
  @pl.when(pair.p == 0)
  def _():
    sum_dq_TH[...] = jnp.zeros_like(sum_dq_TH)

  @pl.when(pair.changes(1, -1))
  def _():
    sum_dk_SH[...] = jnp.zeros_like(sum_dk_SH)
    sum_dv_SV[...] = jnp.zeros_like(sum_dv_SV)
    if pair.ids:
      ids_S1[...] = mosaic_tpu.column_of_row(pair.ids[1][...])

  def body(masked):
    scores_ST = scale * dot(k_SH[...], q_TH[...], (1, 1))
    if masked:
      seen = pair.visible(_iota(scores_ST.shape, 1), _iota(scores_ST.shape, 0), *(
        (ids_S1[...], pair.ids[0][...]) if pair.ids else (None, None)))
      scores_ST = jnp.where(seen, scores_ST, -jnp.inf)
    p_ST = jnp.exp(scores_ST - lse_1T[...])
    sum_dv_SV[...] += dot(p_ST.astype(do_TV.dtype), do_TV[...])
    dp_ST = dot(v_SV[...], do_TV[...], (1, 1))
    ds_ST = (p_ST * (dp_ST + shift_1T[...])).astype(q_TH.dtype)
    sum_dk_SH[...] += dot(ds_ST, q_TH[...])
    block = q_TH.shape[0]
    rows = pl.ds(pl.multiple_of(pair.i * block, block), block)
    sum_dq_TH[rows, :] += dot(ds_ST, k_SH[...], (0, 0))

  pair.computes(body)

  @pl.when(pair.changes(1, 1))
  def _():
    dk_SH[...] = (sum_dk_SH[...] * scale).astype(dk_SH.dtype)
    dv_SV[...] = sum_dv_SV[...].astype(dv_SV.dtype)

  @pl.when(pair.p == pair.pairs - 1)
  def _():
    dq_TH[...] = (sum_dq_TH[...] * scale).astype(dq_TH.dtype)

"""Attention as one scan over the pairs (block of queries, block of keys) that can see each other.

Forward is the online softmax; backward recomputes the probabilities from the log-sum-exp (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2). A pair's scores are all that is stored of the score matrix, a causal program skips the
pairs above the diagonal, and the compiled program is no larger for long sequences than for short ones. Y counts blocks.

On a CPU short sequences have no scan: each block of queries, now a band, meets all keys that it sees at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

BLOCK = {'cpu': 64, 'gpu': 512, 'tpu': 512}  # most queries, and most keys, of a block
BANDED = {'cpu': 10, 'gpu': 0, 'tpu': 0}  # most pairs that are computed in bands


def forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  """(o_BTNV, lse_BTN)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  run = _forward_in_bands if grid.banded else _forward_in_pairs
  return run(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale)


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  # d score = p (do.v - do.o + dlse): the softmax's own two terms and the log-sum-exp's, whose gradient is p.
  shift_BTN = dlse_BTN - _dot('BTNV,BTNV->BTN', do_BTNV, o_BTNV)
  run = _backward_in_bands if grid.banded else _backward_in_pairs
  return run(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, lse_BTN, do_BTNV, shift_BTN)


def _forward_in_pairs(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale):
  q_YBNTH, k_YBNSH, v_YBNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  segments = q_segments if q_segments is None else (grid.queries(q_segments), grid.keys(kv_segments))

  def pair(carry, blocks):
    i, j = blocks
    old_max, total, o_BNTV = (_block(x, i) for x in carry)
    scores = grid.pair_scores(i, j, q_YBNTH, k_YBNSH, segments, scale)
    new_max = jnp.maximum(old_max, scores.max(-1))
    base = jnp.where(new_max == -jnp.inf, 0, new_max)  # a row that has seen no key yet: exp(-inf - 0) = 0
    weights, shrink = jnp.exp(scores - base[..., None]), jnp.exp(old_max - base)
    part = _dot('BNTS,BNSV->BNTV', weights.astype(v_BSNV.dtype), _block(v_YBNSV, j))
    new = new_max, total * shrink + weights.sum(-1), o_BNTV * shrink[..., None] + part
    return tuple(_block(x, i, y) for x, y in zip(carry, new, strict=True)), None

  row = q_YBNTH.shape[:4]
  carry = (jnp.full(row, -jnp.inf, jnp.float32), jnp.zeros(row, jnp.float32),
           jnp.zeros((*row, v_BSNV.shape[3]), jnp.float32))
  max_YBNT, total_YBNT, o_YBNTV = grid.scan(pair, carry)
  o_YBNTV = o_YBNTV / jnp.where(total_YBNT == 0, 1, total_YBNT)[..., None]
  t = q_BTNH.shape[1]
  return _join(o_YBNTV, t).astype(q_BTNH.dtype), _join(max_YBNT + jnp.log(total_YBNT), t)


def _backward_in_pairs(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, lse_BTN, do_BTNV, shift_BTN):
  q_YBNTH, k_YBNSH, v_YBNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  segments = q_segments if q_segments is None else (grid.queries(q_segments), grid.keys(kv_segments))
  do_YBNTV = grid.queries(do_BTNV)
  shift_YBNT = grid.queries(shift_BTN)
  lse_YBNT = grid.queries(jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN))

  def pair(carry, blocks):
    i, j = blocks
    dq_YBNTH, dk_YBNSH, dv_YBNSV = carry
    q, k, do = _block(q_YBNTH, i), _block(k_YBNSH, j), _block(do_YBNTV, i)
    p = jnp.exp(grid.pair_scores(i, j, q_YBNTH, k_YBNSH, segments, scale) - _block(lse_YBNT, i)[..., None])
    dp = _dot('BNTV,BNSV->BNTS', do, _block(v_YBNSV, j))
    ds = (p * (dp + _block(shift_YBNT, i)[..., None]) * scale).astype(q.dtype)
    dq = _dot('BNTS,BNSH->BNTH', ds, k)
    dk = _dot('BNTS,BNTH->BNSH', ds, q)
    dv = _dot('BNTS,BNTV->BNSV', p.astype(v_BSNV.dtype), do)
    return (_block(dq_YBNTH, i, _block(dq_YBNTH, i) + dq), _block(dk_YBNSH, j, _block(dk_YBNSH, j) + dk),
            _block(dv_YBNSV, j, _block(dv_YBNSV, j) + dv)), None

  carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_YBNTH, k_YBNSH, v_YBNSV))
  return tuple(_join(dx, x.shape[1]).astype(x.dtype)
               for dx, x in zip(grid.scan(pair, carry), (q_BTNH, k_BSNH, v_BSNV), strict=True))


def _forward_in_bands(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale):
  v_BNSV, bands = v_BSNV.swapaxes(1, 2), _bands(grid, q_BTNH, k_BSNH, q_segments, kv_segments, scale)
  o = [_dot('BNTS,BNSV->BNTV', b.weights.astype(v_BSNV.dtype), v_BNSV[:, :, :b.seen]) * b.inverse for b in bands]
  lse = [b.base + jnp.log(b.total) for b in bands]
  return (jnp.concatenate(o, axis=2).swapaxes(1, 2).astype(q_BTNH.dtype),
          jnp.concatenate(lse, axis=2)[..., 0].swapaxes(1, 2))


def _backward_in_bands(grid, q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, lse_BTN, do_BTNV, shift_BTN):
  """Begins as forward does, so that a compiler that sees both computes the weights once."""
  del lse_BTN
  k_BNSH, v_BNSV, do_BNTV = (x.swapaxes(1, 2) for x in (k_BSNH, v_BSNV, do_BTNV))
  # Transposed: XLA for CPUs has its faster product only if the left operand's last axis is the one summed over.
  q_BNHT, do_BNVT = (x.transpose(0, 2, 3, 1) for x in (q_BTNH, do_BTNV))
  shift_BNT1 = shift_BTN.swapaxes(1, 2)[..., None]
  dq, dk_BNHS, dv_BNVS = [], 0, 0
  for b in _bands(grid, q_BTNH, k_BSNH, q_segments, kv_segments, scale):
    dp = _dot('BNTV,BNSV->BNTS', do_BNTV[:, :, b.rows], v_BNSV[:, :, :b.seen])
    ds = (b.weights * ((dp + shift_BNT1[:, :, b.rows]) * (scale * b.inverse))).astype(q_BTNH.dtype)
    dq.append(_dot('BNTS,BNSH->BNTH', ds, k_BNSH[:, :, :b.seen]))
    scaled_BNVT = (do_BNVT[..., b.rows] * b.inverse.swapaxes(2, 3)).astype(v_BSNV.dtype)
    unseen = [(0, 0), (0, 0), (0, 0), (0, grid.s - b.seen)]
    dk_BNHS += jnp.pad(_dot('BNHT,BNTS->BNHS', q_BNHT[..., b.rows], ds), unseen)
    dv_BNVS += jnp.pad(_dot('BNVT,BNTS->BNVS', scaled_BNVT, b.weights.astype(v_BSNV.dtype)), unseen)
  return (jnp.concatenate(dq, axis=2).swapaxes(1, 2).astype(q_BTNH.dtype),
          dk_BNHS.transpose(0, 3, 1, 2).astype(k_BSNH.dtype), dv_BNVS.transpose(0, 3, 1, 2).astype(v_BSNV.dtype))


class _Band(NamedTuple):
  """Some queries, and the softmax of their scores in parts; the last axis of the parts has 1 or `seen` keys."""

  rows: slice
  seen: int  # keys 0 .. seen - 1 are all that the band can see, masks apart
  weights: jax.Array  # exp(scores - base)
  base: jax.Array  # the largest score; 0 if there is none
  total: jax.Array  # the sum of the weights
  inverse: jax.Array  # 1 / total; 1 if that is 0


def _bands(grid, q_BTNH, k_BSNH, q_segments, kv_segments, scale):
  q_BNTH, k_BNSH = q_BTNH.swapaxes(1, 2), k_BSNH.swapaxes(1, 2)
  out = []
  for first in range(0, grid.t, grid.q_block):
    rows = slice(first, min(first + grid.q_block, grid.t))
    seen = max(1, min(grid.s, rows.stop + grid.s - grid.t)) if grid.causal else grid.s
    segments = None if q_segments is None else (q_segments[:, rows], kv_segments[:, :seen])
    scores = grid.scores(first, 0, q_BNTH[:, :, rows], k_BNSH[:, :, :seen], segments, scale)
    largest = scores.max(-1, keepdims=True)
    base = jnp.where(largest == -jnp.inf, 0, largest)  # a row that sees no key: exp(-inf - 0) = 0
    weights = jnp.exp(scores - base)
    total = weights.sum(-1, keepdims=True)
    out.append(_Band(rows, seen, weights, base, total, 1 / jnp.where(total == 0, 1, total)))
  return out


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class _Grid:
  """Queries and keys cut into blocks: which pairs of blocks are computed, and what a pair's scores are."""

  def __init__(self, q_BTNH, k_BSNH, causal):
    self.t, self.s, self.causal = q_BTNH.shape[1], k_BSNH.shape[1], causal
    self.varying = dispatch.varying_axes(q_BTNH)
    platform = dispatch.platform(q_BTNH)
    self.q_block, self.k_block = (-(-n // -(-n // BLOCK[platform])) for n in (self.t, self.s))
    # Those with a visible key.
    self.pairs = [(i, j) for i in range(-(-self.t // self.q_block)) for j in range(-(-self.s // self.k_block))
                  if not causal or j * self.k_block < (i + 1) * self.q_block + self.s - self.t]
    self.banded = len(self.pairs) <= BANDED[platform]

  def queries(self, x_BTN):
    """An array with an axis of queries, padded with zeros to whole blocks and cut: [Y, B, N, block, ...]."""
    return _cut(x_BTN, self.q_block)

  def keys(self, x_BSN):
    return _cut(x_BSN, self.k_block)

  def scan(self, pair, carry):
    """carry after pair(carry, (i, j)) for all pairs of blocks with a visible key."""
    carry, _ = jax.lax.scan(pair, dispatch.vary(carry, self.varying), tuple(np.array(self.pairs, np.int32).T))
    return carry

  def scores(self, first_t, first_s, q_BNTH, k_BNSH, segments, scale):
    """Of queries from first_t and keys from first_s on, -inf where a key is not seen; segments are of those alone."""
    scores_BNTS = scale * _dot('BNTH,BNSH->BNTS', q_BNTH, k_BNSH)
    last_T1 = self.s - 1
    if self.causal:
      last_T1 = jnp.minimum(first_t + jnp.arange(q_BNTH.shape[2])[:, None] + self.s - self.t, last_T1)
    sees_BTS = (first_s + jnp.arange(k_BNSH.shape[2]) <= last_T1)[None]
    if segments is not None:
      sees_BTS &= segments[0][:, :, None] == segments[1][:, None]
    return jnp.where(sees_BTS[:, None], scores_BNTS, -jnp.inf)

  def pair_scores(self, i, j, q_YBNTH, k_YBNSH, segments, scale):
    segments = segments if segments is None else (_block(segments[0], i), _block(segments[1], j))
    return self.scores(i * self.q_block, j * self.k_block, _block(q_YBNTH, i), _block(k_YBNSH, j), segments, scale)


def _cut(x, block):
  """[B, T, ...] to [Y, B, block], or to [Y, B, N, block, ...]: what a pair of blocks reads and writes lies together."""
  x = jnp.pad(x, [(0, -x.shape[1] % block if axis == 1 else 0) for axis in range(x.ndim)])
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)
  return x.swapaxes(2, 3) if x.ndim > 3 else x


def _join(x, length):
  """[Y, B, N, block, ...] back to [B, length, N, ...]."""
  x = x.swapaxes(2, 3).swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _block(x_Y, index, new=None):
  """One block, or, given another for its place, the array with that one."""
  if new is None:
    return jax.lax.dynamic_index_in_dim(x_Y, index, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(x_Y, new, index, 0)

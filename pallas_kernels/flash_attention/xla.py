"""Attention as one scan over the pairs (block of queries, block of keys) that can see each other.

Forward is the online softmax; backward recomputes the probabilities from the log-sum-exp (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2). A pair's scores are all that is stored of the score matrix, a causal program skips the
pairs above the diagonal, and the compiled program is as small for long sequences as for short ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

BLOCK = {'cpu': 64, 'gpu': 512, 'tpu': 512}  # most queries, and most keys, of a block


def forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  """(o_BTNV, lse_BTN)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  q_BNTH, k_BNSH, v_BNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  segments = q_segments if q_segments is None else (grid.queries(q_segments), grid.keys(kv_segments))

  def pair(carry, starts):
    max_BNT, total_BNT, o_BNTV = carry
    q_rows, k_rows = grid.rows(starts)
    scores = grid.scores(starts, q_BNTH, k_BNSH, segments, scale)
    old_max = q_rows(max_BNT)
    new_max = jnp.maximum(old_max, scores.max(-1))
    base = jnp.where(new_max == -jnp.inf, 0, new_max)  # a row that has seen no key yet: exp(-inf - 0) = 0
    weights, shrink = jnp.exp(scores - base[..., None]), jnp.exp(old_max - base)
    part = _dot('BNTS,BNSV->BNTV', weights.astype(v_BNSV.dtype), k_rows(v_BNSV))
    return (q_rows(max_BNT, new_max), q_rows(total_BNT, q_rows(total_BNT) * shrink + weights.sum(-1)),
            q_rows(o_BNTV, q_rows(o_BNTV) * shrink[..., None] + part)), None

  row = q_BNTH.shape[:3]
  carry = (jnp.full(row, -jnp.inf, jnp.float32), jnp.zeros(row, jnp.float32),
           jnp.zeros((*row, v_BNSV.shape[3]), jnp.float32))
  max_BNT, total_BNT, o_BNTV = grid.scan(pair, carry)
  o_BNTV = o_BNTV / jnp.where(total_BNT == 0, 1, total_BNT)[..., None]
  lse_BNT = max_BNT + jnp.log(total_BNT)
  t = q_BTNH.shape[1]
  return o_BNTV.swapaxes(1, 2)[:, :t].astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)[:, :t]


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  q_BNTH, k_BNSH, v_BNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  segments = q_segments if q_segments is None else (grid.queries(q_segments), grid.keys(kv_segments))
  do_BNTV = grid.queries(do_BTNV)
  # d score = p (do.v - do.o + dlse): the softmax's own two terms and the log-sum-exp's, whose gradient is p.
  shift_BNT = grid.queries(dlse_BTN - _dot('BTNV,BTNV->BTN', do_BTNV, o_BTNV))
  lse_BNT = grid.queries(jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN))

  def pair(carry, starts):
    dq_BNTH, dk_BNSH, dv_BNSV = carry
    q_rows, k_rows = grid.rows(starts)
    scores = grid.scores(starts, q_BNTH, k_BNSH, segments, scale)
    p = jnp.exp(scores - q_rows(lse_BNT)[..., None])
    dp = _dot('BNTV,BNSV->BNTS', q_rows(do_BNTV), k_rows(v_BNSV))
    ds = (p * (dp + q_rows(shift_BNT)[..., None]) * scale).astype(q_BNTH.dtype)
    dq = _dot('BNTS,BNSH->BNTH', ds, k_rows(k_BNSH))
    dk = _dot('BNTS,BNTH->BNSH', ds, q_rows(q_BNTH))
    dv = _dot('BNTS,BNTV->BNSV', p.astype(v_BNSV.dtype), q_rows(do_BNTV))
    return (q_rows(dq_BNTH, q_rows(dq_BNTH) + dq), k_rows(dk_BNSH, k_rows(dk_BNSH) + dk),
            k_rows(dv_BNSV, k_rows(dv_BNSV) + dv)), None

  carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BNTH, k_BNSH, v_BNSV))
  gradients = grid.scan(pair, carry)
  return tuple(dx.swapaxes(1, 2)[:, :x.shape[1]].astype(x.dtype)
               for dx, x in zip(gradients, (q_BTNH, k_BSNH, v_BSNV), strict=True))


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class _Grid:
  """Queries and keys cut into blocks: which pairs of blocks are computed, and what a pair's scores are."""

  def __init__(self, q_BTNH, k_BSNH, causal):
    self.t, self.s, self.causal = q_BTNH.shape[1], k_BSNH.shape[1], causal
    self.varying = dispatch.varying_axes(q_BTNH)
    block = BLOCK[dispatch.platform(q_BTNH)]
    self.q_block, self.k_block = (-(-n // -(-n // block)) for n in (self.t, self.s))

  def queries(self, x_BTN):
    """An array with an axis of queries, heads before positions, padded with zeros to whole blocks."""
    return _heads_first(x_BTN, -self.t % self.q_block)

  def keys(self, x_BSN):
    return _heads_first(x_BSN, -self.s % self.k_block)

  def scan(self, pair, carry):
    """carry after pair(carry, (q_start, k_start)) for all pairs with a visible key."""
    starts = [(i, j) for i in range(0, self.t, self.q_block) for j in range(0, self.s, self.k_block)
              if not self.causal or j < i + self.q_block + self.s - self.t]
    carry, _ = jax.lax.scan(pair, dispatch.vary(carry, self.varying), tuple(np.array(starts, np.int32).T))
    return carry

  def rows(self, starts, axis=2):
    """(q_rows, k_rows): f(x) slices the pair's block of x, f(x, new) writes it."""
    return _rows(starts[0], self.q_block, axis), _rows(starts[1], self.k_block, axis)

  def scores(self, starts, q_BNTH, k_BNSH, segments, scale):
    q_rows, k_rows = self.rows(starts)
    scores_BNTS = scale * _dot('BNTH,BNSH->BNTS', q_rows(q_BNTH), k_rows(k_BNSH))
    last_T1 = self.s - 1
    if self.causal:
      last_T1 = jnp.minimum(starts[0] + jnp.arange(self.q_block)[:, None] + self.s - self.t, last_T1)
    sees_BTS = (starts[1] + jnp.arange(self.k_block) <= last_T1)[None]
    if segments is not None:
      q_rows, k_rows = self.rows(starts, axis=1)
      sees_BTS &= q_rows(segments[0])[:, :, None] == k_rows(segments[1])[:, None]
    return jnp.where(sees_BTS[:, None], scores_BNTS, -jnp.inf)


def _heads_first(x, padding):
  x = jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)])
  return x.swapaxes(1, 2) if x.ndim > 2 else x


def _rows(start, size, axis):
  def slice_or_write(x, new=None):
    if new is None:
      return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis)

  return slice_or_write

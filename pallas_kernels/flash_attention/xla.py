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

  def pair(carry, starts):
    max_BNT, total_BNT, o_BNTV = carry
    q_rows, k_rows = grid.rows(starts)
    scores = grid.scores(starts, q_BNTH, k_BNSH, q_segments, kv_segments, scale)
    old_max = q_rows(max_BNT)
    new_max = jnp.maximum(old_max, scores.max(-1))
    base = jnp.where(new_max == -jnp.inf, 0, new_max)  # a row that has seen no key yet: exp(-inf - 0) = 0
    weights, shrink = jnp.exp(scores - base[..., None]), jnp.exp(old_max - base)
    part = _dot('BNTS,BNSV->BNTV', weights.astype(v_BNSV.dtype), k_rows(v_BNSV))
    return (q_rows(max_BNT, new_max), q_rows(total_BNT, q_rows(total_BNT) * shrink + weights.sum(-1)),
            q_rows(o_BNTV, q_rows(o_BNTV) * shrink[..., None] + part)), None

  row = q_BNTH.shape[:3]
  carry = jnp.full(row, -jnp.inf), jnp.zeros(row), jnp.zeros((*row, v_BNSV.shape[3]))
  max_BNT, total_BNT, o_BNTV = grid.scan(pair, carry)
  o_BNTV = o_BNTV / jnp.where(total_BNT == 0, 1, total_BNT)[..., None]
  lse_BNT = max_BNT + jnp.log(total_BNT)
  t = q_BTNH.shape[1]
  return o_BNTV.swapaxes(1, 2)[:, :t].astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)[:, :t]


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  grid = _Grid(q_BTNH, k_BSNH, causal)
  q_BNTH, k_BNSH, v_BNSV = grid.queries(q_BTNH), grid.keys(k_BSNH), grid.keys(v_BSNV)
  do_BNTV = grid.queries(do_BTNV)
  # d score = p (do.v - do.o + dlse): the softmax's own two terms and the log-sum-exp's, whose gradient is p.
  shift_BNT = grid.queries(dlse_BTN - _dot('BTNV,BTNV->BTN', do_BTNV, o_BTNV))
  lse_BNT = grid.queries(jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN))

  def pair(carry, starts):
    dq_BNTH, dk_BNSH, dv_BNSV = carry
    q_rows, k_rows = grid.rows(starts)
    scores = grid.scores(starts, q_BNTH, k_BNSH, q_segments, kv_segments, scale)
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
  """How queries and keys are cut into blocks. Arrays are padded with zeros to whole blocks, heads before positions."""

  def __init__(self, q_BTNH, k_BSNH, causal):
    self.t, self.s, self.causal = q_BTNH.shape[1], k_BSNH.shape[1], causal
    self.varying = dispatch.varying_axes(q_BTNH)
    block = BLOCK[dispatch.platform(q_BTNH)]
    self.q_block, self.k_block = (-(-n // -(-n // block)) for n in (self.t, self.s))

  def queries(self, x_BTN, axis=1):
    return self._padded(x_BTN, axis, -self.t % self.q_block)

  def keys(self, x_BSN, axis=1):
    return self._padded(x_BSN, axis, -self.s % self.k_block)

  def _padded(self, x, axis, amount):
    x = jnp.pad(x, [(0, amount if i == axis else 0) for i in range(x.ndim)])
    return x.swapaxes(1, 2) if x.ndim > 2 else x

  def rows(self, starts, axis=2):
    """q_rows, k_rows: each slices the pair's block of an array, or writes it."""
    def rows(start, size):
      def slice_or_write(x, new=None):
        if new is None:
          return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis)
      return slice_or_write

    return rows(starts[0], self.q_block), rows(starts[1], self.k_block)

  def scores(self, starts, q_BNTH, k_BNSH, q_segments, kv_segments, scale):
    q_rows, k_rows = self.rows(starts)
    scores_BNTS = scale * _dot('BNTH,BNSH->BNTS', q_rows(q_BNTH), k_rows(k_BNSH))
    key = starts[1] + jnp.arange(self.k_block)
    last = self.s - 1
    if self.causal:
      last = jnp.minimum(starts[0] + jnp.arange(self.q_block) + self.s - self.t, last)[:, None]
    sees_BTS = (key <= last)[None]
    if q_segments is not None:
      q_rows, k_rows = self.rows(starts, axis=1)
      same_BTS = q_rows(self.queries(q_segments))[:, :, None] == k_rows(self.keys(kv_segments))[:, None]
      sees_BTS = sees_BTS & same_BTS
    return jnp.where(sees_BTS[:, None], scores_BNTS, -jnp.inf)

  def scan(self, pair, carry):
    starts = [(i, j) for i in range(0, self.t, self.q_block) for j in range(0, self.s, self.k_block)
              if not self.causal or j < i + self.q_block + self.s - self.t]
    q_starts, k_starts = np.array(starts, np.int32).T
    carry, _ = jax.lax.scan(pair, dispatch.vary(carry, self.varying), (q_starts, k_starts))
    return carry

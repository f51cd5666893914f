"""Attention over blocks of queries: only the keys a block can see are multiplied, and the scores of one block are all
that is ever in memory. The backward pass recomputes the probabilities from the log-sum-exp (FlashAttention-2, 2.3).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# Causal queries are cut into at most SPANS spans, unrolled, each with its own number of keys (8 spans multiply 9/16
# of the square). Within a span, blocks of queries are scanned when the span's scores would take over SCORE_BYTES.
SPANS, SPAN_UNIT, SCORE_BYTES = 8, 128, 1 << 28


def forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  """(o_BTNV, lse_BTN)."""
  q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNV))

  def block(rows, keys, carry):
    o, lse = carry
    scores = _scores(rows, keys, q, k, q_segments, kv_segments, scale, causal)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    part = jnp.einsum('BNTS,BNSV->BNTV', weights.astype(v.dtype), v[:, :, :keys], preferred_element_type=jnp.float32)
    part = part / jnp.where(total == 0, 1, total)
    return rows(o, 2, part.astype(o.dtype)), rows(lse, 2, (top + jnp.log(total))[..., 0])

  o, lse = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
  o, lse = _each_block(block, (o, lse), q, k, causal)
  return o.swapaxes(1, 2), lse.swapaxes(1, 2)


def backward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN):
  """(dq_BTNH, dk_BSNH, dv_BSNV)."""
  q, k, v, o, do, lse, dlse = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNV, o_BTNV, do_BTNV, lse_BTN, dlse_BTN))
  # d score = p * (do.v - do.o + dlse): the softmax's own term and the log-sum-exp's, whose gradient is p.
  shift = dlse - jnp.einsum('BNTV,BNTV->BNT', do, o, preferred_element_type=jnp.float32)
  lse = jnp.where(lse == -jnp.inf, 0, lse)

  def block(rows, keys, carry):
    dq, dk, dv = carry
    do_rows, k_keys, v_keys = rows(do, 2), k[:, :, :keys], v[:, :, :keys]
    scores = _scores(rows, keys, q, k, q_segments, kv_segments, scale, causal)
    p = jnp.exp(scores - rows(lse, 2)[..., None])
    dp = jnp.einsum('BNTV,BNSV->BNTS', do_rows, v_keys, preferred_element_type=jnp.float32)
    ds = (p * (dp + rows(shift, 2)[..., None]) * scale).astype(q.dtype)
    p = p.astype(v.dtype)
    dv = dv.at[:, :, :keys].add(jnp.einsum('BNTS,BNTV->BNSV', p, do_rows, preferred_element_type=jnp.float32))
    dk = dk.at[:, :, :keys].add(jnp.einsum('BNTS,BNTH->BNSH', ds, rows(q, 2), preferred_element_type=jnp.float32))
    dq_rows = jnp.einsum('BNTS,BNSH->BNTH', ds, k_keys, preferred_element_type=jnp.float32)
    return rows(dq, 2, dq_rows.astype(dq.dtype)), dk, dv

  carry = jnp.zeros_like(q), jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  dq, dk, dv = _each_block(block, carry, q, k, causal)
  return dq.swapaxes(1, 2), dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)


def _scores(rows, keys, q, k, q_segments, kv_segments, scale, causal):
  scores = scale * jnp.einsum('BNTH,BNSH->BNTS', rows(q, 2), k[:, :, :keys], preferred_element_type=jnp.float32)
  sees = None
  if causal:
    last_key = jnp.arange(q.shape[2]) + k.shape[2] - q.shape[2]
    sees = (jnp.arange(keys) <= rows(last_key, 0)[:, None])[None]
  if q_segments is not None:
    same = rows(q_segments, 1)[:, :, None] == kv_segments[:, None, :keys]
    sees = same if sees is None else sees & same
  return scores if sees is None else jnp.where(sees[:, None], scores, -jnp.inf)


def _each_block(block, carry, q, k, causal):
  """carry after block(rows, keys, carry) for each block of queries.

  rows(x, axis) slices the block's queries, rows(x, axis, new) writes them; keys is the number of keys, a Python int,
  that its last query can see.
  """
  batch, heads, t, _ = q.shape
  s = k.shape[2]
  carry = dispatch.vary(carry, dispatch.varying_axes(q))
  for start, end in _spans(t) if causal else [(0, t)]:
    keys = min(s, end + s - t) if causal else s
    if keys <= 0:
      continue
    size = _block_size(end - start, 4 * batch * heads * keys)

    def step(carry, first, size=size, keys=keys):
      def rows(x, axis, new=None):
        if new is None:
          return jax.lax.dynamic_slice_in_dim(x, first, size, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis)

      return block(rows, keys, carry), None

    if size == end - start:
      carry, _ = step(carry, start)
    else:
      carry, _ = jax.lax.scan(step, carry, jnp.arange(start, end, size))
  return carry


def _spans(t):
  """[(start, end)] of at most SPANS spans of whole units, and one of what is left over."""
  units = t // SPAN_UNIT
  count = min(SPANS, units)
  edges = [SPAN_UNIT * (units * i // count) for i in range(count + 1)] if count else [0]
  return list(zip(edges, edges[1:], strict=False)) + ([(edges[-1], t)] if edges[-1] < t else [])


def _block_size(span, bytes_a_query):
  sizes = [span, *(SPAN_UNIT >> i for i in range(5))]
  divisors = [size for size in sizes if span % size == 0]
  return next((size for size in divisors if size * bytes_a_query <= SCORE_BYTES), divisors[-1])

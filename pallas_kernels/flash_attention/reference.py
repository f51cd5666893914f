"""Attention with the whole score matrix, float32, differentiable by jax itself."""

import jax.numpy as jnp


def flash_attention(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
  scores_BNTS = scale * jnp.einsum(
    'BTNH,BSNH->BNTS', q_BTNH.astype(jnp.float32), k_BSNH.astype(jnp.float32), precision='highest')
  t, s = scores_BNTS.shape[2:]
  sees_BNTS = jnp.ones((1, 1, t, s), bool)
  if causal:
    sees_BNTS &= jnp.arange(s) <= jnp.arange(t)[:, None] + s - t
  if q_segments is not None:
    sees_BNTS &= (q_segments[:, :, None] == kv_segments[:, None])[:, None]
  scores_BNTS = jnp.where(sees_BNTS, scores_BNTS, -jnp.inf)
  some_BNT1 = sees_BNTS.any(-1, keepdims=True)
  max_BNT1 = jnp.where(some_BNT1, scores_BNTS.max(-1, keepdims=True), 0)
  weights_BNTS = jnp.exp(scores_BNTS - max_BNT1)
  total_BNT1 = jnp.where(some_BNT1, weights_BNTS.sum(-1, keepdims=True), 1)
  o_BTNV = jnp.einsum('BNTS,BSNV->BTNV', weights_BNTS / total_BNT1, v_BSNV.astype(jnp.float32), precision='highest')
  lse_BNT1 = jnp.where(some_BNT1, max_BNT1 + jnp.log(total_BNT1), -jnp.inf)
  return o_BTNV.astype(q_BTNH.dtype), lse_BNT1[..., 0].transpose(0, 2, 1)

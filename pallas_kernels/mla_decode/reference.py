"""Latent attention over a paged cache with the whole score matrix, float32."""

import jax.numpy as jnp


def mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, plan, scale, value_width):
  """Gathers every page of the table; `plan` has no meaning here."""
  del plan
  batch, t = q_BTNJ.shape[:2]
  cache_BSJ = pages_PSJ.astype(jnp.float32)[jnp.clip(table_BP, 0, len(pages_PSJ) - 1)].reshape(
    batch, -1, q_BTNJ.shape[3])
  key_S = jnp.arange(cache_BSJ.shape[1])
  cache_BSJ = jnp.where((key_S < lengths_B[:, None])[..., None], cache_BSJ, 0)
  scores_BTNS = scale * jnp.einsum('BTNJ,BSJ->BTNS', q_BTNJ.astype(jnp.float32), cache_BSJ, precision='highest')
  sees_BT1S = (key_S < (lengths_B[:, None] - t + jnp.arange(t) + 1)[..., None])[:, :, None]
  some_BT11 = sees_BT1S.any(-1, keepdims=True)
  scores_BTNS = jnp.where(sees_BT1S, scores_BTNS, -jnp.inf)
  max_BTN1 = jnp.where(some_BT11, scores_BTNS.max(-1, keepdims=True), 0)
  weights_BTNS = jnp.exp(scores_BTNS - max_BTN1)
  total_BTN1 = jnp.where(some_BT11, weights_BTNS.sum(-1, keepdims=True), 1)
  o_BTNC = jnp.einsum('BTNS,BSC->BTNC', weights_BTNS / total_BTN1, cache_BSJ[..., :value_width], precision='highest')
  lse_BTN1 = jnp.where(some_BT11, max_BTN1 + jnp.log(total_BTN1), -jnp.inf)
  return o_BTNC.astype(q_BTNJ.dtype), lse_BTN1[..., 0]

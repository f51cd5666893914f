"""Latent attention over a paged cache, chunk of pages by chunk of pages as far as the longest sequence reaches."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# Keys gathered at a time. A table that fits in one chunk needs no loop; a small chunk reads little past the end.
CHUNK_KEYS = {'cpu': 128, 'gpu': 1024, 'tpu': 1024}


def mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, plan, scale, value_width):
  """`plan`, the schedule of the kernels that split long sequences over a chip's cores, is ignored."""
  del plan
  batch, t, heads, width = q_BTNJ.shape
  page_size = pages_PSJ.shape[1]
  dtype = jnp.promote_types(q_BTNJ.dtype, pages_PSJ.dtype)
  # M = T N: the cache has one head, so a chunk is one matrix product a sequence.
  q_BMJ = q_BTNJ.reshape(batch, t * heads, width)
  limit_BM = jnp.repeat(lengths_B[:, None] - t + jnp.arange(t) + 1, heads, axis=1)
  chunk_pages = max(1, min(table_BP.shape[1], CHUNK_KEYS[dispatch.platform(q_BTNJ)] // page_size))
  chunk_keys = chunk_pages * page_size
  table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % chunk_pages)))

  def chunk(i, carry):
    max_BM1, total_BM1, o_BMC = carry
    page_BP = jax.lax.dynamic_slice_in_dim(table_BP, i * chunk_pages, chunk_pages, 1)
    cache_BSJ = jnp.take(pages_PSJ, page_BP, axis=0, mode='clip').reshape(batch, chunk_keys, width)
    key_S = i * chunk_keys + jnp.arange(chunk_keys)
    # Unused rows may hold anything, and 0 * NaN is NaN: they are cleared, not only given no weight.
    cache_BSJ = jnp.where((key_S < lengths_B[:, None])[..., None], cache_BSJ, 0).astype(dtype)
    scores_BMS = scale * jnp.einsum('BMJ,BSJ->BMS', q_BMJ.astype(dtype), cache_BSJ, preferred_element_type=jnp.float32)
    scores_BMS = jnp.where(key_S < limit_BM[..., None], scores_BMS, -jnp.inf)
    new_max_BM1 = jnp.maximum(max_BM1, scores_BMS.max(-1, keepdims=True))
    base_BM1 = jnp.where(new_max_BM1 == -jnp.inf, 0, new_max_BM1)
    weights_BMS = jnp.exp(scores_BMS - base_BM1)
    shrink_BM1 = jnp.exp(max_BM1 - base_BM1)
    part_BMC = jnp.einsum('BMS,BSC->BMC', weights_BMS.astype(dtype), cache_BSJ[..., :value_width],
                          preferred_element_type=jnp.float32)
    return new_max_BM1, total_BM1 * shrink_BM1 + weights_BMS.sum(-1, keepdims=True), o_BMC * shrink_BM1 + part_BMC

  column = (batch, t * heads, 1)
  carry = (jnp.full(column, -jnp.inf, jnp.float32), jnp.zeros(column, jnp.float32),
           jnp.zeros((batch, t * heads, value_width), jnp.float32))
  carry = dispatch.vary(carry, dispatch.varying_axes(q_BTNJ))
  if table_BP.shape[1] == chunk_pages:
    carry = chunk(0, carry)
  else:
    last = jnp.minimum(jnp.max(lengths_B), table_BP.shape[1] * page_size)
    carry = jax.lax.fori_loop(0, -(-last // chunk_keys), chunk, carry)
  max_BM1, total_BM1, o_BMC = carry
  o_BMC = o_BMC / jnp.where(total_BM1 == 0, 1, total_BM1)
  lse_BM1 = jnp.where(total_BM1 == 0, -jnp.inf, max_BM1 + jnp.log(total_BM1))
  return (o_BMC.astype(q_BTNJ.dtype).reshape(batch, t, heads, value_width), lse_BM1.reshape(batch, t, heads))

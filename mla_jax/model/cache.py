"""The paged cache: what every layer keeps of every token, in pages that a table assigns to sequences.

For MLA an entry is the normalised latent and the rotated shared key, C + R numbers; for the other attentions it is the
keys and values of all their heads. All layers lie in one array, layer-major, so that a scan over layers carries it and
updates it in place, and a layer is addressed by adding its offset to the table rather than by slicing out a copy.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """`pages_PSJ`: [layers x pages a layer, tokens a page, entry width]. `table_BP`: int32, a sequence's pages in order;
  it serves every layer. Main layers come first, then the MTP modules'."""

  pages_PSJ: jax.Array
  table_BP: jax.Array
  layers: int = dataclasses.field(metadata={'static': True})

  @property
  def page_size(self) -> int:
    return self.pages_PSJ.shape[1]

  @property
  def pages_per_layer(self) -> int:
    return self.pages_PSJ.shape[0] // self.layers

  @property
  def capacity(self) -> int:
    """Tokens a sequence's row of the table has room for."""
    return self.table_BP.shape[1] * self.page_size

  def layer_table(self, layer):
    return self.table_BP + layer * self.pages_per_layer

  def write(self, layer, entries_BTJ, positions_BT, valid_BT):
    """Stores new entries at their positions; those not valid are dropped."""
    page_BT = jnp.take_along_axis(self.table_BP, jnp.maximum(positions_BT, 0) // self.page_size, axis=1)
    # Out of bounds means dropped: that is how padding and positions past the capacity leave no trace.
    page_BT = jnp.where(valid_BT & (positions_BT < self.capacity), page_BT + layer * self.pages_per_layer,
                        self.pages_PSJ.shape[0])
    slot_BT = jnp.maximum(positions_BT, 0) % self.page_size
    pages_PSJ = self.pages_PSJ.at[page_BT, slot_BT].set(entries_BTJ.astype(self.pages_PSJ.dtype), mode='drop')
    return dataclasses.replace(self, pages_PSJ=pages_PSJ)

  def read(self, layer, lengths_B):
    """Entries right-aligned, [B, capacity, J]: the last slot is position lengths - 1. Slots before position 0 are
    zero; their mask comes second."""
    position_BS = lengths_B[:, None] - self.capacity + jnp.arange(self.capacity)
    page_BS = jnp.take_along_axis(self.layer_table(layer), jnp.maximum(position_BS, 0) // self.page_size, axis=1)
    entries_BSJ = self.pages_PSJ[page_BS, jnp.maximum(position_BS, 0) % self.page_size]
    valid_BS = position_BS >= 0
    return jnp.where(valid_BS[..., None], entries_BSJ, 0), valid_BS


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype, *, page_size: int = 64,
                mtp: bool = True) -> Cache:
  """Room for `capacity` tokens in each of `batch` sequences, each with pages of its own in order."""
  layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
  pages = -(-capacity // page_size)
  return Cache(pages_PSJ=jnp.zeros((layers * batch * pages, page_size, config.cache_width), dtype),
               table_BP=lax.iota(jnp.int32, batch * pages).reshape(batch, pages), layers=layers)


def bytes_per_token(config: ModelConfig, dtype, *, mtp: bool) -> int:
  """Read off the array the decoder would allocate, so that no formula can drift from the code."""
  cache = jax.eval_shape(lambda: empty_cache(config, 1, 1, dtype, page_size=1, mtp=mtp))
  return cache.pages_PSJ.size * cache.pages_PSJ.dtype.itemsize

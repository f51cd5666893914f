"""Multi-token prediction (V3 report, section 2.2): module d sees the hidden state of position i and the embedding of
token i + d, and predicts token i + d + 1 through the shared head.

The released weights concatenate the embedding first, though the paper prints the other order. The hidden state that
enters module 1 is the main model's after its final norm; what enters module d + 1, or a re-application while drafting,
is module d's after the module's own norm.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.axes import shard
from mla_jax.config import ModelConfig
from mla_jax.model.attention import Context
from mla_jax.model.block import Block
from mla_jax.model.cache import Cache
from mla_jax.model.layers import normal, ones, rms_norm


class MTPModule(nnx.Module):

  def __init__(self, config: ModelConfig, key):
    self.config = config
    keys = jax.random.split(key)
    self.norm_embedding_D = ones(config.hidden_size, 'D')
    self.norm_hidden_D = ones(config.hidden_size, 'D')
    self.wjoin_ZD = normal(keys[0], (2 * config.hidden_size, config.hidden_size), 'ZD', config.initializer_range)
    self.block = Block(config, moe=config.n_routed_experts > 0, key=keys[1])
    self.norm_D = ones(config.hidden_size, 'D')

  def __call__(self, hidden_BTD, embedding_BTD, bias_E, valid_BT, ctx: Context, cache: Cache | None = None, layer=0):
    """Returns (hidden after the module's norm, cache, Balance or None)."""
    with jax.named_scope('mtp'):
      epsilon = self.config.rms_norm_eps
      joined_BTZ = jnp.concatenate([rms_norm(embedding_BTD, self.norm_embedding_D[...], epsilon),
                                    rms_norm(hidden_BTD, self.norm_hidden_D[...], epsilon)], axis=-1)
      x_BTD = shard(jnp.einsum('BTZ,ZD->BTD', joined_BTZ, self.wjoin_ZD[...]), 'BTD')
      x_BTD, cache, seen = self.block(x_BTD, bias_E, valid_BT, ctx, cache, layer)
      return rms_norm(x_BTD, self.norm_D[...], epsilon), cache, seen

"""A transformer block, and how a stack of them is built and scanned."""

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.axes import letters_of, shard
from mla_jax.config import ModelConfig
from mla_jax.model.attention import Context, make_attention
from mla_jax.model.cache import Cache
from mla_jax.model.fp8 import is_fp8, ready
from mla_jax.model.layers import SwiGLU, ones, rms_norm
from mla_jax.model.moe import MixtureOfExperts

REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
  """Attention, then a feed-forward network, each behind its norm and added to the stream."""

  def __init__(self, config: ModelConfig, moe: bool, key):
    self.config = config
    keys = jax.random.split(key)
    self.norm_attention_D = ones(config.hidden_size, 'D')
    self.attention = make_attention(config, keys[0])
    self.norm_ffn_D = ones(config.hidden_size, 'D')
    self.ffn = MixtureOfExperts(config, keys[1]) if moe else SwiGLU(
        config.hidden_size, config.intermediate_size, config.initializer_range, keys[1])

  def __call__(self, x_BTD, bias_E, valid_BT, ctx: Context, cache: Cache | None = None, layer=0):
    """Returns (stream, cache, Balance, or None from a dense block)."""
    epsilon = self.config.rms_norm_eps
    y_BTD, cache = self.attention(rms_norm(x_BTD, self.norm_attention_D[...], epsilon), ctx, cache, layer)
    x_BTD = x_BTD + y_BTD
    h_BTD = rms_norm(x_BTD, self.norm_ffn_D[...], epsilon)
    if isinstance(self.ffn, SwiGLU):
      return x_BTD + shard(self.ffn(h_BTD), 'BTD'), cache, None
    y_BTD, seen = self.ffn(h_BTD, bias_E, valid_BT)
    return x_BTD + y_BTD, cache, seen


def build_stack(make, count: int, key):
  """`count` modules of one kind with their weights stacked on a leading axis. lax.map and not vmap: it initialises
  one at a time."""
  return jax.lax.map(make, jax.random.split(key, count))


def take(stack, index):
  """One module of a stack."""
  graph, weights = nnx.split(stack)
  return nnx.merge(graph, jax.tree.map(lambda w, letters: ready(w[index], letters), nnx.as_pure(weights),
                                       letters_of(weights), is_leaf=is_fp8))


def scan_stack(stack, count: int, x_BTD, bias_LE, valid_BT, ctx: Context, cache: Cache | None, first: int,
               remat: str = 'none', unroll: bool = False):
  """Applies a stack of blocks whose first is layer `first` of the cache. The cache travels in the carry, where XLA
  updates it in place. Returns (stream, cache, Balance with a leading layer axis, or None from dense blocks)."""
  graph, weights_L = nnx.split(stack)
  letters = letters_of(weights_L)

  def body(carry, layer_inputs):
    x_BTD, cache = carry
    weights, bias_E, layer = layer_inputs
    weights = jax.tree.map(ready, weights, letters, is_leaf=is_fp8)
    x_BTD, cache, seen = nnx.merge(graph, weights)(x_BTD, bias_E, valid_BT, ctx, cache, layer)
    return (x_BTD, cache), seen

  if remat != 'none':
    # In a loop nothing can be merged across passes; unrolled, merging would keep what was to be computed again.
    body = jax.checkpoint(body, prevent_cse=unroll, policy=REMAT_POLICIES[remat])
  layers_L = first + jnp.arange(count)
  (x_BTD, cache), seen = jax.lax.scan(body, (x_BTD, cache), (nnx.as_pure(weights_L), bias_LE, layers_L),
                                      unroll=unroll)
  return x_BTD, cache, seen

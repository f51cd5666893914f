"""What the tests of a whole model share: small configs, their jitted calls (compiled once a shape), ragged decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.axes import is_variable
from mla_jax.config import ModelConfig
from mla_jax.model import transformer
from mla_jax.model.cache import Cache

TINY = ModelConfig(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=12,
                   qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8, intermediate_size=24)
EXPERTS = dict(first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
               moe_intermediate_size=12, n_group=4, topk_group=2, routed_scaling_factor=2.5)
PAGE, PAGES = 4, 5  # tokens a page, pages a sequence

# Calls of at most 5 new tokens a row, which end at 11, 7 and 4 tokens: some rows short, one call with a row at rest.
CALLS = ((5, 3, 1), (4, 2, 0), (2, 2, 3))
CHUNK = 5


def config(**changes) -> ModelConfig:
  made = dataclasses.replace(TINY, **changes)
  made.validate()
  return made


class Model:
  """A random model (from NumPy: running the initialisers one by one would compile each) and its calls."""

  def __init__(self, config: ModelConfig, seed: int = 0):
    self.config = config
    random = np.random.default_rng(seed)

    def fill(path, variable):
      values = random.standard_normal(variable.shape)
      # The selection bias is below zero, so that a masked score of 0 would win.
      mean, std = (1, 0.2) if 'norm' in path[-1].key else (-1.5, 0.1) if 'bias' in path[-1].key else (0, 0.2)
      return (mean + std * values).astype(np.float32)

    self.graph, params, buffers = transformer.abstract(config)
    self.params, self.buffers = (jax.tree_util.tree_map_with_path(fill, tree, is_leaf=is_variable)
                                 for tree in (params, buffers))

  def forward(self, tokens_BU, positions_BT, segments_BT, *, buffers=None):
    """Logits of the first T tokens, from the model and from each module. `buffers`: in place of the model's own."""
    return self._forward(self.params, buffers or self.buffers, tokens_BU, positions_BT, segments_BT)

  def cached(self, cache, tokens_BU, lengths_B, new_B, **options):
    """The cache after T new tokens a row, and their logits as from `forward`."""
    return self._cached(self.params, self.buffers, cache, tokens_BU, lengths_B, new_B, **options)

  @functools.cached_property
  def _forward(self):
    @jax.jit
    def run(params, buffers, tokens_BU, positions_BT, segments_BT):
      model = nnx.merge(self.graph, params, buffers)
      length = positions_BT.shape[1]
      hidden_BTD, _ = model.hidden(tokens_BU[:, :length], positions_BT, segments_BT)
      out = [model.logits(hidden_BTD)]
      for depth in range(1, self.config.num_nextn_predict_layers + 1):
        hidden_BTD, _ = model.mtp_hidden(depth, hidden_BTD, tokens_BU[:, depth:depth + length], positions_BT,
                                         segments_BT, segments_BT > 0)
        out.append(model.logits(hidden_BTD))
      return out

    return run

  @functools.cached_property
  def _cached(self):
    @functools.partial(jax.jit, static_argnames=('form', 'fresh'))
    def run(params, buffers, cache, tokens_BU, lengths_B, new_B, form='absorbed', fresh=False):
      model = nnx.merge(self.graph, params, buffers)
      depths = self.config.num_nextn_predict_layers
      length = tokens_BU.shape[1] - depths
      hidden_BTD, cache = model.cached(tokens_BU[:, :length], cache, lengths_B, new_B, form=form, fresh=fresh)
      out = [model.logits(hidden_BTD)]
      for depth in range(1, depths + 1):
        hidden_BTD, cache = model.mtp_cached(depth, hidden_BTD, tokens_BU[:, depth:depth + length], cache, lengths_B,
                                             new_B, form=form, fresh=fresh)
        out.append(model.logits(hidden_BTD))
      return cache, out

    return run


def scattered_cache(config: ModelConfig, batch: int, seed: int = 0) -> Cache:
  """Pages in no order, one page of the pool nobody's, and NaN in all that was never written."""
  layers, pool = config.num_hidden_layers + config.num_nextn_predict_layers, batch * PAGES + 1
  table = np.random.default_rng(seed).permutation(pool)[:batch * PAGES].reshape(batch, PAGES)
  return Cache(pages_PSJ=jnp.full((layers * pool, PAGE, config.cache_width), jnp.nan, jnp.float32),
               table_BP=jnp.asarray(table, jnp.int32), layers=layers)


def text(model: Model, batch: int, length: int) -> np.ndarray:
  """Tokens, with as many more as the MTP modules look ahead."""
  total = length + model.config.num_nextn_predict_layers
  return np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, total)).astype(np.int32)


def whole(model: Model, tokens_BU) -> list[np.ndarray]:
  batch, length = len(tokens_BU), tokens_BU.shape[1] - model.config.num_nextn_predict_layers
  positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
  return [np.asarray(out) for out in model.forward(tokens_BU, positions_BT, np.ones_like(positions_BT))]


def decode(model: Model, cache: Cache, tokens_BU, lengths_B, calls, chunk: int, form: str, fresh_first: bool = False):
  """Runs `calls` (new tokens of every row) in chunks padded on the left with garbage; yields, for every new token,
  (row, position, logits of the model and each module), and last the cache."""
  batch, depths = len(tokens_BU), model.config.num_nextn_predict_layers
  lengths_B, seen = np.array(lengths_B), []
  for i, new_B in enumerate(calls):
    lengths_B = lengths_B + np.array(new_B)
    chunk_BU = np.full((batch, chunk + depths), model.config.vocab_size - 1, np.int32)
    for row, (stop, new) in enumerate(zip(lengths_B, new_B, strict=True)):
      chunk_BU[row, chunk - new:] = tokens_BU[row, stop - new:stop + depths]
    cache, out = model.cached(cache, chunk_BU, lengths_B.astype(np.int32), np.array(new_B, np.int32), form=form,
                              fresh=fresh_first and i == 0)
    out = [np.asarray(o) for o in out]
    for row, (stop, new) in enumerate(zip(lengths_B, new_B, strict=True)):
      seen += [(row, stop - back, [o[row, chunk - back] for o in out]) for back in range(1, new + 1)]
  return seen, cache, lengths_B


def assert_same(seen, expected, tolerance: float = 2e-5):
  """`tolerance` is in standard deviations of the expected logits."""
  assert seen
  for row, position, out in seen:
    for depth, (ours, theirs) in enumerate(zip(out, expected, strict=True)):
      error = np.abs(ours - theirs[row, position]).max() / theirs.std()
      assert error < tolerance, f'row {row}, position {position}, depth {depth}: {error:.1e} standard deviations'

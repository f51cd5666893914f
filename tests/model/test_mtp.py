"""Multi-token prediction: over a cache and over a whole sequence, and what the modules share with the model."""

import functools

import jax
import numpy as np
import pytest
from model_cases import CALLS, CHUNK, EXPERTS, Model, assert_same, config, decode, scattered_cache, text, whole

LENGTH = 12
CONFIGS = {'moe': dict(num_nextn_predict_layers=2, q_lora_rank=16, **EXPERTS),
           'dense': dict(num_nextn_predict_layers=1)}


@functools.cache
def model_of(name) -> Model:
  return Model(config(**CONFIGS[name]))


@pytest.mark.parametrize('name', CONFIGS)
def test_cached_is_uncached(name):
  model = model_of(name)
  tokens_BU = text(model, 3, LENGTH)
  expected = whole(model, tokens_BU)
  assert len(expected) == 1 + model.config.num_nextn_predict_layers
  seen, *_ = decode(model, scattered_cache(model.config, 3), tokens_BU, [0, 0, 0], CALLS, CHUNK, 'absorbed')
  assert_same(seen, expected)


def test_modules_look_ahead_by_their_depth():
  """Module d at position i hangs on token i + d and on none after it."""
  model = model_of('moe')
  tokens_BU = text(model, 3, LENGTH)
  changed_BU = tokens_BU.copy()
  changed_BU[:, 8] = (changed_BU[:, 8] + 1) % model.config.vocab_size
  for depth, (before, after) in enumerate(zip(whole(model, tokens_BU), whole(model, changed_BU), strict=True)):
    moved = (before != after).any((0, 2))
    assert not moved[:8 - depth].any()
    assert moved[8 - depth]


def test_modules_share_embedding_and_head_and_nothing_else():
  model = model_of('moe')
  names = {'block', 'norm_embedding_D', 'norm_hidden_D', 'norm_D', 'wjoin_ZD'}
  assert set(model.params['mtp_modules']) == names
  assert {w.shape[0] for w in jax.tree.leaves(model.params['mtp_modules'])} == {2}
  assert model.buffers['bias_LE'].shape == (1 + 2, 8)  # a router of their own each


def test_every_module_uses_its_own_selection_bias():
  model = model_of('moe')
  tokens_BU = text(model, 3, LENGTH)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
  before = whole(model, tokens_BU)
  for router in range(3):
    # A bias that sends every token of one router to the last groups, whatever its scores.
    bias_LE = model.buffers['bias_LE'].copy()
    bias_LE[router, 4:] += 10
    after = model.forward(tokens_BU, positions, np.ones_like(positions), buffers={'bias_LE': bias_LE})
    moved = [bool((np.abs(a - b) > 1e-3).any()) for a, b in zip(after, before, strict=True)]
    assert moved == [depth >= router for depth in range(3)]  # later modules build on earlier ones

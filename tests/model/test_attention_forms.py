"""All ways to compute the same logits: expanded, absorbed, in chunks, token by token, over any page table."""

import functools

import numpy as np
import pytest
from model_cases import CALLS, CHUNK, EXPERTS, PAGE, Model, assert_same, config, decode, scattered_cache, text, whole

from mla_jax.config import RopeScaling
from mla_jax.model.cache import bytes_per_token, empty_cache

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=8, mscale=0.707, mscale_all_dim=0.707)
CONFIGS = {
    'mla': dict(q_lora_rank=16, rope_scaling=YARN, **EXPERTS),
    'mla, queries from x': dict(latent_norm=False, attention_bias=True, rope_repeats=3),
    'gqa': dict(attention='gqa', num_key_value_heads=2, attention_bias=True),
    'mqa': dict(attention='mqa'),
    'mha': dict(attention='mha', head_dim=6),
}
LENGTH = 12


@functools.cache
def model_of(name) -> Model:
  return Model(config(**CONFIGS[name]))


@functools.cache
def expected_of(name):
  model = model_of(name)
  tokens_BU = text(model, 3, LENGTH)
  return tokens_BU, whole(model, tokens_BU)


@pytest.mark.parametrize(('name', 'form'), [(name, 'absorbed') for name in CONFIGS] +
                         [(name, 'expanded') for name in CONFIGS if name.startswith('mla')])
def test_ragged_chunks_then_single_tokens(name, form):
  model, (tokens_BU, expected) = model_of(name), expected_of(name)
  cache = scattered_cache(model.config, len(tokens_BU))
  seen, cache, lengths_B = decode(model, cache, tokens_BU, [0, 0, 0], CALLS, CHUNK, form)
  assert_same(seen, expected)
  assert lengths_B.tolist() == [11, 7, 4]
  if form == 'absorbed':
    seen, cache, lengths_B = decode(model, cache, tokens_BU, lengths_B, [(1, 1, 1)], 1, form)
    assert_same(seen, expected)
  # Padding and other rows left no trace: what is written is what was new.
  pages = np.asarray(cache.pages_PSJ).reshape(cache.layers, -1, PAGE, model.config.cache_width)
  assert (~np.isnan(pages)).all(-1).sum((1, 2)).tolist() == [lengths_B.sum()] * cache.layers


@pytest.mark.parametrize('name', ['mla', 'gqa'])
def test_fresh_prefill_need_not_read_the_cache_but_fills_it(name):
  model, (tokens_BU, expected) = model_of(name), expected_of(name)
  cache = scattered_cache(model.config, len(tokens_BU))
  seen, cache, lengths_B = decode(model, cache, tokens_BU, [0, 0, 0], [(5, 3, 1)], CHUNK, 'expanded', fresh_first=True)
  assert_same(seen, expected)
  seen, *_ = decode(model, cache, tokens_BU, lengths_B, [(5, 3, 1)], CHUNK, 'absorbed')
  assert_same(seen, expected)


def test_page_tables_do_not_matter():
  """Trivial and scattered tables give the same bits: the same numbers in the same order."""
  model, (tokens_BU, _) = model_of('mla'), expected_of('mla')
  runs = []
  for seed in (0, 1):
    seen, *_ = decode(model, scattered_cache(model.config, 3, seed), tokens_BU, [0, 0, 0], CALLS, CHUNK, 'absorbed')
    runs.append(np.stack([out[0] for _, _, out in seen]))
  np.testing.assert_array_equal(*runs)


def test_packed_documents_do_not_see_each_other():
  """Two documents in a row, and padding after them, give what each gives alone."""
  model, (tokens_BU, expected) = model_of('mla'), expected_of('mla')
  first, second = 5, 4
  packed_BU = np.zeros_like(tokens_BU)
  packed_BU[:, :first] = tokens_BU[:, :first]
  packed_BU[:, first:first + second] = tokens_BU[::-1, :second]
  positions = np.r_[:first, :second, :LENGTH - first - second].astype(np.int32)
  segments = np.repeat([1, 2, 0], [first, second, LENGTH - first - second]).astype(np.int32)
  logits, = model.forward(packed_BU, np.tile(positions, (3, 1)), np.tile(segments, (3, 1)))
  seen = [(row, t, [logits[row, t]]) for row in range(3) for t in range(first)]
  seen += [(2 - row, t, [logits[row, first + t]]) for row in range(3) for t in range(second)]
  assert_same(seen, expected)


def test_cache_drops_what_does_not_fit():
  model = model_of('mla, queries from x')
  cache = scattered_cache(model.config, 1)
  entries_BTJ = np.ones((1, 2, model.config.cache_width), np.float32)
  full = cache.write(0, entries_BTJ, np.array([[cache.capacity - 1, cache.capacity]]), np.ones((1, 2), bool))
  assert (~np.isnan(np.asarray(full.pages_PSJ))).all(-1).sum() == 1


@pytest.mark.parametrize(('name', 'numbers'), [('mla', 12 + 6), ('gqa', 2 * 2 * 8), ('mqa', 2 * 8), ('mha', 2 * 4 * 6)])
def test_cache_bytes_are_those_of_the_array(name, numbers):
  made = config(**CONFIGS[name], num_nextn_predict_layers=1)
  assert bytes_per_token(made, np.float16, mtp=False) == 2 * 2 * numbers
  assert bytes_per_token(made, np.float16, mtp=True) == 3 * 2 * numbers
  cache = empty_cache(made, 3, 9, np.float16, page_size=4)
  assert cache.capacity == 12
  assert cache.pages_PSJ.shape == (3 * 3 * 3, 4, numbers)
  assert sorted(np.asarray(cache.table_BP).ravel().tolist()) == list(range(9))

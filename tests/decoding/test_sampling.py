import numpy as np
import pytest

from mla_jax.config import ConfigError
from mla_jax.decoding import sampling

WIDTH = 12
# temperature, top_k, top_p, min_p: each alone, together, at its limits, and such that rounding could leave no token.
CASES = [(1.0, 0, 1.0, 0.0), (0.0, 3, 0.5, 0.1), (0.7, 4, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2),
         (1.5, 6, 0.8, 0.05), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-30, 0.0), (1e-6, 0, 1.0, 0.0), (2.0, 99, 0.999, 0.9)]


def softmax(x):
  return np.exp(x - np.logaddexp.reduce(x))


def filtered(logits, temperature, top_k, top_p, min_p):
  """One distribution in float64, by sorting and cutting lists."""
  logits = logits.astype(np.float64)
  if temperature == 0:
    return np.eye(len(logits))[logits.argmax()]
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  kept = order[:top_k or None]
  p = softmax(logits[kept] / temperature)
  if top_p < 1:
    kept = [token for i, token in enumerate(kept) if i == 0 or p[:i].sum() < top_p]
  best = logits[kept[0]]
  kept = [token for token in kept if np.exp((logits[token] - best) / temperature) >= min_p]
  out = np.zeros(len(logits))
  out[kept] = softmax(logits[kept] / temperature)
  return out


def settings(cases=CASES):
  names = ('temperature', 'top_k', 'top_p', 'min_p')
  return sampling.make_sampling(len(cases), **{name: [case[i] for case in cases] for i, name in enumerate(names)})


def test_distribution_is_the_filtered_softmax():
  logits_BTW = 3 * np.random.default_rng(0).standard_normal((len(CASES), 5, WIDTH)).astype(np.float32)
  p_BTW = np.asarray(sampling.distribution(logits_BTW, settings()))
  for b, case in enumerate(CASES):
    for t in range(5):
      np.testing.assert_allclose(p_BTW[b, t], filtered(logits_BTW[b, t], *case), atol=2e-6, err_msg=str(case))


def test_tokens_as_probable_as_the_last_one_kept_are_kept():
  logits_BTW = np.array([[[2, 1, 1, 1, 0, -1]]], np.float32)
  for case in ((1.0, 2, 1.0, 0.0), (1.0, 0, 0.5, 0.0)):
    p_W = np.asarray(sampling.distribution(logits_BTW, settings([case])))[0, 0]
    assert (p_W > 0).tolist() == [True] * 4 + [False] * 2, case


def test_draws_follow_the_probabilities_and_only_their_own_seed_and_position():
  p_BW = np.tile(np.array([0, 1, 2, 5], np.float32), (20_000, 1))
  seed_B, position_B = np.arange(20_000, dtype=np.uint32) // 100, np.arange(20_000, dtype=np.int32) % 100
  drawn_B = np.asarray(sampling.draw(p_BW, seed_B, position_B, sampling.TOKEN))
  counts = np.bincount(drawn_B, minlength=4)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:] / 20_000, [1 / 8, 2 / 8, 5 / 8], atol=0.015)  # over 4 standard deviations
  order = np.random.default_rng(0).permutation(20_000)
  again_B = np.asarray(sampling.draw(p_BW, seed_B[order], position_B[order], sampling.TOKEN))
  np.testing.assert_array_equal(again_B, drawn_B[order])
  other_B = np.asarray(sampling.draw(p_BW, seed_B, position_B, sampling.DRAFT))
  assert 0.4 < (other_B == drawn_B).mean() < 0.53  # 0.469 if independent


@pytest.mark.parametrize(('name', 'value'), [
    ('temperature', -0.1), ('temperature', float('nan')), ('temperature', 'hot'), ('temperature', [0.1, 0.2]),
    ('top_p', 0.0), ('top_p', 1.01), ('top_k', -1), ('top_k', 1.5), ('min_p', 1.0), ('min_p', -0.1), ('seed', -1),
    ('seed', 2**32)])
def test_a_wrong_setting_is_named(name, value):
  with pytest.raises(ConfigError, match=name) as error:
    sampling.make_sampling(3, **{name: value})
  assert '\n' not in str(error.value)

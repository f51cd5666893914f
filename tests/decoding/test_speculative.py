import jax
import numpy as np
import pytest

from mla_jax.decoding import sampling
from mla_jax.decoding.speculative import verify
from tests.decoding import small

COUNT = 24  # new tokens
# Modules, drafts (None: plain), form of attention. Between them: fewer drafts than modules, as many, and more.
CASES = [(1, None, 'absorbed'), (1, 1, 'expanded'), (1, 3, 'absorbed'), (2, 1, 'expanded'),
         pytest.param(2, 3, 'absorbed', marks=pytest.mark.long)]


@pytest.mark.parametrize(('depth', 'drafts', 'form'), CASES)
def test_greedy_drafting_changes_no_token_and_drafts_are_the_modules_own(depth, drafts, form):
  rates = []
  for seed in range(3):
    d = small.decoder(depth, seed)
    expected, logits = small.greedy(d, small.PROMPTS, COUNT)
    limits = [COUNT, COUNT - 5, COUNT, 2]
    r = small.run(d, max_new_tokens=limits, draft_tokens=drafts, speculative='on' if drafts else 'off', attention=form)
    assert small.new_tokens(r) == [tokens[:limit] for tokens, limit in zip(expected, limits, strict=True)]
    for row, (limit, scores) in enumerate(zip(limits, r.scores(), strict=True)):
      logprobs = logits[row] - np.logaddexp.reduce(logits[row], axis=-1, keepdims=True)
      np.testing.assert_allclose(scores[0], logprobs[np.arange(limit), expected[row][:limit]], atol=1e-4)
    if drafts:
      rates.append(check_tally(d, r, drafts))
    else:
      assert r.stats(1).acceptance_rate == []
      assert r.stats(1).tokens_per_step == 1
  if drafts:
    assert 0.2 < np.mean(rates) < 0.9  # else the models would prove little


def check_tally(d, r, drafts):
  """Walks each finished text as decoding must have, with drafts from teacher forcing over the whole text."""
  texts = [small.PROMPTS[row] + tokens for row, tokens in enumerate(small.new_tokens(r))]
  _, drafted = small.oracle(d, [text + [0] * (small.LENGTH - len(text)) for text in texts], drafts)
  tried, accepted, rounds = np.zeros(drafts, int), np.zeros(drafts, int), 0
  for row, text in enumerate(texts):
    n = len(small.PROMPTS[row])  # the newest token's position: prefill gave it
    while n < len(text) - 1:
      right = [n + j < len(text) and drafted[n, row, j - 1] == text[n + j] for j in range(1, drafts + 1)]
      good = right.index(False) if False in right else drafts
      new = min(good + 1, len(text) - 1 - n)
      tried[:new] += 1
      accepted[:min(good, new)] += 1
      n, rounds = n + new, rounds + 1
  np.testing.assert_array_equal(r.state.tally.tried_T, tried)
  np.testing.assert_array_equal(r.state.tally.accepted_T, accepted)
  assert int(r.state.tally.rounds) == rounds
  return accepted[0] / tried[0]


def test_the_cache_holds_what_a_prefill_of_the_finished_text_would_leave():
  """Entries made from rejected drafts are gone, for the modules that look further ahead too."""
  depth = 2
  d = small.decoder(depth, 1)
  r = small.run(d, max_new_tokens=[COUNT, COUNT - 5, COUNT, 2], draft_tokens=3)
  texts = [prompt + new for prompt, new in zip(small.PROMPTS, small.new_tokens(r), strict=True)]
  again = d.start(texts, max_new_tokens=1, draft_tokens=3)
  layers = [x.state.cache.pages_PSJ.reshape(2 + depth, len(texts), 256, -1) for x in (r, again)]
  for layer in range(2 + depth):
    ahead = max(layer - 1, 1)  # a module's entry needs the token that far ahead; the newest was not run yet
    for row, text in enumerate(texts):
      ours, theirs = (np.asarray(x[layer, row, :len(text) - ahead]) for x in layers)
      np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=f'layer {layer} row {row}')


def test_ties_are_broken_alike_with_and_without_drafts():
  d = small.decoder(1, 0)
  # Tokens 0 and 6, 1 and 7, ... 4 and 10 are equally probable, always; as inputs they differ.
  head_WD = np.array(d.params['head_WD'])
  head_WD[6:] = head_WD[:5]
  d.params['head_WD'] = jax.device_put(head_WD)
  expected, _ = small.greedy(d, small.PROMPTS, COUNT)
  for options in (dict(speculative='off'), dict(draft_tokens=3)):
    assert small.new_tokens(small.run(d, max_new_tokens=COUNT, **options)) == expected
  assert max(map(max, expected)) < 6


ROWS = 60_000
P = np.array([[0.5, 0.3, 0.2, 0.0], [0.05, 0.05, 0.2, 0.7], [0.25, 0.25, 0.25, 0.25]], np.float32)
Q = np.array([[0.2, 0.3, 0.1, 0.4], [0.5, 0.1, 0.3, 0.1]], np.float32)
BOUND = 35.0  # chi-square, 3 degrees of freedom: exceeded once in 8 million times by chance


def chi_square(counts, p):
  expected = counts.sum() * p
  assert not counts[p == 0].any()
  return float((((counts - expected) ** 2)[p > 0] / expected[p > 0]).sum())


def test_accepted_and_resampled_tokens_are_distributed_as_the_main_model():
  seed_B, first_B = np.arange(ROWS, dtype=np.uint32), np.full(ROWS, 7, np.int32)
  draft_BT = np.stack([sampling.draw(np.tile(q, (ROWS, 1)), seed_B, first_B + t, sampling.DRAFT)
                       for t, q in enumerate(Q)], axis=1)
  accepted_B, tokens_BU = map(np.asarray, verify(np.tile(P, (ROWS, 1, 1)), np.tile(Q, (ROWS, 1, 1)), draft_BT, seed_B,
                                                 first_B))
  overlap = np.minimum(P[:2], Q).sum(1)
  np.testing.assert_allclose((accepted_B > 0).mean(), overlap[0], atol=0.01)
  np.testing.assert_allclose((accepted_B > 1).mean(), overlap.prod(), atol=0.01)
  for slot in range(3):
    counts = np.bincount(tokens_BU[accepted_B >= slot, slot], minlength=4)
    assert chi_square(counts, P[slot]) < BOUND, slot
  # The bound can tell: sampling from p after a rejection, and accepting while the argmax agrees, would be seen.
  from_p = np.minimum(P[0], Q[0]) + (1 - overlap[0]) * P[0]
  assert chi_square(ROWS * from_p, P[0]) > 10 * BOUND
  given_first = Q[0] * (P[0].argmax() == np.arange(4)) + (1 - Q[0][P[0].argmax()]) * P[0]
  assert chi_square(ROWS * given_first, P[0]) > 10 * BOUND


def test_equal_distributions_always_accept_and_disjoint_ones_never():
  seed_B, first_B = np.arange(500, dtype=np.uint32), np.zeros(500, np.int32)
  p_BUW = np.tile(np.array([[[0.5, 0.5, 0, 0]]], np.float32), (500, 2, 1))
  accepted_B, _ = verify(p_BUW, p_BUW[:, :1], np.zeros((500, 1), np.int32), seed_B, first_B)
  assert np.asarray(accepted_B).all()
  accepted_B, tokens_BU = map(np.asarray, verify(p_BUW, p_BUW[:, :1, ::-1], np.full((500, 1), 3, np.int32), seed_B,
                                                 first_B))
  assert not accepted_B.any()
  assert set(tokens_BU[:, 0]) == {0, 1}


@pytest.mark.long
def test_sampled_texts_are_distributed_as_the_main_models():
  """The joint distribution of three tokens, the last two of them drafted, against the product of exact conditionals."""
  width, rows, batches = 4, 1024, 8
  d = small.decoder(1, 1, vocab_size=width)
  prompt, temperature, top_k = [2, 0, 1], 3.0, 3
  texts = np.array(list(np.ndindex(width, width, width)))
  logits_BSW, _ = small.oracle(d, [[*prompt, *text] + [0] * (small.LENGTH - 6) for text in texts])
  logits_B3W = logits_BSW[:, 2:5].astype(np.float64) / temperature
  logits_B3W[logits_B3W < np.sort(logits_B3W, -1)[..., -top_k, None]] = -np.inf
  p_B3W = np.exp(logits_B3W - np.logaddexp.reduce(logits_B3W, axis=-1, keepdims=True))
  exact_B = np.take_along_axis(p_B3W, texts[..., None], -1)[..., 0].prod(1)
  np.testing.assert_allclose(exact_B.sum(), 1)
  counts_B = np.zeros(len(texts), int)
  for i in range(batches):
    r = small.run(d, [prompt] * rows, max_new_tokens=3, draft_tokens=2, temperature=temperature, top_k=top_k,
                  seed=np.arange(i * rows, (i + 1) * rows))
    counts_B += np.bincount(r.tokens_BS[:, 3:6] @ [width * width, width, 1], minlength=len(texts))
  first, second = r.stats(1).acceptance_rate
  assert 0.2 < first < 0.95
  assert 0.2 < second < 0.95
  assert not counts_B[exact_B == 0].any()
  spread_B = np.sqrt(exact_B * (1 - exact_B) / (rows * batches))
  np.testing.assert_array_less(np.abs(counts_B / (rows * batches) - exact_B), 4.5 * spread_B + 1e-9)

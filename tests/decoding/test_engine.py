import re

import numpy as np
import pytest

from mla_jax.config import ConfigError
from mla_jax.decoding.engine import prompt_window, round_up
from tests.decoding import small

COUNT = 24
SAMPLED = dict(max_new_tokens=COUNT, draft_tokens=1, logprobs=3)
ROWS = [dict(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1),
        dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=2),
        dict(temperature=2.5, top_k=5, top_p=0.9, min_p=0.0, seed=3),
        dict(temperature=2.0, top_k=0, top_p=1.0, min_p=0.1, seed=2**32 - 1)]


@pytest.fixture(scope='module')
def model():
  return small.decoder(1, 0)


def columns(rows):
  return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope='module')
def sampled(model):
  return small.run(model, **SAMPLED, **columns(ROWS))


def test_a_row_is_the_same_in_any_batch(model, sampled):
  first = small.new_tokens(sampled)
  # The same rows elsewhere, each among others.
  other = dict(temperature=3.0, top_k=2, top_p=1.0, min_p=0.0, seed=9)
  for order in ([2, None, 0, None], [None, 1, 3, None]):
    prompts = [[5, 5, 5] if i is None else small.PROMPTS[i] for i in order]
    r = small.run(model, prompts, **SAMPLED, **columns([other if i is None else ROWS[i] for i in order]))
    for row, i in enumerate(order):
      if i is not None:
        assert r.new(row).tolist() == first[i]
  expected, _ = small.greedy(model, small.PROMPTS, COUNT)
  assert first[1] == expected[1]  # the greedy row
  assert all(first[i] != expected[i] for i in (0, 2, 3))


def test_another_seed_gives_another_text(model, sampled):
  r = small.run(model, **SAMPLED, **columns([row | dict(seed=row['seed'] - 1) for row in ROWS]))
  same = [a == b for a, b in zip(small.new_tokens(r), small.new_tokens(sampled), strict=True)]
  assert same == [False, True, False, False]


def test_logprobs_and_alternatives_are_of_the_raw_distribution(model, sampled):
  texts = [prompt + new for prompt, new in zip(small.PROMPTS, small.new_tokens(sampled), strict=True)]
  logits_BSW, _ = small.oracle(model, [text + [0] * (small.LENGTH - len(text)) for text in texts])
  logprob_BSW = logits_BSW - np.logaddexp.reduce(logits_BSW, axis=-1, keepdims=True)
  for row, (prompt, (new_logprobs, ids, logprobs)) in enumerate(zip(small.PROMPTS, sampled.scores(), strict=True)):
    logprob_TW = logprob_BSW[row, len(prompt) - 1:len(texts[row]) - 1]
    np.testing.assert_allclose(new_logprobs, logprob_TW[np.arange(COUNT), texts[row][len(prompt):]], atol=1e-4)
    np.testing.assert_array_equal(ids, np.argsort(-logprob_TW, axis=-1)[:, :3])
    np.testing.assert_allclose(logprobs, -np.sort(-logprob_TW, axis=-1)[:, :3], atol=1e-4)


@pytest.mark.parametrize('drafts', [None, 3])
def test_a_row_ends_after_its_end_of_text_token(model, drafts):
  mode = dict(speculative='off') if drafts is None else dict(draft_tokens=drafts)
  expected, _ = small.greedy(model, small.PROMPTS, COUNT)
  for eos in ([expected[2][0]], [expected[2][7]], [expected[2][7], expected[0][3]]):
    r = small.run(model, max_new_tokens=COUNT, eos_ids=eos, **mode)
    ends = [min((tokens.index(e) + 1 for e in eos if e in tokens), default=COUNT) for tokens in expected]
    assert small.new_tokens(r) == [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]
    assert r.finished


def test_a_stopped_row_stands_still_and_the_others_go_on(model):
  expected, _ = small.greedy(model, small.PROMPTS, COUNT)
  r = model.start(small.PROMPTS, max_new_tokens=COUNT, draft_tokens=3)
  r.advance()
  before = r.new(1).tolist()
  assert not r.finished
  r.stop(1)
  while not r.finished:
    r.advance()
  assert small.new_tokens(r) == [expected[0], before, *expected[2:]]


def test_stats(model, sampled):
  s = sampled.stats(4 * COUNT)
  assert s.cache_bytes_per_token == dict(main=2 * 16 * 4, with_mtp=3 * 16 * 4)  # layers x (12 + 4) x float32
  rounds = int(sampled.state.tally.rounds)
  assert s.tokens_per_step == (4 * COUNT - 4) / rounds  # prefill gave the first tokens
  assert s.new_tokens == 4 * COUNT
  assert s.tokens_per_second > 0
  assert s.time_to_first_token > 0
  assert s.peak_memory is None
  one = small.run(model, **SAMPLED | dict(max_new_tokens=1), **columns(ROWS))
  s = one.stats(4)
  assert (s.tokens_per_second, s.tokens_per_step, s.acceptance_rate) == (None, None, [None])


def test_sizes_to_compile_for_are_few_and_close():
  assert [round_up(n) for n in (1, 256, 257, 1024, 1025, 5000)] == [256, 256, 512, 1024, 1280, 5120]
  assert [prompt_window(n) for n in (1, 16, 17, 1000)] == [16, 16, 32, 1024]
  assert all(n <= round_up(n) <= max(256, 1.25 * n) + 256 for n in range(1, 20_000, 37))


@pytest.mark.parametrize(('options', 'says'), [
    (dict(prompts=[]), 'no prompt'),
    (dict(prompts=[[1], []]), 'prompt 1 is empty'),
    (dict(prompts=[[1, 11]]), 'prompt 0 has token id 11, but the vocabulary has 0 to 10'),
    (dict(prompts=[[-1]]), 'token id -1'),
    (dict(prompts=[[1.5]]), 'no token id'),
    (dict(prompts=[[[1], [2, 3]]]), 'lists of different lengths'),
    (dict(prompts=[[[1, 2]]]), 'prompt 0 has shape [1, 2]'),
    (dict(prompts=[[1] * 90], max_new_tokens=7), 'max_position_embeddings=96'),
    (dict(max_new_tokens=0), 'max_new_tokens=0 is below 1'),
    (dict(max_new_tokens=[5, 5]), 'max_new_tokens has 2 values for 4 prompts'),
    (dict(temperature=-1), 'temperature=-1'),
    (dict(top_p=0), 'top_p=0'),
    (dict(top_k=-1), 'top_k=-1'),
    (dict(min_p=1), 'min_p=1'),
    (dict(speculative='maybe'), "speculative='maybe' is unknown; use one of 'auto', 'on', 'off'"),
    (dict(draft_tokens=0), 'draft_tokens=0 is below 1'),
    (dict(attention='flat'), "attention='flat'"),
    (dict(logprobs=12), 'logprobs=12'),
    (dict(logprobs='x'), "logprobs='x' is no whole number"),
    (dict(logprobs=1.5), 'logprobs=1.5 is no whole number'),
    (dict(draft_tokens=1.5), 'draft_tokens=1.5 is no whole number'),
    (dict(seed=2**70), 'seed=1180591620717411303424 is out of range; use at most 4294967295'),
    (dict(seed=2**32), 'seed=4294967296 is out of range; use 0 to 4294967295'),
    (dict(top_k=2**31), 'top_k=2147483648 is out of range; use 0 (all tokens) to 2147483647'),
])
def test_bad_input_is_one_clear_line(model, options, says):
  with pytest.raises(ConfigError, match=re.escape(says)) as error:
    model.start(**dict(prompts=small.PROMPTS, max_new_tokens=8) | options)
  assert '\n' not in str(error.value)


def test_speculative_on_needs_modules():
  with pytest.raises(ConfigError, match='num_nextn_predict_layers=0'):
    small.decoder(0, 0).start([[1]], max_new_tokens=8, speculative='on')

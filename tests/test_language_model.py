import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import mla_jax
from mla_jax.checkpoint import hugging_face, store
from mla_jax.config import Config, ConfigError, to_dict
from mla_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from mla_jax.language_model import Text
from tests.decoding import small

GOLDEN = Path(__file__).parent / 'golden'
PROMPTS = ['ab', 'The q']
COUNT = 40


@pytest.fixture(scope='module')
def lm():
  c = small.config(1, vocab_size=264, num_hidden_layers=1, first_k_dense_replace=0)  # quick to compile
  return mla_jax.LanguageModel(c, *small.weights(c, 0), ByteTokenizer())


@pytest.fixture(scope='module')
def out(lm):
  return lm.generate(PROMPTS, max_new_tokens=COUNT)


@pytest.fixture(scope='module')
def workdir(lm, tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('run'), lm)


def write_run(folder, lm):
  """What train.py leaves, as far as decoding reads it."""
  (folder / 'config.json').write_text(json.dumps(to_dict(Config(model=lm.config))))
  lm.tokenizer.save(folder / 'tokenizer')
  checkpoints = store.Store(folder)
  checkpoints.save(3, dict(params=lm.decoder.params, buffers=lm.decoder.buffers), dict(count=np.zeros(1)), dict(step=3))
  checkpoints.close()
  return folder


def test_texts_get_a_beginning_and_become_what_the_tokens_say(lm, out):
  ids = [[ByteTokenizer().bos_id, *prompt.encode()] for prompt in PROMPTS]
  # logprobs need a text of any length: teacher forcing over the finished one
  for prompt, completion in zip(ids, out, strict=True):
    logits_TW = np.asarray(lm.logits([prompt + completion.tokens]))[0, len(prompt) - 1:-1]
    assert logits_TW.argmax(-1).tolist() == completion.tokens
    logprob_TW = logits_TW - np.logaddexp.reduce(logits_TW, axis=-1, keepdims=True)
    np.testing.assert_allclose(completion.logprobs, logprob_TW.max(-1), atol=1e-4)
    assert completion.text == ByteTokenizer().decode(completion.tokens)
    assert completion.finish_reason == 'length'
    assert len(completion.tokens) == COUNT
  assert out.stats.new_tokens == 2 * COUNT
  assert 0 < out.stats.acceptance_rate[0] < 1
  given_ids = lm.generate(ids, max_new_tokens=COUNT, stop=None)
  assert [c.tokens for c in given_ids] == [c.tokens for c in out]
  for given in (ids[0], jax.numpy.array(ids[0])):  # one prompt
    assert lm.generate(given, max_new_tokens=COUNT)[0].tokens == out[0].tokens
    assert ''.join(lm.stream(given, max_new_tokens=COUNT)) == out[0].text


def test_a_stop_string_is_cut_off_with_what_follows(lm, out):
  stop = out[1].text[7:10]
  cut = lm.generate(PROMPTS, max_new_tokens=COUNT, stop=['never this', stop])
  assert cut[1].text == out[1].text[:out[1].text.index(stop)]
  assert cut[1].finish_reason == 'stop'
  assert ByteTokenizer().decode(cut[1].tokens) == cut[1].text + stop
  assert len(cut[1].logprobs) == len(cut[1].tokens) < COUNT
  if stop not in out[0].text:
    assert cut[0] == out[0]


def test_stream_gives_what_generate_gives(lm):
  whole = lm.generate(PROMPTS[0], max_new_tokens=COUNT)
  stream = lm.stream(PROMPTS[0], max_new_tokens=COUNT)
  assert stream.completions is None
  pieces = list(stream)
  assert ''.join(pieces) == whole[0].text
  assert stream.completions == whole
  assert stream.completions.stats.new_tokens == COUNT
  stop = whole[0].text[5:8]
  pieces = list(lm.stream(PROMPTS[0], max_new_tokens=COUNT, stop=stop))
  assert ''.join(pieces) == whole[0].text[:whole[0].text.index(stop)]


def test_mtp_logits_are_aligned_and_end_in_nan(lm):
  c = small.config(2)
  deep = mla_jax.LanguageModel(c, *small.weights(c, 0))
  tokens_BT = np.random.default_rng(0).integers(0, 11, (2, small.LENGTH))
  logits_LBTW = np.asarray(deep.mtp_logits(tokens_BT))
  assert logits_LBTW.dtype == np.float32
  _, drafted = small.oracle(deep.decoder, tokens_BT, drafts=3)
  for d in (1, 2):
    np.testing.assert_array_equal(np.isnan(logits_LBTW[d - 1]).all((0, 2)), np.arange(small.LENGTH) >= small.LENGTH - d)
    # draft d of the position after t is module d at t
    known = small.LENGTH - d
    np.testing.assert_array_equal(logits_LBTW[d - 1, :, :known].argmax(-1), drafted[1:known + 1, :, d - 1].T)
  with pytest.raises(ConfigError, match='no MTP modules'):
    mla_jax.LanguageModel(small.config(0), *small.weights(small.config(0), 0)).mtp_logits(tokens_BT)
  with pytest.raises(ConfigError, match=r'shape \[3\]'):
    lm.logits([1, 2, 3])
  with pytest.raises(ConfigError, match='token id 264'):
    lm.logits([[1, 264]])
  with pytest.raises(ConfigError, match='max_position_embeddings=96'):
    lm.logits([[1] * 97])


def test_a_run_is_loaded_with_its_tokenizer(lm, out, workdir):
  loaded = mla_jax.LanguageModel.load(workdir)
  again = loaded.generate(PROMPTS, max_new_tokens=COUNT)
  assert list(again) == list(out)
  assert loaded.tokenizer.name == 'byte'
  half = mla_jax.LanguageModel.load(workdir, dtype='bfloat16')
  assert half.decoder.params['embedding_WD'].dtype == 'bfloat16'
  logits, rounded = (np.asarray(m.logits([[1, 2, 3, 4]])) for m in (lm, half))
  assert rounded.dtype == np.float32
  assert 0 < np.abs(logits - rounded).max() < 0.2 * logits.std()


def test_a_hugging_face_directory_without_a_tokenizer_takes_ids(tmp_path):
  lm = mla_jax.LanguageModel.load(GOLDEN / 'v3_plain', dtype='float32')
  assert all(isinstance(w, jax.Array) for w in jax.tree.leaves(lm.decoder.params))
  out = lm.generate([[5, 6, 7]], max_new_tokens=4, speculative='off')
  logits_TW = np.asarray(lm.logits([[5, 6, 7, *out[0].tokens]]))[0]
  assert logits_TW[2:-1].argmax(-1).tolist() == out[0].tokens
  assert out[0].text is None
  # config.json says which tokens end a text, where no tokenizer does, and goes on saying it.
  shutil.copytree(GOLDEN / 'v3_plain', tmp_path / 'hf')
  values = json.loads((tmp_path / 'hf/config.json').read_text())
  values['eos_token_id'] = ends = [values['eos_token_id'], out[0].tokens[1]]
  (tmp_path / 'hf/config.json').write_text(json.dumps(values))
  (tmp_path / 'hf/generation_config.json').write_text('{}')
  mla_jax.LanguageModel.load(tmp_path / 'hf', dtype='float32').save_hf(tmp_path / 'out')
  saved = json.loads((tmp_path / 'out/config.json').read_text())
  assert (saved['bos_token_id'], saved['eos_token_id']) == (0, ends)
  assert (tmp_path / 'out/generation_config.json').is_file()
  ended = mla_jax.LanguageModel.load(tmp_path / 'out').generate([[5, 6, 7]], max_new_tokens=4, speculative='off')[0]
  assert (ended.tokens, ended.finish_reason) == (out[0].tokens[:out[0].tokens.index(ends[1]) + 1], 'stop')
  for call in (lambda: lm.generate('hello'), lambda: lm.generate([[1]], stop='x'), lambda: lm.stream([1])):
    with pytest.raises(ConfigError, match=r'tokenizer\.json'):
      call()


def test_saved_in_hugging_face_layout_it_is_the_same_model(lm, out, tmp_path):
  lm.save_hf(tmp_path / 'hf')
  again = mla_jax.LanguageModel.load(tmp_path / 'hf')
  assert again.tokenizer.name == 'byte'
  assert [o.tokens for o in again.generate(PROMPTS, max_new_tokens=COUNT)] == [o.tokens for o in out]
  np.testing.assert_array_equal(again.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]))
  again.save_hf(tmp_path / 'copy')  # tokenizer files come from the directory it was loaded from
  for file in ('model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'copy' / file).read_bytes() == (tmp_path / 'hf' / file).read_bytes()


def test_what_cannot_be_loaded_or_done_is_one_clear_line(lm, tmp_path):
  with pytest.raises(ConfigError, match=r'holds no readable config\.json'):
    mla_jax.LanguageModel.load(tmp_path / 'nowhere')
  (tmp_path / 'config.json').write_text(json.dumps(to_dict(Config(model=lm.config))))
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    mla_jax.LanguageModel.load(tmp_path)
  with pytest.raises(ConfigError, match='exists and is not empty'):
    lm.save_hf(tmp_path)
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    lm.generate(['a', ''])
  with pytest.raises(ConfigError, match='stop'):
    lm.generate('a', stop=[''])
  for stop in ([1], 1, [b'x'], b'x', ['a', None]):
    with pytest.raises(ConfigError, match=r'stop has .* which is no text; use strings'):
      lm.generate('a', stop=stop)
  for call in (lm.generate, lm.stream):
    for prompt, line in ((None, 'prompt 0 holds None, which is no token id'), (5, r'prompt 0 has shape \[\]')):
      with pytest.raises(ConfigError, match=line):
        call(prompt)
    with pytest.raises(ConfigError, match=r'prompt 0 is no valid text \(character 1 is half a surrogate pair\)'):
      call('a\udcffb')


@pytest.mark.parametrize('dtype', ['int8', 'float64', np.bool_, 'foo', 3])
def test_weights_have_no_other_dtype(lm, tmp_path, dtype):
  for call in (lambda: lm.save_hf(tmp_path / 'out', dtype=dtype),
               lambda: mla_jax.LanguageModel.load(GOLDEN / 'v3_plain', dtype),
               lambda: hugging_face.load(GOLDEN / 'v3_plain', dtype),
               lambda: mla_jax.LanguageModel(lm.config, lm.decoder.params, lm.decoder.buffers, dtype=dtype)):
    with pytest.raises(ConfigError, match="is none that weights can have; use one of 'bfloat16', 'float16', 'float32'"):
      call()
  assert not list(tmp_path.iterdir())


def read(text: Text, ids) -> list[str]:
  """The pieces, one a token until it ends, and what comes at the end."""
  pieces = []
  for token in ids:
    if not text.finished:
      text.push([token])
      pieces.append(text.take())
  text.finish()
  return [*pieces, text.take()]


def test_text_holds_back_what_may_begin_a_stop_string():
  assert read(Text(ByteTokenizer(), [], ['abab', 'x\n']), b'1ababa2') == ['1', '', '', '', '', '']
  assert read(Text(ByteTokenizer(), [], ['abab!']), b'1ababab!2') == ['1', '', '', '', '', 'ab', '', '', '']
  text = Text(ByteTokenizer(), [], ['x\n'])
  assert read(text, b'axbx') == ['a', '', 'xb', '', 'x']
  assert (text.text, text.stopped) == ('axbx', False)
  text = Text(ByteTokenizer(), [], ['\u00e9t'])
  assert read(text, '-\u00e9-\u00e9t9'.encode()) == ['-', '', '', '\u00e9-', '', '', '', '']
  assert text.tokens == list('-\u00e9-\u00e9t'.encode())


def test_text_goes_on_where_the_prompt_ended():
  vocabulary = {'\u2581hello': 0, '\u2581world': 1, '<0xC3>': 2, '<0xA9>': 3, 'x': 4}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='x'))
  steps = tokenizers.decoders
  library.decoder = steps.Sequence([steps.Replace('\u2581', ' '), steps.ByteFallback(), steps.Fuse(),
                                    steps.Strip(' ', 1, 0)])
  tokenizer = HuggingFaceTokenizer(library, 'words')
  assert ''.join(read(Text(tokenizer, [0], []), [1, 4])) == ' worldx'
  assert ''.join(read(Text(tokenizer, [0, 2, 3], []), [1, 4])) == ' worldx'  # the prompt ended in bytes
  assert ''.join(read(Text(tokenizer, [0, 2], []), [3, 1])) == '\u00e9 world'  # and in the middle of a character

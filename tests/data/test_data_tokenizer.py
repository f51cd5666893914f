"""Tokenizers against the library's own behaviour and against UTF-8; streaming against decoding at once."""

import json

import numpy as np
import pytest
import tokenizers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers, processors

from mla_jax.config import ConfigError, DataConfig
from mla_jax.data import tokenizer as tokenizer_lib
from mla_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXT = 'def f(x):\r\n\treturn "é世界😀"  # <|eos|> ﷺ e\u0301\x00 \ufffd ab'
KINDS = ['bos', 'eos', 'fim_prefix', 'fim_suffix', 'fim_middle', 'pad']


def run_command(*arguments):
  values = flags.FlagValues()
  tokenizer_lib.define_flags(values)
  return tokenizer_lib.main(values(['tokenizer', *map(str, arguments)]), values)


@pytest.fixture(scope='module')
def bpe_folder(tmp_path_factory):
  """A tokenizer trained by the command on a few lines of code and of Chinese."""
  folder = tmp_path_factory.mktemp('bpe')
  for i in range(4):
    (folder / f'{i}.txt').write_text('def f(x):\n  return x + 1\n' * 30 + '世界你好\n' * 5, encoding='utf-8')
  assert run_command('--source=text', f'--path={folder}', '--vocab_size=280', f'--output={folder}/out') == 0
  return folder / 'out'


def fallback_tokenizer():
  """As Llama-2's: words, spaces as ▁, and byte tokens for what is not in the vocabulary."""
  words = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁', 'a', 'b', '▁a', 'b▁', 'é']
  library = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[('▁', 'a')],
                                            unk_token='<unk>', byte_fallback=True))
  library.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
  library.add_special_tokens(['<extra>'])
  library.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(' ', 1, 0)])
  return HuggingFaceTokenizer(library, 'fallback')


@pytest.fixture(params=['byte', 'bpe', 'fallback'])
def tokenizer(request, bpe_folder):
  return {'byte': ByteTokenizer, 'bpe': lambda: load_tokenizer(bpe_folder), 'fallback': fallback_tokenizer}[
      request.param]()


def test_byte_ids():
  tokenizer = ByteTokenizer()
  assert tokenizer.encode(TEXT) == list(TEXT.encode())
  assert [getattr(tokenizer, f'{kind}_id') for kind in KINDS] == [256, 257, 258, 259, 260, 261]
  assert tokenizer.vocab_size == 262
  assert tokenizer.name == 'byte'
  assert load_tokenizer('byte').encode('a') == [97]
  assert tokenizer.decode([256, 0xE4, 0xB8, 257, 0x96, 263, -1, 0xFF, 65]) == '世\ufffdA'


def test_round_trip(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.encode_array(TEXT).dtype == np.int32
  assert tokenizer.encode_array(TEXT).tolist() == ids
  assert tokenizer.encode_array('').shape == (0,)
  assert tokenizer.encode_array('').dtype == np.int32
  assert max(ids) < tokenizer.vocab_size
  specials = {getattr(tokenizer, f'{kind}_id') for kind in KINDS} - {None}
  assert not specials & set(ids)
  surrounded = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size + 5]
  assert tokenizer.decode(np.array(surrounded)) == TEXT


def test_saved_tokenizer_is_read_back(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'deep' / 'folder')
  for path in (tmp_path / 'deep' / 'folder', tmp_path / 'deep' / 'folder' / 'tokenizer.json'):
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.vocab_size == tokenizer.vocab_size
    assert [getattr(again, f'{kind}_id') for kind in KINDS] == [getattr(tokenizer, f'{kind}_id') for kind in KINDS]


def test_byte_tokenizer_json_means_the_same_to_the_library(tmp_path):
  ByteTokenizer().save(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  text = TEXT.replace('<|eos|>', '')
  assert library.encode(text).ids == list(text.encode())
  assert library.encode('a<|eos|>').ids == [97, 257]
  assert library.decode([256, *text.encode(), 257]) == text
  assert json.loads((tmp_path / 'tokenizer_config.json').read_text())['eos_token'] == '<|eos|>'


def test_command_trains_a_bpe_tokenizer(bpe_folder, tmp_path, capsys):
  tokenizer = load_tokenizer(bpe_folder)
  assert tokenizer.vocab_size == 280
  assert [getattr(tokenizer, f'{kind}_id') for kind in KINDS] == list(range(6))
  ids = tokenizer.encode('  return x + 1\n世界你好')
  assert len(ids) < 16  # of 27 bytes
  assert run_command('--source=text', f'--path={bpe_folder.parent}', f'--output={bpe_folder}') == 2
  assert 'already holds a tokenizer.json' in capsys.readouterr().err
  assert run_command(f'--output={tmp_path}/x', '--vocab_size=100') == 2
  assert 'vocab_size=100 is below 262' in capsys.readouterr().err
  assert run_command('--source=text', '--path=nowhere', f'--output={tmp_path}/x') == 2
  assert capsys.readouterr().err == (
      "tokenizer: error: data.path='nowhere' does not exist; set --config.data.path to a file or a folder\n")
  assert run_command(f'--output={tmp_path}/x', 'stdlib') == 2
  assert capsys.readouterr().err == "tokenizer: error: 'stdlib' is no flag; flags begin with --\n"
  assert not (tmp_path / 'x').exists()


def deepseek_like(folder, **config):
  """Their names; fim tokens not marked special, a template that adds bos, and left-over truncation and padding."""
  names = ['<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜▁pad▁｜>']
  fim = ['<｜fim▁hole｜>', '<｜fim▁begin｜>', '<｜fim▁end｜>']
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  library.train_from_iterator(['text'], tokenizers.trainers.BpeTrainer(
      special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  library.add_tokens(fim)
  library.post_processor = processors.TemplateProcessing(single=f'{names[0]} $A', special_tokens=[(names[0], 0)])
  library.enable_truncation(3)
  library.enable_padding(length=20)
  library.save(str(folder / 'tokenizer.json'))
  if config:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return library


def test_deepseek_names_and_no_tokens_of_its_own(tmp_path):
  library = deepseek_like(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  hole, begin, end = (library.token_to_id(name) for name in ('<｜fim▁hole｜>', '<｜fim▁begin｜>', '<｜fim▁end｜>'))
  assert [getattr(tokenizer, f'{kind}_id') for kind in KINDS] == [0, 1, begin, hole, end, 2]
  ids = tokenizer.encode('a longer text')
  assert len(library.encode('a longer text').ids) == 20  # what the file itself would do: bos, cut to 3, padded
  assert not {0, 1, 2} & set(ids)
  assert tokenizer.decode([0, begin, *ids, hole, end, 1]) == 'a longer text'


def test_tokenizer_config_says_which_token_ends(tmp_path):
  library = deepseek_like(tmp_path, eos_token={'content': 'a'}, bos_token=None, chat_template='{{ x }}')
  tokenizer = load_tokenizer(tmp_path / 'tokenizer.json')
  assert tokenizer.eos_id == library.token_to_id('a')
  assert tokenizer.bos_id == 0
  tokenizer.save(tmp_path / 'copy')
  assert json.loads((tmp_path / 'copy/tokenizer_config.json').read_text())['chat_template'] == '{{ x }}'
  assert load_tokenizer(tmp_path / 'copy').eos_id == tokenizer.eos_id


def test_missing_specials_are_none():
  library = tokenizers.Tokenizer(models.WordLevel({'a': 0, '</s>': 7}, unk_token='a'))
  tokenizer = HuggingFaceTokenizer(library, 'words')
  assert [getattr(tokenizer, f'{kind}_id') for kind in KINDS] == [None, 7, None, None, None, None]
  assert tokenizer.vocab_size == 8
  assert tokenizer.decode([0, 5, 7]) == 'a'


def pushed(tokenizer, chunks):
  stream = tokenizer.stream()
  return [stream.push(chunk) for chunk in chunks] + [stream.finish()]


def test_stream_gives_characters_whole(tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode(TEXT * 3), tokenizer.eos_id]
  pieces = pushed(tokenizer, [[i] for i in ids])
  assert ''.join(pieces) == TEXT * 3
  assert pieces[-1] == ''


def test_stream_shows_a_token_at_once(bpe_folder):
  tokenizer = load_tokenizer(bpe_folder)
  ids = tokenizer.encode('def f(x):\n  return x + 1\n' * 4)
  assert pushed(tokenizer, [[i] for i in ids]) == [tokenizer.decode([i]) for i in ids] + ['']


def test_stream_keeps_spaces_around_tokens_that_have_no_text():
  tokenizer = fallback_tokenizer()
  ids = [*tokenizer.encode('b'), tokenizer.vocab_size - 1, *tokenizer.encode('a'), tokenizer.vocab_size - 1, 1]
  assert pushed(tokenizer, [[i] for i in ids]) == ['', 'b', '', ' a', '', '', '']
  assert tokenizer.decode(ids) == 'b a'


def test_byte_stream_shows_a_character_with_its_last_byte():
  expected = ['', 'é', '', '', '世', 'x', '', '', '', '😀', '']
  assert pushed(ByteTokenizer(), [[byte] for byte in 'é世x😀'.encode()]) == expected


@pytest.mark.parametrize('seed', range(10))
def test_stream_of_any_ids_equals_decoding_at_once(tokenizer, seed):
  """Broken UTF-8 included; what was shown is never taken back, since all pieces together are the text."""
  rng = np.random.default_rng(seed)
  valid = np.array(tokenizer.encode(TEXT))
  ids = np.concatenate([rng.integers(0, tokenizer.vocab_size + 3, 60), valid[rng.integers(0, len(valid), 60)],
                        valid, rng.integers(0, tokenizer.vocab_size, 20)])
  cuts = np.sort(rng.integers(0, len(ids), 50))
  assert ''.join(pushed(tokenizer, np.split(ids, cuts))) == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character_until_the_end(tokenizer):
  first, *ids = tokenizer.encode('a😀')
  assert len(ids) == 4
  pieces = pushed(tokenizer, [[first], ids[:-1], []])
  assert pieces[:3] == ['a', '', '']
  assert set(pieces[3]) == {'\ufffd'}


def test_unknown_and_broken_tokenizers_are_one_clear_line(tmp_path):
  for name in ('bytes', str(tmp_path)):
    with pytest.raises(ConfigError, match=rf"data.tokenizer='{name}' is unknown: there is no file .*use 'byte'"):
      load_tokenizer(name)
  (tmp_path / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(ConfigError, match=r'no valid tokenizer\.json') as caught:
    load_tokenizer(tmp_path)
  assert '\n' not in str(caught.value)
  ByteTokenizer().save(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ConfigError, match=r'no valid tokenizer\.json and tokenizer_config\.json'):
    load_tokenizer(tmp_path)


def test_text_that_a_tokenizer_can_not_encode_is_one_clear_line():
  library = tokenizers.Tokenizer(models.WordLevel({'a': 0}, unk_token='<unk>'))
  with pytest.raises(ConfigError, match=r"tokenizer 'words' can not encode .*Missing \[UNK\]"):
    HuggingFaceTokenizer(library, 'words').encode('b')


def test_training_needs_documents(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  with pytest.raises(ConfigError, match='holds no documents'):
    tokenizer_lib.train_bpe(DataConfig(source='text', path=str(tmp_path)), 300)

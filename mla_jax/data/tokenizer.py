"""Text to ids and back: bytes, or any Hugging Face tokenizer.json; and a command that trains a byte-level BPE one:

  python -m mla_jax.data.tokenizer --source=stdlib --vocab_size=4096 --output=DIR

Special tokens never come out of `encode` nor into the text of `decode`; whoever builds a sequence places their ids.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from mla_jax.config import ConfigError, DataConfig
from mla_jax.data import sources
from mla_jax.files import replace_text

# The names each special token has in published tokenizers, ours first, then DeepSeek's.
SPECIAL_NAMES = {
    'bos': ('<|bos|>', '<｜begin▁of▁sentence｜>', '<|begin_of_text|>', '<s>', '<bos>'),
    'eos': ('<|eos|>', '<｜end▁of▁sentence｜>', '<|end_of_text|>', '<|endoftext|>', '</s>', '<eos>'),
    'fim_prefix': ('<|fim_prefix|>', '<｜fim▁begin｜>', '<fim_prefix>', '<fim-prefix>', '▁<PRE>'),
    'fim_suffix': ('<|fim_suffix|>', '<｜fim▁hole｜>', '<fim_suffix>', '<fim-suffix>', '▁<SUF>'),
    'fim_middle': ('<|fim_middle|>', '<｜fim▁end｜>', '<fim_middle>', '<fim-middle>', '▁<MID>'),
    'pad': ('<|pad|>', '<｜▁pad▁｜>', '<pad>', '[PAD]', '<|endoftext|>'),
}
_OUR_NAMES = [names[0] for names in SPECIAL_NAMES.values()]
_CONTEXT = 8  # tokens that a streaming decoder keeps: more than one character has


class Tokenizer:
  """What both kinds share: `name`, `vocab_size` and the ids of special tokens, None where there is no such token."""

  name: str
  vocab_size: int  # largest id + 1
  bos_id: int | None
  eos_id: int | None
  fim_prefix_id: int | None
  fim_suffix_id: int | None
  fim_middle_id: int | None
  pad_id: int | None

  def _set_special_ids(self, ids: dict[str, int | None]):
    for kind, value in ids.items():
      setattr(self, f'{kind}_id', value)
    self._special_ids = frozenset(value for value in ids.values() if value is not None)

  def encode_array(self, text: str) -> np.ndarray:
    """`encode` as int32, for the pipeline."""
    return np.array(self.encode(text), np.int32)


class ByteTokenizer(Tokenizer):
  """Ids 0-255 are the bytes of UTF-8; then bos, eos, fim_prefix, fim_suffix, fim_middle, pad."""

  name = 'byte'
  vocab_size = 256 + len(SPECIAL_NAMES)

  def __init__(self):
    self._set_special_ids({kind: 256 + i for i, kind in enumerate(SPECIAL_NAMES)})

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_array(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return self._bytes(ids).decode(errors='replace')

  def stream(self) -> '_ByteStream':
    return _ByteStream()

  def save(self, folder: str | Path):
    """Writes the same vocabulary as a Hugging Face tokenizer.json, which other programs read too."""
    library = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(_OUR_NAMES)
    _write(library, folder, _describe(self, library))

  @staticmethod
  def _bytes(ids: Iterable[int]) -> bytes:
    return bytes(i for i in ids if 0 <= i < 256)


class _ByteStream:
  """Text of ids as they come; a character appears with its last byte."""

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def push(self, ids: Iterable[int]) -> str:
    return self._decoder.decode(ByteTokenizer._bytes(ids))

  def finish(self) -> str:
    """What was held back: a replacement character for bytes that never became one."""
    return self._decoder.decode(b'', final=True)


class HuggingFaceTokenizer(Tokenizer):
  """Any tokenizer.json. A tokenizer_config.json beside it says which tokens are bos, eos and pad, else their names."""

  def __init__(self, library: tokenizers.Tokenizer, name: str, config: dict | None = None):
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # '<|eos|>' in a document is text
    self.name = name
    self._library = library
    self._config = config
    self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
    self._set_special_ids({kind: self._find(kind, names) for kind, names in SPECIAL_NAMES.items()})

  def _find(self, kind: str, names: tuple[str, ...]) -> int | None:
    stated = (self._config or {}).get(f'{kind}_token')
    stated = stated.get('content') if isinstance(stated, dict) else stated
    ids = (self._library.token_to_id(name) for name in (stated, *names) if name)
    return next((i for i in ids if i is not None), None)

  def encode(self, text: str) -> list[int]:
    try:
      return self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids  # fast: without offsets
    except Exception as error:  # the library raises plain Exception, for text outside a vocabulary without <unk>
      raise ConfigError(f'tokenizer {self.name!r} can not encode {text[:20]!r}... ({error}); use another') from None

  def decode(self, ids: Iterable[int]) -> str:
    return self._library.decode(self._text_ids(ids), skip_special_tokens=True)

  def stream(self) -> '_HuggingFaceStream':
    return _HuggingFaceStream(self)

  def save(self, folder: str | Path):
    _write(self._library, folder, self._config or _describe(self, self._library))

  def _text_ids(self, ids: Iterable[int]) -> list[int]:
    """Without specials (some tokenizers do not mark theirs) and ids that a padded embedding has beyond the tokens."""
    return [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._special_ids]

  def _is_byte(self, i: int) -> bool:
    """Whether it is a byte-fallback token. A run of them decodes as a whole, so its text can change until it ends."""
    return bool(re.fullmatch('<0x[0-9A-F]{2}>', self._library.id_to_token(i) or ''))


class _HuggingFaceStream:
  """Text of ids as they come. Holds back what a later token can still change."""

  def __init__(self, tokenizer: HuggingFaceTokenizer):
    self._tokenizer = tokenizer
    self._ids = []  # those that were shown last, as context for spaces between words, and those not shown yet
    self._shown = 0  # characters of their text that were returned

  def push(self, ids: Iterable[int]) -> str:
    new_ids = self._tokenizer._text_ids(ids)
    self._ids += new_ids
    if not new_ids or self._tokenizer._is_byte(new_ids[-1]):
      return ''
    text = self._tokenizer.decode(self._ids)
    settled = len(text.rstrip('\ufffd'))  # at the end it may be the beginning of a character
    piece = text[self._shown:settled]
    self._shown = max(self._shown, settled)
    if settled == len(text):
      self._ids = self._ids[-_CONTEXT:]
      self._shown = len(self._tokenizer.decode(self._ids))
    return piece

  def finish(self) -> str:
    """What was held back."""
    piece = self._tokenizer.decode(self._ids)[self._shown:]
    self._ids, self._shown = [], 0
    return piece


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
  """'byte', a tokenizer.json, or a folder that holds one. Raises ConfigError when there is none or it is broken."""
  if str(name_or_path) == ByteTokenizer.name:
    return ByteTokenizer()
  path = Path(name_or_path).expanduser()
  if path.is_dir():
    path = path / 'tokenizer.json'
  if not path.is_file():
    raise ConfigError(f'data.tokenizer={str(name_or_path)!r} is unknown: there is no file {path}; '
                      "use 'byte', a Hugging Face tokenizer.json, or a folder that holds one")
  config_path = path.with_name('tokenizer_config.json')
  try:
    library = tokenizers.Tokenizer.from_file(str(path))
    config = json.loads(config_path.read_text()) if config_path.is_file() else None
  except Exception as error:  # the library raises plain Exception
    raise ConfigError(f'{path.parent} holds no valid tokenizer.json and tokenizer_config.json ({error}); '
                      'save them again') from None
  specials = {name: 256 + i for i, name in enumerate(_OUR_NAMES)}
  if library.get_vocab(with_added_tokens=True) == _byte_vocabulary() | specials:
    return ByteTokenizer()
  return HuggingFaceTokenizer(library, str(name_or_path), config)


def train_bpe(data: DataConfig, vocab_size: int) -> HuggingFaceTokenizer:
  """A byte-level BPE tokenizer of the training documents; smaller than vocab_size if these have too few pairs."""
  smallest = 256 + len(_OUR_NAMES)
  if vocab_size < smallest:
    raise ConfigError(f'vocab_size={vocab_size} is below {smallest}, the bytes and the special tokens; use more')
  pieces = sources.Pieces(data, held_out=False)
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_OUR_NAMES, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  library.train_from_iterator((pieces[i].text for i in range(len(pieces))), trainer)
  return HuggingFaceTokenizer(library, f'bpe-{library.get_vocab_size()}')


def _byte_vocabulary() -> dict[str, int]:
  """Byte-level BPE writes each byte as a visible character: itself where it is one, else those from 256 on, in turn."""
  visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = (byte for byte in range(256) if byte not in visible)
  return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _describe(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> dict:
  """tokenizer_config.json: the class that reads tokenizer.json in transformers, and which tokens are which."""
  ids = {f'{kind}_token': getattr(tokenizer, f'{kind}_id') for kind in ('bos', 'eos', 'pad')}
  names = {key: library.id_to_token(i) for key, i in ids.items() if i is not None}
  return {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **names}


def _write(library: tokenizers.Tokenizer, folder: str | Path, config: dict):
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  replace_text(folder / 'tokenizer.json', library.to_str(pretty=True))
  replace_text(folder / 'tokenizer_config.json', json.dumps(config, indent=2, ensure_ascii=False) + '\n')


def define_flags(flag_values: flags.FlagValues):
  """The command's flags: defined only when it runs, since train.py and infer.py have some of the same names."""
  defaults = DataConfig()
  flags.DEFINE_string('source', defaults.source, 'As data.source.', flag_values=flag_values)
  flags.DEFINE_string('path', defaults.path, 'As data.path.', flag_values=flag_values)
  flags.DEFINE_string('text_key', defaults.text_key, 'As data.text_key.', flag_values=flag_values)
  flags.DEFINE_float('held_out_fraction', defaults.held_out_fraction, 'As data.held_out_fraction: documents not read.',
                     flag_values=flag_values)
  flags.DEFINE_integer('vocab_size', 4096, 'Tokens, special ones included.', flag_values=flag_values)
  flags.DEFINE_string('output', None, 'Folder that gets tokenizer.json.', flag_values=flag_values, required=True)


def main(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> int:
  output = Path(flag_values.output)
  data = DataConfig(source=flag_values.source, path=flag_values.path, text_key=flag_values.text_key,
                    held_out_fraction=flag_values.held_out_fraction)
  try:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is no flag; flags begin with --')
    if (output / 'tokenizer.json').exists():
      raise ConfigError(f'--output={output} already holds a tokenizer.json; choose another folder')
    tokenizer = train_bpe(data, flag_values.vocab_size)
    tokenizer.save(output)
  except (ConfigError, OSError) as error:
    print(f'tokenizer: error: {error}', file=sys.stderr)
    return 2
  print(f'{output / "tokenizer.json"}: {tokenizer.vocab_size} tokens; use it with --config.data.tokenizer={output}')
  return 0


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

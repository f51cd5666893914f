"""What a Hugging Face directory has beside the network, and keeps on its way through us: the files of a tokenizer, and
which tokens begin and end a text."""

import shutil
from pathlib import Path

from mla_jax.checkpoint.tensor_files import read_json

# What a tokenizer or a server wants. No code.
FILES = ('tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'special_tokens_map.json', 'added_tokens.json',
         'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json', 'generation_config.json')
SPECIAL = ('bos', 'eos')


def copy(source: Path, target: Path):
  for file in FILES:
    if (source / file).is_file():
      shutil.copyfile(source / file, target / file)


def special_ids(folder: Path) -> dict[str, int | list[int]]:
  """bos_token_id and eos_token_id, where they are known: as config.json says (some have several ends), else by the
  names in tokenizer_config.json. Raises HFError where one of the files is no JSON."""
  return _named(folder) | _stated(folder)


def end_ids(folder: Path) -> list[int]:
  """The tokens that end a text, by `special_ids`."""
  return _as_list(special_ids(folder).get('eos_token_id', []))


def _stated(folder: Path) -> dict[str, int | list[int]]:
  file = folder / 'config.json'
  values = read_json(file) if file.is_file() else {}
  said = {key: values.get(key) for key in (f'{kind}_token_id' for kind in SPECIAL)}
  return {key: value for key, value in said.items() if all(map(_is_id, _as_list(value)))}


def _named(folder: Path) -> dict[str, int]:
  files = folder / 'tokenizer.json', folder / 'tokenizer_config.json'
  if not all(file.is_file() for file in files):
    return {}
  vocabulary, named = map(read_json, files)
  added = (token for token in _as_list(vocabulary.get('added_tokens')) if isinstance(token, dict))
  ids = {token['content']: token['id'] for token in added
         if isinstance(token.get('content'), str) and _is_id(token.get('id'))}
  contents = {kind: named.get(f'{kind}_token') for kind in SPECIAL}
  contents = {kind: token.get('content') if isinstance(token, dict) else token for kind, token in contents.items()}
  return {f'{kind}_token_id': ids[token] for kind, token in contents.items() if isinstance(token, str) and token in ids}


def _as_list(value) -> list:
  return value if isinstance(value, list) else [value]


def _is_id(value) -> bool:
  return type(value) is int and 0 <= value < 2**31

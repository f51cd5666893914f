"""The documents of each source, by index, and the pieces that training reads.

| data.source   | a document is                                       | its name, which the held-out split hashes  |
|---------------|-----------------------------------------------------|--------------------------------------------|
| stdlib        | a *.py file of the running interpreter's library    | path in the library: 'json/decoder.py'     |
| site-packages | those, and the *.py files installed beside them     | 'site-packages/' + path                    |
| text          | a file: data.path itself, or any below that folder  | path in the folder                         |
| jsonl         | the field data.text_key of a line of a *.jsonl file | path in the folder + ':' + line number     |
| arrayrecord   | a record: UTF-8 text, or JSON with data.text_key    | index of the record over the sorted files  |

Documents are UTF-8. Empty ones are left out, as are hidden files and folders and, of Python's, the folders of tests.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import logging

from mla_jax.config import ConfigError, DataConfig

_SKIPPED_FOLDERS = frozenset({'test', 'tests', 'idle_test', '__pycache__', 'site-packages', 'dist-packages'})
_UNKNOWN_SIZE = np.iinfo(np.int64).max  # bytes of a document that was not read yet; a slice may end there


class FileDocuments:
  """Whole files. `names`, `sizes` (bytes), `digest` and `held_out` describe them; `read` gives their bytes."""

  def __init__(self, files: list[tuple[str, Path]], held_out_fraction: float, *, skip_other_encodings: bool):
    self.names, self._paths, sizes = [], [], []
    digest = hashlib.sha256()
    for name, path in files:
      text = _read_file(path)
      try:
        text.decode()
      except UnicodeDecodeError as error:
        if not skip_other_encodings:
          raise ConfigError(f'{path} is not UTF-8 (byte {error.start}); convert it or move it out of the way') from None
        logging.warning('%s is not UTF-8 and is left out', path)
        continue
      if text:
        self.names.append(name)
        self._paths.append(path)
        sizes.append(len(text))
        _add_to_digest(digest, name, text)
    self.sizes = np.array(sizes, np.int64)
    self.digest = digest.hexdigest()
    self.held_out = _hash_split(self.names, held_out_fraction)
    self._starts = np.zeros_like(self.sizes)

  def split_single_file(self, held_out_fraction: float):
    """Holds out the end of the only file, from a line end on, since a split by file would leave nothing."""
    text = self.read(0)
    cut = text.rfind(b'\n', 0, int(len(text) * (1 - held_out_fraction))) + 1
    if cut:
      self.names, self._paths = self.names * 2, self._paths * 2
      self.sizes = np.array([cut, len(text) - cut], np.int64)
      self._starts = np.array([0, cut], np.int64)
      self.held_out = np.array([False, True])

  def read(self, index: int, start: int = 0, end: int = _UNKNOWN_SIZE) -> bytes:
    length = min(end, int(self.sizes[index])) - start
    text = _read_file(self._paths[index], int(self._starts[index]) + start, length)
    if len(text) != length:
      raise ConfigError(f'{self._paths[index]} became shorter while it was in use; restore it and resume')
    return text


class JsonlDocuments:
  """Lines of JSON. Files are indexed once, then read line by line: for corpora past some GB use arrayrecord."""

  def __init__(self, files: list[tuple[str, Path]], held_out_fraction: float, text_key: str):
    self._text_key = text_key
    self._paths, lines, names = [], [], []
    digest = hashlib.sha256()
    for name, path in files:
      offset = 0
      for number, line in enumerate(_lines(path), start=1):
        if line.strip():
          text = _json_text(line, text_key, f'{path}:{number}')
          if text:
            lines.append((len(self._paths), offset, len(line), len(text)))
            names.append(f'{name}:{number}')
            _add_to_digest(digest, names[-1], text)
        offset += len(line)
      self._paths.append(path)
    self._lines = np.array(lines, np.int64).reshape(-1, 4)
    self.sizes = self._lines[:, 3]
    self.digest = digest.hexdigest()
    self.held_out = _hash_split(names, held_out_fraction)

  def read(self, index: int, start: int = 0, end: int = _UNKNOWN_SIZE) -> bytes:
    file, offset, length, _ = (int(value) for value in self._lines[index])
    line = _read_file(self._paths[file], offset, length)
    return _json_text(line, self._text_key, f'{self._paths[file]} at byte {offset}')[start:end]


class ArrayRecordDocuments:
  """Records through Grain's reader, never all read at once.

  A record that is a JSON object must have data.text_key; any other is the text itself; with data.text_key='' all are.
  The digest covers the files' names, sizes in bytes and number of records, not their content.
  """

  def __init__(self, files: list[tuple[str, Path]], held_out_fraction: float, text_key: str):
    self._text_key = text_key
    digest = hashlib.sha256()
    for name, path in files:
      try:
        count = len(grain.sources.ArrayRecordDataSource(str(path)))
      except Exception as error:  # the reader's own errors have no narrower common type
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f'{path} is not readable as ArrayRecord ({reason}); replace it or remove it') from error
      digest.update(f'{name}\n{path.stat().st_size} {count}\n'.encode())
    self._records = grain.sources.ArrayRecordDataSource([str(path) for _, path in files])
    self.sizes = np.full(len(self._records), _UNKNOWN_SIZE)
    self.digest = digest.hexdigest()
    self.held_out = _hash_split(map(str, range(len(self._records))), held_out_fraction)

  def read(self, index: int, start: int = 0, end: int = _UNKNOWN_SIZE) -> bytes:
    record = self._records[int(index)]
    where = f'record {index} of the ArrayRecord files'
    try:
      record.decode()
    except UnicodeDecodeError:
      raise ConfigError(f'{where} is not UTF-8 text; write records as text or JSON') from None
    if self._text_key and record.lstrip().startswith(b'{') and _is_json(record):
      record = _json_text(record, self._text_key, where)
    return record[start:end]


Documents = FileDocuments | JsonlDocuments | ArrayRecordDocuments


def open_documents(data: DataConfig) -> Documents:
  """Finds and checks all documents of a source, training and held-out.

  Raises ConfigError: no such path, nothing there, a file that can't be read or is not UTF-8, a malformed line (named
  as file:line), a record without data.text_key. What ArrayRecord records hold is checked when they are read.
  """
  data.validate()
  fraction = data.held_out_fraction
  if data.source in ('stdlib', 'site-packages'):
    if data.path:
      raise ConfigError(f'data.path={data.path!r} is not read by data.source={data.source!r}; use data.source=text, '
                        'jsonl or arrayrecord, or leave data.path empty')
    documents = FileDocuments(_python_files(data.source), fraction, skip_other_encodings=True)
  elif data.source == 'text':
    documents = FileDocuments(_files(data.path), fraction, skip_other_encodings=False)
    if fraction and len(documents.sizes) == 1:
      documents.split_single_file(fraction)
  elif data.source == 'jsonl':
    documents = JsonlDocuments(_files(data.path, '.jsonl'), fraction, data.text_key)
  else:
    documents = ArrayRecordDocuments(_files(data.path, '.arrayrecord', '.array_record'), fraction, data.text_key)
  if not len(documents.sizes):
    where = repr(data.path) if data.path else f"the interpreter's library, {sysconfig.get_path('stdlib')},"
    raise ConfigError(f'data.path: {where} holds no documents (all files are empty); choose another data.path')
  return documents


class Piece(NamedTuple):
  text: str
  first: bool  # nothing of the document comes before it
  last: bool  # nothing comes after it


class Pieces:
  """The training (or held-out) documents as pieces, a random-access source for Grain.

  A document longer than data.piece_bytes is cut at line ends. No piece is longer than that, unless it is one line.
  """

  def __init__(self, data: DataConfig, *, held_out: bool):
    self._documents = open_documents(data)
    chosen = np.flatnonzero(self._documents.held_out == held_out)
    if not len(chosen):
      raise ConfigError(f'data.held_out_fraction={data.held_out_fraction} holds out none of the '
                        f'{len(self._documents.sizes)} documents; use a larger fraction, or more documents')
    sizes = self._documents.sizes[chosen]
    cut = (sizes > data.piece_bytes) & (data.piece_bytes > 0)
    whole = np.stack([chosen, np.zeros_like(chosen), sizes, np.ones_like(chosen)], axis=1)[~cut]
    parts = [(document, start, end, last) for document in chosen[cut]
             for start, end, last in cut_at_line_ends(self._documents.read(document), data.piece_bytes)]
    self._table = np.concatenate([whole, np.array(parts, np.int64).reshape(-1, 4)])  # document, start, end, last

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, index: int) -> Piece:
    document, start, end, last = (int(value) for value in self._table[index])
    return Piece(self._documents.read(document, start, end).decode(), start == 0, bool(last))


def cut_at_line_ends(text: bytes, piece_bytes: int) -> Iterator[tuple[int, int, bool]]:
  """(start, end, is it the last) of each piece: as many whole lines as fit in piece_bytes, at least one."""
  ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord('\n')) + 1
  start = 0
  while len(text) - start > piece_bytes:
    fits = int(np.searchsorted(ends, start + piece_bytes, side='right'))
    if fits and ends[fits - 1] > start:
      end = int(ends[fits - 1])
    elif fits < len(ends) and ends[fits] < len(text):
      end = int(ends[fits])
    else:
      break  # the rest is one line
    yield start, end, False
    start = end
  yield start, len(text), True


def _hash_split(names: Iterable[str], fraction: float) -> np.ndarray:
  """Which documents are held out: those whose name's hash, read as a number in [0, 1), is below the fraction.

  It depends on no other name, except that both sides get at least one document where there are two.
  """
  scores = np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names])
  held_out = scores < fraction
  if len(scores) and fraction:
    if len(scores) > 1 and not held_out.any():
      held_out[scores.argmin()] = True
    if held_out.all():
      held_out[scores.argmax()] = False
  return held_out


def _add_to_digest(digest, name: str, text: bytes):
  digest.update(f'{name}\n{len(text)}\n'.encode())  # the length keeps (name, content) pairs apart
  digest.update(text)


def _json_text(line: bytes, text_key: str, where: str) -> bytes:
  try:
    record = json.loads(line)
  except ValueError as error:  # not JSON, or not UTF-8
    raise ConfigError(f'{where} is not JSON ({error}); correct or remove it') from None
  text = record.get(text_key) if isinstance(record, dict) else None
  if not isinstance(text, str):
    found = f'its fields are {", ".join(map(repr, record)) or "none"}' if isinstance(record, dict) else 'no object'
    raise ConfigError(f'{where} has no text in data.text_key={text_key!r} ({found}); set --config.data.text_key')
  try:
    return text.encode()
  except UnicodeEncodeError:
    raise ConfigError(f'{where} holds half a surrogate pair, which is no text; correct or remove it') from None


def _is_json(record: bytes) -> bool:
  try:
    json.loads(record)
  except ValueError:
    return False
  return True


def _read_file(path: Path, start: int = 0, length: int = -1) -> bytes:
  try:
    with open(path, 'rb') as file:
      file.seek(start)
      return file.read(length)
  except OSError as error:
    raise ConfigError(f'{path} can not be read ({error.strerror}); correct its permissions or remove it') from None


def _lines(path: Path) -> Iterator[bytes]:
  try:
    with open(path, 'rb') as file:
      yield from file
  except OSError as error:
    raise ConfigError(f'{path} can not be read ({error.strerror}); correct its permissions or remove it') from None


def _walk(root: Path, skipped_folders: frozenset[str] = frozenset()) -> Iterator[tuple[str, Path]]:
  """(relative name, path) of all files below a folder that are not hidden."""
  for folder, children, files in os.walk(root):
    children[:] = [name for name in children if not name.startswith('.') and name not in skipped_folders]
    for name in files:
      if not name.startswith('.'):
        path = Path(folder, name)
        yield path.relative_to(root).as_posix(), path


def _files(path: str, *endings: str) -> list[tuple[str, Path]]:
  """The file itself, or the folder's files whose name contains one of the endings (shards append to them)."""
  root = Path(path).expanduser()
  if not root.exists():
    raise ConfigError(f'data.path={path!r} does not exist; set --config.data.path to a file or a folder')
  if not root.is_dir():
    return [(root.name, root)]
  found = sorted(item for item in _walk(root) if not endings or any(ending in item[1].name for ending in endings))
  if not found:
    kind = f'{" or ".join("*" + ending for ending in endings)} files' if endings else 'files'
    raise ConfigError(f'data.path={path!r} holds no {kind}; set --config.data.path to another folder, or data.source')
  return found


def _python_files(source: str) -> list[tuple[str, Path]]:
  """The interpreter's own library, without tests; then, for site-packages, what is installed."""
  roots = [('', sysconfig.get_path('stdlib'))]
  if source == 'site-packages':
    installed = dict.fromkeys([sysconfig.get_path('purelib'), sysconfig.get_path('platlib')])
    roots += [('site-packages/', root) for root in installed]
  files = sorted((prefix + name, path) for prefix, root in roots
                 for name, path in _walk(Path(root), _SKIPPED_FOLDERS) if name.endswith('.py'))
  if not files:
    raise ConfigError(f'{roots[0][1]} holds no *.py files, so data.source={source!r} has nothing to read; '
                      'use --config.data.source=text with a data.path')
  return files

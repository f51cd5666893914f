"""Directories of safetensors files: what is in them, and any part of a tensor; and how one is written.

Our own few lines over the format (8 bytes: the header's length; the header, JSON; the tensors one after the other)
rather than the safetensors package: parts are read into memory of our own instead of through a mapping of the whole
file, FP8 scales in ue8m0 have a dtype, a file is written one tensor at a time, and every damage is one line.
https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mla_jax.config import ConfigError

log = logging.getLogger(__name__)

DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16,
    'U8': np.uint8, 'BOOL': np.bool_, 'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
INDEX = 'model.safetensors.index.json'
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
PAGE = 4096  # bytes that a disk reads at least: skipping less saves nothing
BUFFER = 16 << 20  # bytes read at a time where rows are cut


class HFError(ConfigError):
  """A Hugging Face directory that can't be read as a model, or written; its message is one line that says why."""


class Stored(NamedTuple):
  """A tensor in a file. offset: of its first byte in the file."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  @property
  def itemsize(self) -> int:
    return np.dtype(DTYPES[self.dtype]).itemsize

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.itemsize


def read_json(path: Path) -> dict:
  if not path.is_file():
    raise HFError(f'{path} does not exist; a Hugging Face directory has config.json and *.safetensors')
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError, RecursionError) as error:
    raise HFError(f'{path} can not be read as JSON ({error})') from error
  if not isinstance(values, dict):
    raise HFError(f'{path} is no JSON object')
  return values


def scan(directory: Path) -> dict[str, Stored]:
  """Every tensor of every *.safetensors file of a directory, from their headers. Where there is an index, it and the
  files must say the same. Raises HFError."""
  index = directory / INDEX
  named = _index(index) if index.exists() else None
  files = sorted(directory.glob('*.safetensors'))
  if any(file.name.startswith('consolidated') for file in files) and len(files) > 1:
    # Mistral's directories hold the model twice; this is the other layout.
    log.warning('%s: consolidated*.safetensors is left out; the other files hold the model', directory)
    files = [file for file in files if not file.name.startswith('consolidated')]
  lost = sorted(set((named or {}).values()) - {file.name for file in files})
  if lost:
    raise HFError(f'{directory}: {len(lost)} of the files that {index.name} names do not exist ({", ".join(lost[:3])})')
  if not files:
    pickled = ''.join(f'; {file.name} is a pickle, which can run code and is not read' for file in
                      sorted(directory.glob('*.bin'))[:1])
    raise HFError(f'{directory} has no *.safetensors file{pickled}')
  stored = {}
  for file in files:
    for name, tensor in _header(file).items():
      if name in stored:
        raise HFError(f'{directory}: {name} is in {stored[name].file.name} and in {file.name}; remove one of them')
      stored[name] = tensor
  if named is not None:
    for name, file in named.items():
      if name not in stored or stored[name].file.name != file:
        raise HFError(f'{index} says that {name} is in {file}, which does not hold it; fetch both again')
    if extra := sorted(stored.keys() - named.keys()):
      raise HFError(f'{index} lacks {len(extra)} of the tensors in the files ({", ".join(extra[:3])}); fetch it again, '
                    'or remove it: the files alone say as much')
  return stored


def _index(path: Path) -> dict[str, str]:
  named = read_json(path).get('weight_map')
  if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
    raise HFError(f'{path} has no weight_map from names of tensors to names of files')
  for name, file in named.items():
    if Path(file).name != file or file in ('', '.', '..') or '\\' in file:
      raise HFError(f'{path} says that {name} is in {file!r}, which is no name of a file in this directory')
  return named


def _header(file: Path) -> dict[str, Stored]:
  def bad(why):
    return HFError(f'{file} can not be read ({why}); it may be cut short: fetch it again')

  def once(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
      raise bad('a name is there twice')
    return dict(pairs)

  try:
    size = file.stat().st_size
    with file.open('rb') as handle:
      length = int.from_bytes(handle.read(8), 'little')
      if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise bad(f'its header would be {length} bytes long, the file is {size}')
      values = json.loads(handle.read(length), object_pairs_hook=once)
  except OSError as error:
    raise bad(error) from error
  except (ValueError, RecursionError) as error:
    raise (error if isinstance(error, HFError) else bad(f'its header is no JSON: {error}')) from error
  if not isinstance(values, dict):
    raise bad('its header is no JSON object')
  stored, spans = {}, []
  for name, entry in values.items():
    if name == '__metadata__':
      continue
    try:
      dtype, shape, (begin, end) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
      fits = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
      raise bad(f'{name} has no dtype, shape and data_offsets') from error
    if dtype not in DTYPES:
      raise HFError(f'{file}: {name} has the unknown dtype {dtype!r}; known are {", ".join(DTYPES)}')
    if not fits or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
      raise bad(f'{name} is {dtype} {list(shape)} at bytes {begin} to {end}')
    stored[name] = Stored(file, dtype, shape, 8 + length + begin)
    spans.append((begin, end))
  at = 0
  for begin, end in sorted(spans):
    if begin != at:
      raise bad(f'its tensors leave a gap or overlap at byte {at}')
    at = end
  if 8 + length + at != size:
    raise bad(f'its tensors end at byte {8 + length + at}, the file at {size}')
  return stored


class Reader:
  """Reads parts of tensors; one file descriptor a file. `bytes_read` is what it asked the files for."""

  def __init__(self, stored: dict[str, Stored]):
    self.stored, self.bytes_read = stored, 0
    self._handles, self._lock = {}, threading.Lock()  # threads may read at once

  def __enter__(self):
    for file in {tensor.file for tensor in self.stored.values()}:
      self._handles[file] = os.open(file, os.O_RDONLY)
    return self

  def __exit__(self, *_):
    for handle in self._handles.values():
      os.close(handle)
    self._handles.clear()

  def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or the part of it that `box` says: a slice with start and stop a dimension."""
    tensor = self.stored[name]
    box = whole(tensor.shape) if box is None else box
    out = np.empty([s.stop - s.start for s in box], DTYPES[tensor.dtype])
    if not out.size:
      return out
    # Everything is a matrix of which some rows, and of these some columns, are wanted.
    row = math.prod(tensor.shape[1:]) * tensor.itemsize if box else tensor.itemsize
    first, rows = (box[0].start, len(out)) if box else (0, 1)
    if out.shape[1:] == tensor.shape[1:] or not box:
      self._fill(tensor, out, first * row)
    elif out.ndim > 2 or row - out[0].nbytes < PAGE:
      step = max(BUFFER // row, 1)
      for begin in range(0, rows, step):
        count = min(step, rows - begin)
        lines = np.empty((count, *tensor.shape[1:]), out.dtype)
        self._fill(tensor, lines, (first + begin) * row)
        out[begin:begin + count] = lines[(slice(None), *box[1:])]
    else:
      for i in range(rows):
        self._fill(tensor, out[i], (first + i) * row + box[1].start * tensor.itemsize)
    return out

  def _fill(self, tensor: Stored, array: np.ndarray, offset: int):
    view, at = memoryview(array.reshape(-1).view(np.uint8)), tensor.offset + offset
    with self._lock:
      self.bytes_read += len(view)
    while view:
      count = os.preadv(self._handles[tensor.file], [view], at)
      if not count:
        raise HFError(f'{tensor.file} ended while it was read')
      view, at = view[count:], at + count


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
  return tuple(slice(0, size) for size in shape)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor to be written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path, groups: list[tuple[Entry, ...]], make: Callable[[tuple], tuple[np.ndarray, ...]],
          largest: int, written: Callable[[int], None]):
  """Writes model-0000i-of-0000n.safetensors of at most `largest` bytes of tensors each, and their index; or one
  model.safetensors where all fits. A group is made, and lies, together: `make(group)` returns its tensors when their
  turn comes; `written` hears of their bytes."""
  files, room = [], 0
  for group in groups:
    size = sum(entry.nbytes for entry in group)
    if not files or size > room:
      files.append([])
      room = largest
    files[-1].append(group)
    room -= size
  names = [f'model-{i:05d}-of-{len(files):05d}.safetensors' for i in range(1, len(files) + 1)]
  if len(files) == 1:
    names = ['model.safetensors']
  for file, inside in zip(names, files, strict=True):
    _write_file(directory / file, inside, make, written)
  if len(files) > 1:
    entries = [(file, entry) for file, inside in zip(names, files, strict=True) for group in inside for entry in group]
    values = dict(metadata=dict(total_size=sum(entry.nbytes for _, entry in entries)),
                  weight_map={entry.name: file for file, entry in entries})
    write_text(directory / INDEX, json.dumps(values, indent=2))


def _write_file(path: Path, groups: list[tuple[Entry, ...]], make, written):
  # Widest elements first: readers view the bytes in place, so an element must begin at a multiple of its size.
  header, at, places = {'__metadata__': {'format': 'pt'}}, 0, {}
  for entry in sorted((e for group in groups for e in group), key=lambda e: -e.dtype.itemsize):
    header[entry.name] = dict(dtype=NAMES[entry.dtype], shape=entry.shape, data_offsets=(at, at + entry.nbytes))
    places[entry.name] = at
    at += entry.nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for group in groups:
      for entry, array in zip(group, make(group), strict=True):
        if array.shape != entry.shape or array.dtype != entry.dtype:
          raise ValueError(f'{entry.name} became {array.dtype} {array.shape}, not {entry.dtype} {entry.shape}')
        file.seek(8 + len(text) + places[entry.name])
        file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        written(entry.nbytes)
    file.flush()
    os.fsync(file.fileno())


def write_text(path: Path, text: str):
  with path.open('w', encoding='utf-8') as file:
    file.write(text + '\n')
    file.flush()
    os.fsync(file.fileno())


def require_free(directory: Path):
  """Raises HFError where something is there already."""
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise HFError(f'{directory} exists and is not empty; name another directory')


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
  """A directory to write in, which takes its name when all is on disk; on an error nothing is left."""
  require_free(directory)
  partial = directory.with_name(f'.{directory.name}.{os.getpid()}.partial')
  try:
    partial.mkdir(parents=True)
    yield partial
    _sync(partial)
    partial.rename(directory)
    _sync(directory.parent)
  except OSError as error:
    raise HFError(f'{directory} can not be written ({error})') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path):
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)

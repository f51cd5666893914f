"""Packed batches through Grain.

Row r of a global batch of R rows is a stream of its own. All rows read one endless shuffle of the pieces, each epoch
in a new order, row r every R-th of it from the r-th on; so a row needs nothing of the others, whoever holds them.
A piece becomes [bos] text [eos] (no bos unless the document begins in it, no eos unless it ends in it), and rows are
the concatenation of these, split every `length` tokens. In a row, `segments` counts pieces from 1 (0 is padding) and
`positions` count from the beginning of each segment: where a piece goes on in the next row, attention can't see its
beginning, so positions start at 0 again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import grain
import numpy as np

from mla_jax.config import ConfigError, DataConfig
from mla_jax.data.sources import Piece, Pieces, open_documents
from mla_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]  # tokens, segments, positions: int32 [rows, length]
_KEYS = ('tokens', 'segments', 'positions')
_IN_TURN = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # no read-ahead: states are exact, threads none
_EMPTY_IN_A_ROW = 1000  # pieces without a token, after which a source counts as empty
_HELD_OUT_PIECE_BYTES = 1 << 20  # documents stay whole, unless encoding one takes long
_HELD_OUT_SEED = 0  # not data.shuffle_seed: held-out losses of runs with other seeds stay comparable


def encode_piece(piece: Piece, rng: np.random.Generator, *, tokenizer: Tokenizer, fim_rate: float) -> np.ndarray:
  """The tokens of a piece, int32; rearranged for fill-in-the-middle with probability fim_rate.

  PSM of the DeepSeek-V3 report (arXiv 2412.19437, 4.1): fim_prefix, prefix, fim_suffix, suffix, fim_middle, middle,
  cut at two characters.
  """
  parts = [_ids(tokenizer.bos_id)] if piece.first else []
  if fim_rate and rng.random() < fim_rate:
    a, b = np.sort(rng.integers(0, len(piece.text) + 1, 2))
    for mark, text in ((tokenizer.fim_prefix_id, piece.text[:a]), (tokenizer.fim_suffix_id, piece.text[b:]),
                       (tokenizer.fim_middle_id, piece.text[a:b])):
      parts += [_ids(mark), tokenizer.encode_array(text)]
  else:
    parts.append(tokenizer.encode_array(piece.text))
  if piece.last:
    parts.append(_ids(tokenizer.eos_id))
  return np.concatenate(parts)


def _ids(special: int | None) -> np.ndarray:
  return np.array([] if special is None else [special], np.int32)


class _Packed(grain.IterDataset):
  """Concatenates arrays of tokens and splits them every `length`."""

  def __init__(self, parent: grain.IterDataset, length: int):
    super().__init__(parent)
    self._length = length

  def __iter__(self) -> '_PackedIterator':
    return _PackedIterator(iter(self._parent), self._length)


class _PackedIterator(grain.DatasetIterator):
  """Its state is where the piece it stands in begins in the parent, and how many of that piece's tokens are gone."""

  def __init__(self, parent: grain.DatasetIterator, length: int):
    super().__init__(parent)
    self._length = length
    self._piece_state = parent.get_state()
    self._tokens = _ids(None)
    self._offset = 0

  def __next__(self) -> Batch:
    row = {key: np.zeros(self._length, np.int32) for key in _KEYS}
    filled, empty = 0, 0
    for segment in itertools.count(1):
      while self._offset == len(self._tokens):
        if not self._read_piece():
          if not filled:
            raise StopIteration
          return row
        empty = 0 if len(self._tokens) else empty + 1
        if empty == _EMPTY_IN_A_ROW:
          raise ConfigError(f'data.path: {empty} documents in a row have no tokens; choose another data.path')
      take = min(self._length - filled, len(self._tokens) - self._offset)
      place = slice(filled, filled + take)
      row['tokens'][place] = self._tokens[self._offset:self._offset + take]
      row['segments'][place] = segment
      row['positions'][place] = np.arange(take)
      filled += take
      self._offset += take
      if filled == self._length:
        return row

  def _read_piece(self) -> bool:
    state = self._parent.get_state()
    tokens = next(self._parent, None)
    if tokens is None:
      return False
    self._piece_state, self._tokens, self._offset = state, tokens, 0
    return True

  def get_state(self) -> dict:
    return {'piece': self._piece_state, 'offset': self._offset}

  def set_state(self, state: dict):
    self._parent.set_state(state['piece'])
    self._piece_state, self._tokens, self._offset = state['piece'], _ids(None), 0
    if state['offset']:
      self._read_piece()
      self._offset = state['offset']


class Batches:
  """The endless training batches, or the rows of them that this process holds.

  Args:
    length: tokens a row: the sequence length and one more, since inputs and targets are both cut out of it.
    num_rows: rows of the global batch, over all processes.
    rows: global ids of the rows held here, in the order of the result; None = all.

  Raises ConfigError as `sources.open_documents` does; for fill-in-the-middle without its tokens; for a seed Grain
  can't take.
  """

  def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, length: int, num_rows: int,
               rows: Sequence[int] | None = None):
    self._num_rows = num_rows
    self._length = length
    rows = range(num_rows) if rows is None else rows
    if length < 1 or len(set(rows)) != len(rows) or not all(0 <= row < num_rows for row in rows):
      raise ValueError(f'{length=} and {rows=} do not fit {num_rows=}; use distinct rows below num_rows, length >= 1')
    if not 0 <= data.shuffle_seed < 2**32:
      raise ConfigError(f'data.shuffle_seed={data.shuffle_seed} is outside [0, 2**32); use a seed in it')
    fim = {kind: getattr(tokenizer, f'{kind}_id') for kind in ('fim_prefix', 'fim_suffix', 'fim_middle')}
    if data.fim_rate and None in fim.values():
      missing = ', '.join(kind for kind, value in fim.items() if value is None)
      raise ConfigError(f'data.fim_rate={data.fim_rate} needs fill-in-the-middle tokens, but tokenizer '
                        f'{tokenizer.name!r} has no {missing}; use data.fim_rate=0 or another tokenizer')
    encode = functools.partial(encode_piece, tokenizer=tokenizer, fim_rate=data.fim_rate)
    # random_map sits below the shuffle, where Grain's index is piece + epoch * pieces: its generator depends on both
    stream = grain.MapDataset.source(Pieces(data, held_out=False)).seed(data.shuffle_seed)
    stream = stream.random_map(encode).shuffle().repeat()
    self._rows = {row: iter(_Packed(stream[row::num_rows].to_iter_dataset(_IN_TURN), length)) for row in rows}

  def next(self, num_rows: int | None = None) -> Batch:
    """The next batch. With num_rows, a smaller global batch: only rows below it are read, the others stand still."""
    num_rows = self._num_rows if num_rows is None else num_rows
    if not 1 <= num_rows <= self._num_rows:
      raise ValueError(f'{num_rows=} is outside [1, {self._num_rows}]; use a batch size up to the one declared')
    return _stack([next(stream) for row, stream in self._rows.items() if row < num_rows], self._length)

  def state(self) -> dict:
    """{row: where its stream stands after the batches returned}, for JSON."""
    return {str(row): stream.get_state() for row, stream in self._rows.items()}

  def restore(self, state: dict):
    """Takes up the held rows where `state`, of any objects that held them then, says they stood."""
    missing = [row for row in self._rows if str(row) not in state]
    if missing:
      raise ConfigError(f'the data state has no position for row {missing[0]} (of {len(self._rows)}, {len(missing)} '
                        'are missing); resume with the batch size the run was started with')
    for row, stream in self._rows.items():
      stream.set_state(state[str(row)])


def held_out_batches(data: DataConfig, tokenizer: Tokenizer, *, length: int, batch_size: int,
                     num_batches: int) -> list[Batch]:
  """Batches of held-out text, the same at every call and for every shuffle seed; no fill-in-the-middle.

  Documents are visited in a fixed shuffle and each gives as few consecutive rows as fill the batches, from a random
  place, so that a few long ones don't decide the loss. A split that can't fill num_batches gives fewer; one that
  can't fill a batch gives one, padded with segments 0. Raises ConfigError when nothing is held out.
  """
  pieces = Pieces(dataclasses.replace(data, piece_bytes=_HELD_OUT_PIECE_BYTES), held_out=True)
  wanted = batch_size * num_batches
  most = length * -(-wanted // len(pieces))  # tokens of a piece
  tokens = 0
  while True:
    stream = grain.MapDataset.source(pieces).seed(_HELD_OUT_SEED)
    stream = stream.random_map(functools.partial(_cut_piece, tokenizer=tokenizer, most=most)).shuffle()
    rows = list(itertools.islice(_Packed(stream.to_iter_dataset(_IN_TURN), length), wanted))
    full = [row for row in rows if row['segments'][-1]]  # all but the end of the text
    before, tokens = tokens, sum(np.count_nonzero(row['segments']) for row in rows)
    if len(full) == wanted or tokens == before:  # enough, or pieces were whole the time before
      break
    most *= 2
  if not rows:
    raise ConfigError('data.held_out_fraction: the held-out documents have no tokens; use a larger fraction')
  if len(full) < batch_size:
    return [_stack(rows + [{key: np.zeros(length, np.int32) for key in _KEYS}] * (batch_size - len(rows)), length)]
  return [_stack(full[i:i + batch_size], length) for i in range(0, len(full) - batch_size + 1, batch_size)]


def _cut_piece(piece: Piece, rng: np.random.Generator, *, tokenizer: Tokenizer, most: int) -> np.ndarray:
  tokens = encode_piece(piece, rng, tokenizer=tokenizer, fim_rate=0)
  start = rng.integers(0, max(len(tokens) - most, 0) + 1)
  return tokens[start:start + most]


def _stack(rows: list[Batch], length: int) -> Batch:
  return {key: np.array([row[key] for row in rows], np.int32).reshape(-1, length) for key in _KEYS}


def source_digest(data: DataConfig) -> str:
  """sha256 of the source: names and content of all documents (ArrayRecord: of its files' names and sizes)."""
  return open_documents(data).digest

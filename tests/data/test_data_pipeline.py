"""Packed rows against a plain-Python reading of their token stream; resume, ownership, fill-in-the-middle."""

import collections
import itertools
import json

import numpy as np
import pytest
import tokenizers
from array_record.python import array_record_module
from tokenizers import models

from mla_jax.config import ConfigError, DataConfig
from mla_jax.data import pipeline
from mla_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_bpe

BYTE = ByteTokenizer()
NUM_DOCUMENTS = 50
LENGTH = 48
ROWS = 4


def document(i):
  return f'<{i}> ' + 'é line\n' * (i * 7 % 23) + f'</{i}>'


DOCUMENTS = [document(i) for i in range(NUM_DOCUMENTS)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('corpus')
  for i, text in enumerate(DOCUMENTS):
    (path / f'{i:03}.txt').write_text(text, encoding='utf-8')
  return path


@pytest.fixture
def data(folder):
  return DataConfig(source='text', path=str(folder), held_out_fraction=0, shuffle_seed=3)


def batches_of(data, rows=None, tokenizer=BYTE, **settings):
  return pipeline.Batches(data, tokenizer, **{'length': LENGTH, 'num_rows': ROWS, 'rows': rows} | settings)


def take(batches, count):
  return [batches.next() for _ in range(count)]


def assert_same(got, expected):
  assert len(got) == len(expected)
  for one, other in zip(got, expected, strict=True):
    assert one.keys() == other.keys() == {'tokens', 'segments', 'positions'}
    for key in one:
      assert one[key].dtype == np.int32
      np.testing.assert_array_equal(one[key], other[key])


def streams_of(taken):
  """The tokens of each row in order, batch after batch."""
  return [np.concatenate([batch['tokens'][row] for batch in taken]) for row in range(len(taken[0]['tokens']))]


def split_documents(stream):
  """The finished [bos ... eos] runs of a stream, without the two."""
  documents, current = [], None
  for token in stream.tolist():
    if token == BYTE.bos_id:
      assert current is None
      current = []
    elif token == BYTE.eos_id:
      documents.append(current)
      current = None
    else:
      current.append(token)
  return documents


def assert_packed(batch):
  """Segments count what eos ends, positions count inside segments; both begin anew with the row."""
  for tokens, segments, positions in zip(batch['tokens'], batch['segments'], batch['positions'], strict=True):
    segment, position = 1, 0
    for t, token in enumerate(tokens):
      assert (segments[t], positions[t]) == (segment, position)
      position += 1
      if token == BYTE.eos_id:
        segment, position = segment + 1, 0


def test_rows_are_documents_laid_end_to_end(data):
  taken = take(batches_of(data), 40)
  for batch in taken:
    assert all(batch[key].shape == (ROWS, LENGTH) for key in batch)
    assert_packed(batch)
  for stream in streams_of(taken):
    for ids in split_documents(stream):
      assert bytes(ids).decode() in DOCUMENTS


def documents_by_turn(data, num_rows, turns):
  """Documents in the order of the global shuffle: turn k of row r is its place k * num_rows + r."""
  length = 256  # longer than a document with bos and eos, so a batch ends at least one more in each row
  batches = batches_of(data, num_rows=num_rows, length=length)
  rows = [split_documents(stream)[:turns] for stream in streams_of(take(batches, turns))]
  return [bytes(rows[r][k]).decode() for k in range(turns) for r in range(num_rows)]


def test_every_epoch_has_every_document_once_in_a_new_order(data):
  order = documents_by_turn(data, num_rows=4, turns=30)
  epochs = [order[i * NUM_DOCUMENTS:(i + 1) * NUM_DOCUMENTS] for i in range(2)]
  assert [sorted(epoch) for epoch in epochs] == [sorted(DOCUMENTS)] * 2
  assert epochs[0] != epochs[1]
  assert DOCUMENTS not in epochs
  assert documents_by_turn(data, num_rows=5, turns=10) == epochs[0]  # the number of rows only deals the same order out
  data.shuffle_seed = 4
  assert documents_by_turn(data, num_rows=5, turns=10) not in epochs


def test_pieces_are_shuffled_apart_and_marked_once_a_document(data):
  data.piece_bytes = 64
  batches = batches_of(data, num_rows=1, length=1 << 16)
  row = {key: value[0] for key, value in batches.next().items()}
  starts = np.flatnonzero(row['positions'] == 0)
  runs = [row['tokens'][a:b].tolist() for a, b in itertools.pairwise(starts)]
  assert (np.diff(row['segments'][starts]) == 1).all()
  per_epoch = sum(len(BYTE.encode(text)) for text in DOCUMENTS) + 2 * NUM_DOCUMENTS
  epoch, size = [], 0
  for run in runs:
    if size < per_epoch:
      epoch.append(run)
      size += len(run)
  assert size == per_epoch
  counts = collections.Counter(token for run in epoch for token in run)
  assert counts[BYTE.bos_id] == counts[BYTE.eos_id] == NUM_DOCUMENTS
  assert all(token not in run[1:] for run in epoch for token in [BYTE.bos_id])
  assert all(token not in run[:-1] for run in epoch for token in [BYTE.eos_id])
  assert max(map(len, epoch)) <= 66
  assert len(epoch) > 2 * NUM_DOCUMENTS
  text = sorted(line for run in epoch for line in BYTE.decode(run).splitlines(keepends=True))
  assert text == sorted(line for document in DOCUMENTS for line in document.splitlines(keepends=True))


def test_fewer_documents_than_rows(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'{i}' * 40)
  data = DataConfig(source='text', path=str(tmp_path), held_out_fraction=0)
  taken = take(batches_of(data, num_rows=7, length=42 * 4), 1)
  orders = [tuple(ids[0] for ids in split_documents(stream)) for stream in streams_of(taken)]
  assert all(len(order) == 4 for order in orders)
  assert len(set(orders)) > 2


@pytest.mark.parametrize('kind', ['jsonl', 'arrayrecord'])
def test_sources_of_records_give_the_same_batches_as_files(data, tmp_path, kind):
  path = tmp_path / f'x.{kind}'
  if kind == 'jsonl':
    path.write_text('\n'.join(json.dumps({'text': text}) for text in DOCUMENTS))
  else:
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for text in DOCUMENTS:
      writer.write(text.encode())
    writer.close()
  records = DataConfig(source=kind, path=str(path), held_out_fraction=0, shuffle_seed=3)
  assert_same(take(batches_of(records), 20), take(batches_of(data), 20))
  assert pipeline.source_digest(records) != pipeline.source_digest(data)


def test_library_tokenizer(data):
  tokenizer = train_bpe(data, 280)
  taken = take(batches_of(data, tokenizer=tokenizer), 10)
  for stream in streams_of(taken):
    text = ''.join(tokenizer.decode(stream[1:stream.tolist().index(tokenizer.eos_id)]))
    assert stream[0] == tokenizer.bos_id
    assert text in DOCUMENTS


def unarranged(ids):
  """The text of a document rearranged prefix-suffix-middle, and whether it was."""
  if ids[0] != BYTE.fim_prefix_id:
    return bytes(ids).decode(), False
  suffix, middle = ids.index(BYTE.fim_suffix_id), ids.index(BYTE.fim_middle_id)
  assert suffix < middle
  prefix_text, suffix_text, middle_text = (bytes(part).decode() for part in
                                           (ids[1:suffix], ids[suffix + 1:middle], ids[middle + 1:]))
  return prefix_text + middle_text + suffix_text, True


def test_fill_in_the_middle_inverts_to_the_document(data):
  data.fim_rate = 0.5
  length = 1 << 16  # several epochs
  ids = split_documents(batches_of(data, num_rows=1, length=length).next()['tokens'][0])
  epochs = [ids[i * NUM_DOCUMENTS:(i + 1) * NUM_DOCUMENTS] for i in range(3)]
  variants = collections.defaultdict(set)
  for epoch in epochs:
    texts, arranged = zip(*map(unarranged, epoch), strict=True)
    assert sorted(texts) == sorted(DOCUMENTS)
    assert 10 < sum(arranged) < 40  # of 50 at rate 1/2
    for text, document_ids in zip(texts, epoch, strict=True):
      variants[text].add(tuple(document_ids))
  assert sum(len(versions) > 1 for versions in variants.values()) > 30  # drawn anew each epoch
  data.fim_rate = 1.0
  ids = split_documents(batches_of(data, num_rows=1, length=length).next()['tokens'][0])
  assert all(unarranged(document_ids)[1] for document_ids in ids)


def rows_of(taken, rows):
  return [{key: batch[key][rows] for key in batch} for batch in taken]


FEATURES = [{}, {'fim_rate': 0.5, 'piece_bytes': 64}]


@pytest.mark.parametrize('features', FEATURES)
def test_resumes_exactly_after_every_batch(data, features):
  batches = batches_of(DataConfig(**vars(data) | features))
  states, taken = [], []
  for _ in range(30):
    states.append(json.dumps(batches.state()))
    taken.append(batches.next())
  resumed = batches_of(DataConfig(**vars(data) | features))
  for step in (0, 29, *range(1, 28)):  # forwards and back
    resumed.restore(json.loads(states[step]))
    assert json.dumps(resumed.state()) == states[step]
    assert_same(take(resumed, 2), taken[step:step + 2] + take(batches, 1 if step == 29 else 0))


@pytest.mark.parametrize('features', FEATURES)
def test_rows_belong_to_whoever_holds_them(data, features):
  data = DataConfig(**vars(data) | features)
  whole = take(batches_of(data), 25)
  for split in ([[0, 1], [2, 3]], [[3], [0], [2], [1]], [[2, 0], [1, 3]]):
    state = {}
    for rows in split:
      owner = batches_of(data, rows)
      assert_same(take(owner, 15), rows_of(whole[:15], rows))
      state |= json.loads(json.dumps(owner.state()))
    for rows in ([0, 1, 2, 3], [1, 2], [3]):
      resumed = batches_of(data, rows)
      resumed.restore(state)
      assert_same(take(resumed, 10), rows_of(whole[15:], rows))


def test_smaller_batches_leave_the_other_rows_where_they_are(data):
  whole = take(batches_of(data), 4)
  batches, second_half = batches_of(data), batches_of(data, [2, 3])
  sizes = [2, 2, 3, 4]
  ramp = [batches.next(size) for size in sizes]
  assert [len(batch['tokens']) for batch in ramp] == sizes
  seen = collections.Counter()
  for batch in ramp:
    for row, tokens in enumerate(batch['tokens']):
      np.testing.assert_array_equal(tokens, whole[seen[row]]['tokens'][row])
      seen[row] += 1
  halves = [second_half.next(size) for size in sizes]
  assert [batch['tokens'].shape for batch in halves] == [(0, LENGTH), (0, LENGTH), (1, LENGTH), (2, LENGTH)]
  np.testing.assert_array_equal(halves[3]['tokens'], ramp[3]['tokens'][2:])
  assert batches.state()['3'] == second_half.state()['3']


def held_out(data, **settings):
  return pipeline.held_out_batches(data, BYTE, **{'length': 16, 'batch_size': 4, 'num_batches': 5} | settings)


def test_held_out_batches_are_fixed_and_spread(data):
  data.held_out_fraction = 0.4
  batches = held_out(data)
  assert len(batches) == 5
  assert all(batch[key].shape == (4, 16) for batch in batches for key in batch)
  other_run = DataConfig(**vars(data) | {'shuffle_seed': 9, 'fim_rate': 1.0, 'piece_bytes': 64})
  assert_same(held_out(other_run), batches)
  for batch in batches:
    assert (batch['segments'][:, 0] == 1).all()
    begins = np.diff(batch['segments'], axis=1, prepend=0) == 1
    np.testing.assert_array_equal(np.diff(batch['segments'], axis=1, prepend=0), begins)
    np.testing.assert_array_equal(batch['positions'] == 0, begins)
    assert (np.diff(batch['positions'], axis=1)[~begins[:, 1:]] == 1).all()
  training = split_documents(batches_of(data, num_rows=1, length=1 << 16).next()['tokens'][0])
  trained_on = {bytes(ids).decode() for ids in training}
  evaluated = [text for text in DOCUMENTS if text not in trained_on]
  assert 10 < len(evaluated) < 30
  everything = np.concatenate([batch['tokens'].ravel() for batch in held_out(data, num_batches=10**4)])
  assert sorted(bytes(ids).decode() for ids in split_documents(everything)) == evaluated_whole(evaluated, everything)
  # 20 rows of 16 tokens out of about 20 documents: a row each, where a document has 16 tokens
  runs = [run for batch in batches for row in zip(batch['tokens'], batch['segments'], strict=True)
          for run in np.split(row[0], np.flatnonzero(np.diff(row[1])) + 1)]
  homes = {text for run in runs for text in evaluated if BYTE.decode(run).strip('\ufffd') in text}
  assert len(homes) > 0.7 * len(evaluated)


def evaluated_whole(evaluated, everything):
  """All held-out documents but one that the last, unfinished row cut off."""
  finished = {bytes(ids).decode() for ids in split_documents(everything)}
  assert len(evaluated) - len(finished) <= 1
  return sorted(text for text in evaluated if text in finished)


def test_held_out_batches_take_more_of_the_long_documents_when_they_must(tmp_path):
  for i in range(12):
    (tmp_path / f'{i:02}.txt').write_text('long ' * 100 if i < 2 else 'ab')
  data = DataConfig(source='text', path=str(tmp_path), held_out_fraction=0.9999)  # leaves one to training
  assert len(held_out(data, batch_size=2, num_batches=15)) == 15  # 30 rows of 16 tokens, 11 documents


def test_held_out_split_smaller_than_asked(tmp_path):
  (tmp_path / 'a.txt').write_text('a' * 300 + '\n' + 'b' * 100)
  data = DataConfig(source='text', path=str(tmp_path), held_out_fraction=0.24)
  batches = held_out(data, length=20, batch_size=2)
  assert len(batches) == 2  # 102 tokens make 5 full rows
  assert all((batch['segments'] == 1).all() for batch in batches)
  padded, = held_out(data, length=80, batch_size=3)
  assert padded['tokens'].shape == (3, 80)
  assert padded['segments'].sum(axis=1).tolist() == [80, 22, 0]
  np.testing.assert_array_equal(padded['tokens'].ravel()[:102], [256, *b'b' * 100, 257])
  assert not padded['tokens'].ravel()[102:].any()


def test_held_out_split_of_nothing_is_refused(data):
  with pytest.raises(ConfigError, match=r'data.held_out_fraction=0 holds out none of the 50 documents'):
    held_out(data)


def test_fim_without_its_tokens_is_refused(data):
  library = tokenizers.Tokenizer(models.WordLevel({'a': 0, '<|fim_prefix|>': 1}, unk_token='a'))
  tokenizer = HuggingFaceTokenizer(library, 'words')
  data.fim_rate = 0.1
  with pytest.raises(ConfigError, match=r"data.fim_rate=0.1 .*'words' has no fim_suffix, fim_middle; use data"):
    batches_of(data, tokenizer=tokenizer)
  data.fim_rate = 0
  assert (batches_of(data, tokenizer=tokenizer).next()['tokens'] == 0).all()  # no bos, no eos: still packed


def test_documents_without_tokens_are_refused(data):
  library = tokenizers.Tokenizer(models.BPE(vocab={'a': 0}, merges=[]))  # unknown characters vanish
  with pytest.raises(ConfigError, match=r'data.path: 1000 documents in a row have no tokens'):
    batches_of(data, tokenizer=HuggingFaceTokenizer(library, 'none')).next()
  data.held_out_fraction = 0.5
  with pytest.raises(ConfigError, match='the held-out documents have no tokens'):
    pipeline.held_out_batches(data, HuggingFaceTokenizer(library, 'none'), length=8, batch_size=2, num_batches=1)


def test_bad_record_stops_the_batch_with_its_own_error(tmp_path):
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / 'x.arrayrecord'), 'group_size:1')
  writer.write(b'\xff')
  writer.close()
  data = DataConfig(source='arrayrecord', path=str(tmp_path), held_out_fraction=0)
  with pytest.raises(ConfigError, match=r'record 0 .* is not UTF-8') as caught:
    batches_of(data).next()
  assert '\n' not in str(caught.value)


def test_state_that_lacks_a_row_is_refused(data):
  state = batches_of(data, [0, 1]).state()
  with pytest.raises(ConfigError, match=r'no position for row 2 \(of 4, 2 are missing\); resume with the batch size'):
    batches_of(data).restore(state)


def test_impossible_rows_and_seeds_are_refused(data):
  for rows in ([4], [-1], [1, 1]):
    with pytest.raises(ValueError, match='do not fit num_rows=4'):
      batches_of(data, rows)
  for num_rows in (0, 5):
    with pytest.raises(ValueError, match=f'num_rows={num_rows} is outside'):
      batches_of(data).next(num_rows)
  data.shuffle_seed = -1
  with pytest.raises(ConfigError, match=r'data.shuffle_seed=-1 is outside'):
    batches_of(data)


def test_default_source_makes_batches():
  """The whole way on the standard library, as a run does it."""
  data = DataConfig(piece_bytes=2048, fim_rate=0.1)
  batch = batches_of(data, num_rows=16, length=257).next()
  assert batch['tokens'].shape == (16, 257)
  assert (batch['segments'] > 0).all()
  assert len(pipeline.held_out_batches(data, BYTE, length=257, batch_size=16, num_batches=8)) == 8

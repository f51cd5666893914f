"""Documents of every source against files written here; the split and the digest against their definitions."""

import hashlib
import json
import re
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from mla_jax.config import ConfigError, DataConfig
from mla_jax.data import sources

TEXTS = {
    'a.txt': 'one\ntwo\n',
    'b/c.py': 'x = "é"\r\n' * 40,
    'b/long.txt': 'w' * 300 + '\n' + '世界\n' * 60 + 'no line end',
    'd.txt': 'z',
}


def write_folder(folder, texts):
  for name, text in texts.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return str(folder)


def write_array_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()
  return str(path)


def text_config(folder, **settings):
  return DataConfig(source='text', path=str(folder), **settings)


def all_texts(documents):
  return [documents.read(i).decode() for i in range(len(documents.sizes))]


def test_text_folder_reads_every_visible_file(tmp_path):
  write_folder(tmp_path, TEXTS | {'.hidden': 'no', '.git/config': 'no', 'empty.txt': ''})
  documents = sources.open_documents(text_config(tmp_path))
  assert documents.names == sorted(TEXTS)
  assert all_texts(documents) == [TEXTS[name] for name in sorted(TEXTS)]
  assert documents.sizes.tolist() == [len(TEXTS[name].encode()) for name in sorted(TEXTS)]
  assert documents.read(0, 4, 7) == b'two'


def test_digest_covers_names_and_contents_only(tmp_path):
  expected = hashlib.sha256()
  for name in sorted(TEXTS):
    expected.update(f'{name}\n{len(TEXTS[name].encode())}\n'.encode() + TEXTS[name].encode())
  write_folder(tmp_path / 'one', TEXTS)
  shutil.copytree(tmp_path / 'one', tmp_path / 'elsewhere')

  def digest(folder, **settings):
    return sources.open_documents(text_config(tmp_path / folder, **settings)).digest

  assert digest('one') == digest('elsewhere') == digest('one', held_out_fraction=0.5) == expected.hexdigest()
  (tmp_path / 'elsewhere/d.txt').write_text('y')
  assert digest('elsewhere') != expected.hexdigest()
  (tmp_path / 'one/d.txt').rename(tmp_path / 'one/e.txt')
  assert digest('one') != expected.hexdigest()


def test_split_is_by_name_and_never_moves(tmp_path):
  names = [f'{i:02}.txt' for i in range(60)]
  for folder in ('one', 'two'):
    write_folder(tmp_path / folder, dict.fromkeys(names, folder))
  split = [sources.open_documents(text_config(tmp_path / folder, held_out_fraction=0.1)) for folder in ('one', 'two')]
  held_out = [name for name, out in zip(split[0].names, split[0].held_out, strict=True) if out]
  oracle = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) < 0.1 * 2**64]
  assert held_out == oracle
  # written down: no release may move documents across
  assert held_out == ['06.txt', '08.txt', '18.txt', '20.txt', '27.txt', '39.txt']
  assert split[1].held_out.tolist() == split[0].held_out.tolist()
  training, evaluation = (sources.Pieces(text_config(tmp_path / 'one', held_out_fraction=0.1), held_out=out)
                          for out in (False, True))
  assert len(training) + len(evaluation) == 60
  assert len(evaluation) == len(oracle)


@pytest.mark.parametrize('fraction', [1e-9, 0.999999])
def test_split_leaves_both_sides_one_document(tmp_path, fraction):
  write_folder(tmp_path, {f'{i}.txt': 'text' for i in range(3)})
  held_out = sources.open_documents(text_config(tmp_path, held_out_fraction=fraction)).held_out
  assert held_out.sum() == (1 if fraction < 0.5 else 2)


def test_single_file_holds_out_its_end(tmp_path):
  text = ''.join(f'line {i} é\n' for i in range(200))
  path = tmp_path / 'book.txt'
  path.write_text(text)
  documents = sources.open_documents(text_config(path, held_out_fraction=0.1))
  head, tail = all_texts(documents)
  assert documents.held_out.tolist() == [False, True]
  assert head + tail == text
  assert head.endswith('\n')
  assert abs(len(tail) / len(text) - 0.1) < 0.01
  assert documents.read(1, 2, 9) == tail.encode()[2:9]
  whole = sources.open_documents(text_config(path, held_out_fraction=0))
  assert all_texts(whole) == [text]
  assert whole.digest == documents.digest


@pytest.mark.parametrize('kind', ['text', 'jsonl', 'arrayrecord'])
def test_pieces_rejoin_to_the_documents(tmp_path, kind):
  if kind == 'text':
    path = write_folder(tmp_path, TEXTS)
  elif kind == 'jsonl':
    path = tmp_path / 'x.jsonl'
    path.write_text('\n'.join(json.dumps({'text': text}) for text in TEXTS.values()))
  else:
    path = write_array_records(tmp_path / 'x.arrayrecord', [text.encode() for text in TEXTS.values()])
  pieces = sources.Pieces(DataConfig(source=kind, path=str(path), held_out_fraction=0, piece_bytes=64), held_out=False)
  documents, current = [], None
  for index in np.lexsort(pieces._table.T[1::-1]):  # by document, then start
    text, first, last = pieces[index]
    assert text
    assert len(text.encode()) <= 64 or '\n' not in text[:-1]
    assert first == (current is None)
    current = (current or '') + text
    if last:
      documents.append(current)
      current = None
  assert current is None
  assert sorted(documents) == sorted(TEXTS.values())
  assert len(pieces) > len(TEXTS)


@pytest.mark.parametrize('seed', range(20))
def test_cuts_hold_as_many_lines_as_fit(seed):
  rng = np.random.default_rng(seed)
  share = 1 / (2 + 4 * seed)  # of line ends: from many short lines to a few longer than a piece
  text = bytes(rng.choice([ord('\n'), ord('a')], 600, p=[share, 1 - share]).tolist())
  expected = []
  for line in text.splitlines(keepends=True):
    if expected and len(expected[-1]) + len(line) <= 70:
      expected[-1] += line
    else:
      expected.append(line)
  cuts = list(sources.cut_at_line_ends(text, 70))
  assert [text[start:end] for start, end, _ in cuts] == (expected or [b''])
  assert [last for *_, last in cuts] == [False] * (len(cuts) - 1) + [True]


def test_jsonl_reads_the_named_field(tmp_path):
  texts = ['first', 'tab\tand\nline', '世界 "quoted"', 'last']
  (tmp_path / 'b.jsonl').write_text(json.dumps({'body': texts[2]}, ensure_ascii=False) + '\n\n' +
                                    json.dumps({'body': ''}) + '\n' + json.dumps({'body': texts[3]}))
  (tmp_path / 'a.jsonl').write_bytes(b'\r\n'.join(json.dumps({'id': 1, 'body': text}).encode() for text in texts[:2]))
  (tmp_path / 'notes.txt').write_text('not a record')
  data = DataConfig(source='jsonl', path=str(tmp_path), text_key='body')
  documents = sources.open_documents(data)
  assert all_texts(documents) == texts
  assert documents.read(2, 0, 3).decode() == '世'
  assert documents.sizes.tolist() == [len(text.encode()) for text in texts]
  assert documents.held_out.sum() == 1
  before = documents.digest
  (tmp_path / 'a.jsonl').write_text('{"body": "first"}\n{"body": "other"}')
  assert sources.open_documents(data).digest != before


def test_arrayrecord_reads_text_and_json(tmp_path):
  records = [b'plain', json.dumps({'text': 'in json é'}).encode(), b'{not json', '世界'.encode()]
  write_array_records(tmp_path / 'x.array_record-00000-of-00002', records[:2])
  write_array_records(tmp_path / 'x.array_record-00001-of-00002', records[2:])
  data = DataConfig(source='arrayrecord', path=str(tmp_path))
  documents = sources.open_documents(data)
  assert all_texts(documents) == ['plain', 'in json é', '{not json', '世界']
  plain = sources.open_documents(DataConfig(source='arrayrecord', path=str(tmp_path), text_key=''))
  assert plain.read(1) == records[1]
  assert plain.digest == documents.digest
  (tmp_path / 'x.array_record-00001-of-00002').rename(tmp_path / 'y.array_record')
  assert sources.open_documents(data).digest != documents.digest
  (tmp_path / 'y.array_record').unlink()
  write_array_records(tmp_path / 'x.array_record-00001-of-00002', [*records[2:], b'more'])
  assert sources.open_documents(data).digest != documents.digest


def test_stdlib_is_the_library_without_tests():
  documents = sources.open_documents(DataConfig(source='stdlib'))
  assert documents.names == sorted(documents.names)
  assert {'json/decoder.py', 'argparse.py'} <= set(documents.names)
  parts = {part for name in documents.names for part in name.split('/')[:-1]}
  assert not parts & {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
  index = documents.names.index('json/decoder.py')
  assert documents.read(index) == Path(json.decoder.__file__).read_bytes()
  assert 5e6 < documents.sizes.sum() < 30e6
  assert 0 < documents.held_out.mean() < 0.15


def test_site_packages_adds_what_is_installed(tmp_path, monkeypatch):
  write_folder(tmp_path / 'lib', {'os.py': 'o', 'test/test_os.py': 't', 'site-packages/pkg/a.py': 'a'})
  write_folder(tmp_path / 'lib/site-packages', {'pkg/tests/test_a.py': 't', 'pkg/data.json': '{}', 'm.py': 'm'})
  (tmp_path / 'lib/latin.py').write_bytes(b'# -*- coding: latin-1 -*-\n\xe9')
  paths = {'stdlib': tmp_path / 'lib', 'purelib': tmp_path / 'lib/site-packages'}
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(paths.get(name, paths['purelib'])))
  names = [sources.open_documents(DataConfig(source=source)).names for source in ('stdlib', 'site-packages')]
  assert names == [['os.py'], ['os.py', 'site-packages/m.py', 'site-packages/pkg/a.py']]
  shutil.rmtree(tmp_path / 'lib')
  with pytest.raises(ConfigError, match=re.escape(f'{tmp_path}/lib holds no *.py files')):
    sources.open_documents(DataConfig())


def _missing(_):
  return 'text', 'nowhere', r"data.path='nowhere' does not exist"


def _empty_folder(folder):
  return 'text', folder, 'holds no files'


def _no_jsonl(folder):
  (folder / 'a.txt').write_text('x')
  return 'jsonl', folder, r'holds no \*\.jsonl files'


def _empty_file(folder):
  (folder / 'a.txt').write_text('')
  return 'text', folder / 'a.txt', 'holds no documents'


def _not_utf8(folder):
  (folder / 'a.txt').write_text('fine')
  (folder / 'b.bin').write_bytes(b'ab\xff')
  return 'text', folder, r'b\.bin is not UTF-8 \(byte 2\)'


def _unreadable(folder):
  (folder / 'gone.txt').symlink_to(folder / 'nowhere')
  return 'text', folder, r'gone\.txt can not be read \(No such file'


def _unreadable_jsonl(folder):
  (folder / 'gone.jsonl').symlink_to(folder / 'nowhere')
  return 'jsonl', folder, r'gone\.jsonl can not be read \(No such file'


def _malformed_line(folder):
  (folder / 'a.jsonl').write_text('{"text": "x"}\n\n{"text": \n')
  return 'jsonl', folder / 'a.jsonl', r'a\.jsonl:3 is not JSON'


def _jsonl_not_utf8(folder):
  (folder / 'a.jsonl').write_bytes(b'{"text": "\xff"}\n')
  return 'jsonl', folder, r'a\.jsonl:1 is not JSON .*utf-8'


def _missing_key(folder):
  (folder / 'a.jsonl').write_text('{"text": "x"}\n{"body": "x"}\n')
  return 'jsonl', folder, r"a\.jsonl:2 has no text in data.text_key='text' \(its fields are 'body'\)"


def _no_object(folder):
  (folder / 'a.jsonl').write_text('["text"]\n')
  return 'jsonl', folder, r'a\.jsonl:1 has no text .*no object'


def _key_no_text(folder):
  (folder / 'a.jsonl').write_text('{"text": 3}\n')
  return 'jsonl', folder, r'a\.jsonl:1 has no text'


def _half_surrogate(folder):
  (folder / 'a.jsonl').write_text('{"text": "\\ud800"}\n')
  return 'jsonl', folder, r'a\.jsonl:1 holds half a surrogate'


def _no_array_record(folder):
  (folder / 'x.arrayrecord').write_bytes(b'not one')
  return 'arrayrecord', folder, r'x\.arrayrecord is not readable as ArrayRecord'


def _no_records(folder):
  write_array_records(folder / 'x.arrayrecord', [])
  return 'arrayrecord', folder, 'holds no documents'


BAD_SOURCES = [_missing, _empty_folder, _no_jsonl, _empty_file, _not_utf8, _unreadable, _unreadable_jsonl,
               _malformed_line, _jsonl_not_utf8, _missing_key, _no_object, _key_no_text, _half_surrogate,
               _no_array_record, _no_records]


@pytest.mark.parametrize('make', BAD_SOURCES)
def test_bad_sources_are_one_clear_line(tmp_path, make):
  source, path, message = make(tmp_path)
  with pytest.raises(ConfigError, match=message) as caught:
    sources.open_documents(DataConfig(source=source, path=str(path)))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('record', 'message'), [
    (b'\xff', 'record 0 .* is not UTF-8'),
    (b'{"body": "x"}', r"record 0 .* has no text in data.text_key='text' \(its fields are 'body'\)"),
])
def test_bad_records_are_named_when_read(tmp_path, record, message):
  path = write_array_records(tmp_path / 'x.arrayrecord', [record])
  documents = sources.open_documents(DataConfig(source='arrayrecord', path=path))
  with pytest.raises(ConfigError, match=message):
    documents.read(0)


def test_path_without_a_source_that_reads_it_is_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"is not read by data.source='stdlib'; use data.source=text"):
    sources.open_documents(DataConfig(path=str(tmp_path)))


def test_nothing_held_out_is_refused(tmp_path):
  write_folder(tmp_path, TEXTS)
  with pytest.raises(ConfigError, match=r'data.held_out_fraction=0 holds out none of the 4 documents'):
    sources.Pieces(text_config(tmp_path, held_out_fraction=0), held_out=True)


def test_file_that_shrinks_is_named(tmp_path):
  write_folder(tmp_path, TEXTS)
  documents = sources.open_documents(text_config(tmp_path))
  (tmp_path / 'a.txt').write_text('on')
  with pytest.raises(ConfigError, match=r'a\.txt became shorter'):
    documents.read(0)

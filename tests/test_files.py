"""Small files of a run: whole or not at all, whatever fails between."""

import os
import pathlib

import pytest

from mla_jax.files import read_records, replace_text


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
  file = tmp_path / 'config.json'
  replace_text(file, 'before é')
  there = file.stat()
  replace_text(file, 'before é')
  assert file.stat() == there  # not touched

  def full(*_):
    raise OSError(28, 'No space left on device')

  for target, name in ((pathlib.Path, 'rename'), (os, 'fsync')):
    with monkeypatch.context() as patch:
      patch.setattr(target, name, full)
      with pytest.raises(OSError, match='No space left'):
        replace_text(file, 'after')
  assert file.read_text(encoding='utf-8') == 'before é'
  assert list(tmp_path.iterdir()) == [file]
  replace_text(file, 'after')
  assert file.read_text() == 'after'


def test_lines_that_are_no_records(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_bytes(b'{"step": 1}\n5\n\xff\xfe\n{"step": null}\n' + 100_000 * b'[' + b'\n{"step": 2}\n{"st')
  assert [(number, record) for number, _, record in read_records(file)] == [
      (1, {'step': 1}), *[(n, None) for n in range(2, 6)], (6, {'step': 2}), (7, None)]

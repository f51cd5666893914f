"""A run's small files: texts that appear whole or not at all, and lines of JSON of which a crash may have torn one."""

import json
import os
import pathlib
from collections.abc import Iterator


def replace_text(file: pathlib.Path, text: str):
  """Writes aside, then renames: a failure (OSError) leaves what was there. A file that holds `text` is not touched."""
  data = text.encode()
  if file.is_file() and file.read_bytes() == data:
    return
  partial = file.with_name(f'{file.name}.partial')
  try:
    with partial.open('wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    partial.rename(file)
  finally:
    partial.unlink(missing_ok=True)


def read_records(file: pathlib.Path) -> Iterator[tuple[int, str, dict | None]]:
  """(number, line, record) of every line of a metrics.jsonl; record is None where a line is no object with a step."""
  for number, line in enumerate(file.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      record = None
    placed = isinstance(record, dict) and isinstance(record.get('step'), int | float)
    yield number, line, record if placed else None

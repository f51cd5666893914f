"""Fault injection: train.py is killed without warning, again and again, and ends where an undisturbed run ends."""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.long


def start(workdir, text):
  return subprocess.Popen(
      [sys.executable, 'train.py', '--config=tests/training/small_run.py', f'--workdir={workdir}',
       f'--config.data.path={text}', '--config.data.source=text'], cwd=ROOT, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True)


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [(line['step'], line['loss'], line['grad_norm']) for line in lines]


def test_killed_runs_end_like_undisturbed_ones(tmp_path):
  text = tmp_path / 'text'
  text.mkdir()
  for i in range(20):
    (text / f'{i}.txt').write_text(f'document {i}: ' + 'latent attention caches one vector a token. ' * 6)
  whole = start(tmp_path / 'whole', text)
  _, errors = whole.communicate(timeout=600)
  assert whole.returncode == 0, errors[-2000:]

  rng, kills, workdir = random.Random(0), 0, tmp_path / 'killed'
  for _ in range(30):
    run = start(workdir, text)
    # From its first new line on, at any moment: in a step, while a checkpoint is written, while it is digested.
    before = (workdir / 'metrics.jsonl').stat().st_size if (workdir / 'metrics.jsonl').exists() else 0
    while run.poll() is None:
      metrics = workdir / 'metrics.jsonl'
      if kills < 5 and metrics.exists() and metrics.stat().st_size != before:
        time.sleep(rng.uniform(0, 0.6))
        run.kill()
        kills += 1
        break
      time.sleep(0.02)
    _, errors = run.communicate(timeout=600)
    if run.returncode == 0:
      break
    assert run.returncode == -9, errors[-2000:]
  assert kills == 5
  assert losses(workdir) == losses(tmp_path / 'whole')

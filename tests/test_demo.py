"""What `make demo` promises, read from the run it leaves. `.ci/run` makes the demo first."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUN = ROOT / 'runs' / 'demo'
pytestmark = [pytest.mark.long,
              pytest.mark.skipif(not (RUN / 'finished').exists(), reason='no runs/demo; `make demo` makes it')]


def test_demo_learned():
  last = json.loads((RUN / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['held_out_loss'] <= 1.65  # nats a byte; a trigram table reaches 1.89
  assert last['skipped_steps'] == 0
  assert (RUN / 'report.html').stat().st_size > 10_000


def decode(*flags):
  # Within the 256 tokens it was trained on: it knows no positions beyond.
  prompt = 'class Reader:\n\n    def read(self, path):\n        '
  run = subprocess.run([sys.executable, 'infer.py', f'--workdir={RUN}', f'--prompt={prompt}', '--max_new_tokens=180',
                        *flags], cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  text, _, stats = run.stdout.rstrip('\n').rpartition('\n')
  return text, json.loads(stats)


def test_demo_decodes_speculatively_and_losslessly():
  text, stats = decode()
  assert stats['acceptance_rate'][0] >= 0.65
  assert stats['tokens_per_step'] > 1.5
  plain, _ = decode('--speculative=off')
  assert text == plain

"""The step under a mesh: every split of eight devices gives one device's losses, gradients and bias updates."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest

EVERY = ['x'.join(map(str, sizes)) for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8]


def on_eight_devices(accumulation, batch_size, meshes):
  return subprocess.run(
      [sys.executable, '-m', 'tests.training.eight_devices', str(accumulation), str(batch_size), *meshes],
      env=os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=8'},
      capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.long
def test_fewer_rows_than_devices_are_refused():
  run = on_eight_devices(1, 2, ['2x2x2'])
  assert run.returncode != 0
  assert 'B=2 is not divisible by 8 devices of the mesh' in run.stderr


@pytest.mark.parametrize(('accumulation', 'batch_size', 'meshes'), [
    (1, 8, ['8x1x1', '2x2x2']),
    pytest.param(1, 8, EVERY, marks=pytest.mark.long),
    pytest.param(2, 16, EVERY, marks=pytest.mark.long)])
def test_splits_of_eight_devices_equal_one_device(accumulation, batch_size, meshes):
  run = on_eight_devices(accumulation, batch_size, meshes)
  assert run.returncode == 0, run.stderr[-3000:]
  lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{')]
  assert [line['mesh'] for line in lines] == [[int(n) for n in mesh.split('x')] for mesh in meshes]
  for line in lines:
    assert line['loss'] < 2e-5, line
    assert line['gradient'] < 2e-4, line
    assert line['load'], line
    assert line['bias'], line
    assert line['bias_moved'], line
    data, fsdp, expert = line['mesh']
    # Rows that lie apart stay apart: routing them needs nobody else's.
    assert (line['gathers'] == 0) == (data == 8), line
    # Weights must really be split: E over expert, D over fsdp.
    assert ("'expert'" in line['experts']) == (expert > 1), line
    assert ("'fsdp'" in line['experts']) == (fsdp > 1), line

"""The step under a mesh: every split of eight devices gives one device's losses, gradients and bias updates."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(('accumulation', 'batch_size'), [
    (1, 8), pytest.param(2, 16, marks=pytest.mark.long)])
def test_every_split_of_eight_devices_is_one_device(accumulation, batch_size):
  run = subprocess.run(
      [sys.executable, '-m', 'tests.training.eight_devices', str(accumulation), str(batch_size)],
      env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'},
      capture_output=True, text=True, timeout=900, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{')]
  assert len(lines) == 10
  for line in lines:
    assert line['loss'] < 2e-5, line
    assert line['gradient'] < 2e-4, line
    assert line['load'], line
    assert line['bias'], line
    assert line['bias_moved'], line
    _, fsdp, expert = line['mesh']
    # Weights must really be split: E over expert, D over fsdp.
    assert ("'expert'" in line['experts']) == (expert > 1), line
    assert ("'fsdp'" in line['experts']) == (fsdp > 1), line

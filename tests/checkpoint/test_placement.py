"""Reading parts of files into arrays that lie on devices: which bytes, and how much memory."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mla_jax.checkpoint import hugging_face, tensor_files
from tests.checkpoint.small import GOLDEN, assert_same_bits


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_box_of_a_tensor(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('box')
  shape = (*data.draw(st.lists(st.integers(1, 9), max_size=3)), data.draw(st.sampled_from([1, 3, 5000])))
  tensor = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
  save_file({'before': np.ones(3, np.float32), 'x': tensor}, folder / 'model.safetensors')
  box = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
  with tensor_files.Reader(tensor_files.scan(folder)) as reader:
    np.testing.assert_array_equal(reader.read('x', box), tensor[box])
    np.testing.assert_array_equal(reader.read('x'), tensor)


def test_pieces_written_on_a_device():
  """The accelerators' way, which host memory does without: pieces transferred and written in place."""
  expected = hugging_face.load(GOLDEN / 'v3_plain')
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for on_host in (True, False):
    found = hugging_face.load(GOLDEN / 'v3_plain', place=place, on_host=on_host)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found[1:]))
    assert_same_bits(found[1:], expected[1:])


@pytest.mark.long
@pytest.mark.parametrize('fp8', [[], ['--fp8']])
def test_loading_holds_few_tensors_beside_the_model(fp8):
  """450 MB in tensors of at most 8.4 MB (tests/checkpoint/measure_memory.py --megabytes=4000 is the 4.5 GB case)."""
  script = Path(__file__).with_name('measure_memory.py')
  out = subprocess.run([sys.executable, script, '--megabytes=400', *fp8], stdout=subprocess.PIPE, text=True, check=True,
                       env=os.environ | dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(Path(__file__).parents[2]))).stdout
  seen = json.loads(out.splitlines()[-1])
  assert seen['model'] > 400
  assert seen['over'] < 60


def on_devices(processes: int, fsdp: int, expert: int) -> list[dict]:
  """What load_on_devices.py prints in each of some processes of two devices."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  script = Path(__file__).with_name('load_on_devices.py')
  environment = os.environ | dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(Path(__file__).parents[2]))
  running = [subprocess.Popen([sys.executable, script, *map(str, (i, processes, port, fsdp, expert))], env=environment,
                              stdout=subprocess.PIPE, text=True) for i in range(processes)]
  out = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [0] * processes
  return [json.loads(text.splitlines()[-1]) for text in out]


@pytest.mark.parametrize(('processes', 'fsdp', 'expert'), [
    (1, 2, 1), (2, 1, 4), pytest.param(2, 2, 2, marks=pytest.mark.long)])
def test_each_process_reads_what_its_devices_hold(processes, fsdp, expert):
  """Of experts, or of tensors whose rows are D, its share; of others all, for each is on all devices of a process, or
  cut along rows that a disk reads whole; of what is repeated its share of the comparison."""
  for one in on_devices(processes, fsdp, expert):
    assert one['right']
    assert one['split'] > 5
    assert one['read'] == one['expected']
    assert processes == 1 or one['read'] < 0.85 * one['all']

"""The Hopper kernels: their schedules, and themselves in Pallas' simulation of a GPU, which checks accesses for races.
They are compiled in test_hopper_compile.py, and on a Hopper GPU test_grouped_matmul.py runs them."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, mosaic_gpu
from pallas_kernels.grouped_matmul import gpu_schedule

simulator = pytest.mark.skipif(mosaic_gpu.unavailable() is not None, reason=str(mosaic_gpu.unavailable()))
sizes_and_rest = st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 150))


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True)  # each compiles anew
@given(drawn=sizes_and_rest, tile=st.sampled_from((128, 256)), tail=st.booleans(), multiple=st.sampled_from((1, 2)))
def test_visits_cover_every_row_once(drawn, tile, tail, multiple):
  sizes, rest = drawn
  rows = sum(sizes) + rest
  table = np.asarray(gpu_schedule.visits(jnp.array(sizes), rows, tile, tail, multiple))
  count = table[0, 0]
  assert len(table[1:]) % multiple == 0
  assert count <= len(table) - 1
  group_of_row = np.full(rows, -2)
  for group, row8, first, last, real in table[1:1 + count]:
    assert 0 <= first < last <= tile
    mine = slice(8 * row8 + first, 8 * row8 + last)
    assert (group_of_row[mine] == -2).all()
    group_of_row[mine] = group if real else -1
  expected = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(rest, -1 if tail else -2)])
  np.testing.assert_array_equal(group_of_row, expected)
  assert not table[1 + count:].any(), 'what fills the table has no rows'
  short = table[1:1 + count, 3] <= tile // 2
  assert (np.diff(short.astype(int)) >= 0).all(), 'those of half a tile come last'


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_groups_come_largest_first_and_whole(sizes):
  table = np.asarray(gpu_schedule.largest_first(jnp.array(sizes), 64))
  assert sorted(table[:, 0]) == list(range(len(sizes)))
  assert [sizes[g] for g in table[:, 0]] == sorted(sizes, reverse=True)
  starts = np.cumsum([0, *sizes])
  for group, row8, chunks, first, last in table:
    assert (8 * row8 + first, 8 * row8 + last) == (starts[group], starts[group + 1])
    assert 0 <= first < 8
    assert chunks == (-(-last // 64) if sizes[group] else 0)


@simulator
@pytest.mark.long
def test_simulated_kernels_match_the_reference_without_races():
  # A simulated warpgroup that waits holds a thread of XLA's pool, which has as many as there are processors.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'NPROC': '32', 'PJRT_NPROC': '32'}
  run = subprocess.run([sys.executable, '-m', 'tests.kernels.on_simulated_gpu'], capture_output=True, text=True,
                       env=environment, cwd=pathlib.Path(__file__).parents[2], timeout=900)
  assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
  assert 'RACE DETECTED' not in run.stdout


@simulator
@pytest.mark.parametrize(('dtype', 'k', 'n', 'message'), [
  ('float32', 64, 64, 'takes bfloat16, float16 or float8_e4m3fn and these are float32'),
  ('bfloat16', 72, 64, 'needs K a multiple of 64 and N of 64 for bfloat16 and they are 72 and 64'),
  ('bfloat16', 64, 72, 'they are 64 and 72'),
])
def test_other_operands_go_elsewhere(dtype, k, n, message, caplog):
  caplog.set_level(logging.INFO, 'pallas_kernels')
  operands = jnp.ones((8, k), dtype), jnp.ones((2, k, n), dtype), jnp.array([3, 4])
  with mosaic_gpu.interpreter():
    with pytest.raises(NotImplementedError, match=message):
      grouped_matmul(*operands, implementation='gpu')
    jax.eval_shape(lambda: grouped_matmul(*operands))
  assert 'grouped_matmul: xla on cpu' in caplog.text

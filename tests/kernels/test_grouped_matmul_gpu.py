"""The Hopper kernels: their schedules, and themselves in Pallas' simulation of a GPU, which checks accesses for races.
They are compiled in test_hopper_compile.py, and on a Hopper GPU test_grouped_matmul.py runs them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, mosaic_gpu, testing
from pallas_kernels.grouped_matmul import gpu_schedule

simulator = pytest.mark.skipif(mosaic_gpu.unavailable() is not None, reason=str(mosaic_gpu.unavailable()))
CASES = [case for case in testing.CASES['grouped_matmul'] if 'tiles of a GPU' in case.name]
sizes_and_rest = st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 150))


@settings(max_examples=60, deadline=None, derandomize=True)
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
@pytest.mark.parametrize('case', CASES, ids=str)
def test_matches_reference(case):
  with mosaic_gpu.interpreter(detect_races=False):
    testing.check(grouped_matmul, 'gpu', case)


@simulator
@pytest.mark.parametrize('case', [
  # The simulator takes the two views of a buffer for one place, whichever warpgroup's part is meant, so here no piece is
  # written in part: the groups of the first case are of whole pieces.
  testing.grouped_matmul_case('clusters of two', (128, 0, 192), m=384, k=128, n=256, dtype='bfloat16'),
  testing.grouped_matmul_case('no clusters', (256, 64), m=384, k=64, n=384, dtype='bfloat16'),
  testing.grouped_matmul_fp8_case('FP8', (128, 0, 192), m=384, k=256, n=128),
], ids=str)
def test_no_races(case, capsys):
  with mosaic_gpu.interpreter():
    testing.check(grouped_matmul, 'gpu', case)
  assert 'RACE DETECTED' not in capsys.readouterr().out


@simulator
def test_gradient_to_weights_has_no_races_at_ragged_edges(capsys):
  case = testing.grouped_matmul_case('ragged', (70, 0, 131, 9), m=216, k=128, n=256, dtype='bfloat16')
  arrays = case.arrays(np.random.default_rng(0))
  dy_MN = jnp.ones((216, 256), jnp.bfloat16)
  lhs_MK = jnp.asarray(arrays['lhs_MK']).at[210:].set(jnp.nan)  # of no group

  def gradient(implementation):
    multiply = lambda rhs_GKN: grouped_matmul(lhs_MK, rhs_GKN, jnp.asarray(arrays['group_sizes_G']), zero_tail=False,
                                              implementation=implementation)
    return jax.jit(lambda rhs_GKN: jax.vjp(multiply, rhs_GKN)[1](dy_MN)[0])(jnp.asarray(arrays['rhs_GKN']))

  expected = gradient('xla')
  with mosaic_gpu.interpreter():
    actual = gradient('gpu')
  testing.assert_close('gradient to rhs', actual, expected, 2e-2)
  assert 'RACE DETECTED' not in capsys.readouterr().out


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

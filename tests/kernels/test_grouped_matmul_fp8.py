"""Grouped matmul of operands quantised on the way: the same quantised numbers in every implementation, and how far they
are from the operands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, grouped_matmul_fp8, testing
from tests.kernels.unsuitable import skipped_if_unsuitable

FASTER = [name for name in grouped_matmul_fp8.implementations() if name != 'reference']
SIZES = (5, 0, 130, 1, 200)
TENSOR_CORES = 1e-3  # of the largest number: they keep fewer bits than float32 while they add 128 products


def allowed(implementation, case):
  return dataclasses.replace(case, tolerance=max(case.tolerance, TENSOR_CORES)) if implementation == 'gpu' else case


def operands(rng, m=350, k=256, n=128):
  shapes = (m, k), (len(SIZES), k, n), (m, n)
  return [rng.standard_normal(shape, np.float32) for shape in shapes]


def all_three(op, lhs, rhs, dy, sizes=SIZES):
  """The product and its gradients to lhs and rhs."""
  @jax.jit
  def run(lhs, rhs, dy):
    y, transpose = jax.vjp(lambda *x: op(*x, jnp.array(sizes)), lhs, rhs)
    return y, *transpose(dy)

  return [np.asarray(x, np.float64) for x in run(lhs, rhs, dy)]


@pytest.mark.parametrize('implementation', FASTER)
@pytest.mark.parametrize('case', testing.CASES['grouped_matmul_fp8'], ids=str)
def test_matches_reference(implementation, case):
  with skipped_if_unsuitable(implementation, case):
    testing.check(grouped_matmul_fp8, implementation, allowed(implementation, case))


@pytest.mark.parametrize('implementation', FASTER)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 300), min_size=4, max_size=4), bfloat16=st.booleans())
def test_any_group_sizes(implementation, cuts, bfloat16):
  sizes = tuple(np.diff([0, *sorted(cuts)]).tolist())
  case = testing.grouped_matmul_fp8_gradients_case(str(sizes), sizes, m=300,
                                                   dtype='bfloat16' if bfloat16 else 'float32')
  testing.check(grouped_matmul_fp8, implementation, allowed(implementation, case))


@pytest.mark.parametrize('powers_of_two', [False, True])
@pytest.mark.parametrize('implementation', grouped_matmul_fp8.implementations())
def test_near_the_float32_product(implementation, powers_of_two):
  # Each operand's rounding errors are 2.6% of it, or less, and independent.
  arrays = operands(np.random.default_rng(0))
  op = functools.partial(grouped_matmul_fp8, implementation=implementation, powers_of_two=powers_of_two)
  exact = all_three(functools.partial(grouped_matmul, implementation='reference'), *arrays)
  for actual, expected in zip(all_three(op, *arrays), exact, strict=True):
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 0.02 < error < 0.045


@pytest.mark.parametrize('implementation', grouped_matmul_fp8.implementations())
def test_what_e4m3_holds_is_multiplied_exactly(implementation):
  # Four significant bits, scales of powers of two, sums below 2^24.
  arrays = [np.round(x * 3).clip(-15, 15) for x in operands(np.random.default_rng(1))]
  op = functools.partial(grouped_matmul_fp8, implementation=implementation, powers_of_two=True)
  exact = all_three(functools.partial(grouped_matmul, implementation='reference'), *arrays)
  tolerance = TENSOR_CORES if implementation == 'gpu' else 0
  for actual, expected in zip(all_three(op, *arrays), exact, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize('implementation', grouped_matmul_fp8.implementations())
def test_other_groups_and_the_tail_do_not_leak(implementation):
  # Rows 336.. belong to nobody and group 1 has no rows: NaN in either reaches neither output nor gradients.
  lhs, rhs, dy = operands(np.random.default_rng(2))
  op = functools.partial(grouped_matmul_fp8, implementation=implementation)
  expected = all_three(op, lhs, rhs, dy)
  lhs[336:], rhs[1], dy[336:] = np.nan, np.nan, np.nan
  for x, y in zip(all_three(op, lhs, rhs, dy), expected, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('implementation', grouped_matmul_fp8.implementations())
def test_damage_stays_in_its_group(implementation):
  # Row 10 is group 2's.
  lhs, rhs, dy = operands(np.random.default_rng(3))
  op = functools.partial(grouped_matmul_fp8, implementation=implementation)
  expected = all_three(op, lhs, rhs, dy)
  lhs[10, 3] = np.inf
  y, dlhs, drhs = all_three(op, lhs, rhs, dy)
  assert np.isnan(y[10]).all(), 'seen in its row'
  assert np.isnan(drhs[2, 3]).all(), 'and in the gradient of the weights it met'
  np.testing.assert_array_equal(np.delete(y, 10, 0), np.delete(expected[0], 10, 0))
  np.testing.assert_array_equal(dlhs, expected[1])
  np.testing.assert_array_equal(np.delete(drhs, 2, 0), np.delete(expected[2], 2, 0))


@pytest.mark.parametrize('implementation', FASTER)
def test_an_order_gathers_rows_and_gathers_their_gradients(implementation):
  rng, chosen = np.random.default_rng(4), 7
  _, rhs, dy = operands(rng)
  x = rng.standard_normal((350 // chosen, 256), np.float32)
  order_M = jnp.asarray(rng.permutation(350).astype(np.int32))

  def ordered(x, rhs, sizes):
    return grouped_matmul_fp8(x, rhs, sizes, order_M, implementation=implementation)

  def gathered(x, rhs, sizes):
    return grouped_matmul_fp8(x[order_M // chosen], rhs, sizes, implementation=implementation)

  for actual, expected in zip(all_three(ordered, x, rhs, dy), all_three(gathered, x, rhs, dy), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(('change', 'message'), [
  ({'rhs_GKN': np.ones((3, 5, 3), np.float32)}, r'lhs \(6, 4\) and rhs \(3, 5, 3\) must be'),
  ({'group_sizes_G': np.ones(2, np.int32)}, r'group_sizes is int32\[2\] and must be integers \[3\]'),
  ({'lhs_BK': np.ones((6, 4), ml_dtypes.float8_e4m3fn)}, 'lhs is float8_e4m3fn and must be bfloat16, float16'),
  ({'rhs_GKN': np.ones((3, 4, 3), np.int8)}, 'rhs is int8 and must be'),
  ({'order_M': np.ones(8, np.int32)}, r"order is int32\[8\] and must be int32 \[M\], M a multiple of lhs's 6 rows"),
  ({'order_M': np.ones(6, np.float32)}, r'order is float32\[6\]'),
  ({'order_M': np.ones(0, np.int32)}, r'order is int32\[0\]'),
])
def test_bad_operands(change, message):
  arrays = {'lhs_BK': np.ones((6, 4), np.float32), 'rhs_GKN': np.ones((3, 4, 3), np.float32),
            'group_sizes_G': np.ones(3, np.int32)}
  with pytest.raises(ValueError, match=message):
    grouped_matmul_fp8(**{**arrays, **change})

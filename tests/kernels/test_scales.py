"""Quantising to FP8 tiles and blocks, against NumPy and against the quantiser for checkpoints."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.checkpoint import block_fp8
from pallas_kernels import grouped_matmul_fp8, quantise_blocks, quantise_rows, quantise_tiles
from pallas_kernels.grouped_matmul import scales as scales_module

FP8 = ml_dtypes.float8_e4m3fn
EPSILON = 2.0 ** -23


def oracle(x, blocks, powers_of_two):
  """(values, scales) block by block in float64."""
  q = np.zeros(x.shape, FP8)
  scales = np.ones([-(-size // block) for size, block in zip(x.shape, blocks, strict=True)], np.float64)
  for place in np.ndindex(scales.shape):
    where = tuple(slice(i * block, (i + 1) * block) for i, block in zip(place, blocks, strict=True))
    largest = np.abs(x[where]).astype(np.float64).max()
    if largest:
      scale = max(largest / 448, 2.0 ** -126)
      scales[place] = 2.0 ** np.ceil(np.log2(scale)) if powers_of_two else np.float32(scale)
    q[where] = (x[where].astype(np.float64) / scales[place]).astype(FP8)
  return q, scales.astype(np.float32)


def assert_nearest(q, q_oracle, x_over_scale):
  """Equal, but beside the middle of two e4m3 numbers, where the rounding of the scale decides."""
  error, error_oracle = (np.abs(each.astype(np.float64) - x_over_scale) for each in (q, q_oracle))
  np.testing.assert_array_less(np.abs(error - error_oracle), 1e-6 * np.abs(x_over_scale) + 1e-12)


def spread(rng, shape, dtype):
  """Numbers of many magnitudes, with zeros."""
  x = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))
  return np.where(rng.random(shape) < 0.1, 0, x).astype(dtype)


@pytest.mark.parametrize('dtype', ['float32', ml_dtypes.bfloat16])
@pytest.mark.parametrize('powers_of_two', [False, True])
@pytest.mark.parametrize(('quantise', 'shape', 'blocks'), [
  (quantise_tiles, (5, 384), (1, 128)), (quantise_tiles, (7, 200), (1, 128)), (quantise_tiles, (1, 3), (1, 128)),
  (quantise_blocks, (2, 256, 128), (1, 128, 128)), (quantise_blocks, (3, 130, 200), (1, 128, 128))])
def test_quantise(quantise, shape, blocks, powers_of_two, dtype):
  x = spread(np.random.default_rng(0), shape, dtype)
  if len(shape) == 3:
    x[0, :128, :128] = 0
  else:
    x[0, :128] = 0
  q, scales = map(np.asarray, jax.jit(quantise, static_argnums=1)(x, powers_of_two))
  q_oracle, scales_oracle = oracle(x, blocks, powers_of_two)
  assert (q.dtype, scales.dtype) == (FP8, np.float32)
  np.testing.assert_allclose(scales, scales_oracle, rtol=0 if powers_of_two else EPSILON)
  if powers_of_two:
    np.testing.assert_array_equal(q, q_oracle)

  wide = np.asarray(scales_module.dequantise(jnp.asarray(q), jnp.ones_like(scales), blocks))
  each = np.asarray(scales_module.dequantise(jnp.ones(shape), jnp.asarray(scales), blocks))
  x = x.astype(np.float32)
  assert_nearest(q, q_oracle, x.astype(np.float64) / each)
  assert (np.abs(x) <= 448 * each * (1 + EPSILON)).all()
  if powers_of_two:
    assert (np.frexp(scales)[0] == 0.5).all()
  bound = np.maximum(np.abs(x) * 2.0 ** -4, each * 2.0 ** -10)
  assert (np.abs(wide * each - x) <= bound + 4 * EPSILON * np.abs(x)).all()
  assert scales.flat[0] == 1  # a tile of zeros


@pytest.mark.parametrize('scale_format', ['float32', 'ue8m0'])
def test_agrees_with_the_quantiser_for_checkpoints(scale_format):
  w = spread(np.random.default_rng(1), (300, 200), 'float32')
  w[128:256, :128] = 0
  q_file, scales_file = block_fp8.quantize(w, scale_format)
  q, scales = quantise_blocks(w[None], powers_of_two=scale_format == 'ue8m0')
  np.testing.assert_allclose(scales[0], scales_file, rtol=0 if scale_format == 'ue8m0' else EPSILON)
  each = np.repeat(np.repeat(scales_file, 128, 0), 128, 1)[:300, :200]
  assert_nearest(np.asarray(q)[0], q_file, w.astype(np.float64) / each)


@pytest.mark.parametrize('powers_of_two', [False, True])
def test_extremes(powers_of_two):
  largest = np.float32(2.0 ** 127)
  smallest = np.finfo(np.float32).tiny
  x = np.ones((7, 256), np.float32)
  x[0, 3], x[1, 3], x[2, 3] = np.nan, np.inf, -np.inf
  x[3], x[4], x[5] = largest, smallest, 448
  q, scales = quantise_tiles(x, powers_of_two)
  values = np.asarray(scales_module.dequantise(q, scales, (1, 128)))
  assert np.isnan(scales[:3, 0]).all()
  assert np.isnan(values[:3, :128]).all()
  assert np.isfinite(values[:3, 128:]).all()  # one tile only
  np.testing.assert_allclose(values[3:4], largest, rtol=0.07)
  assert np.isfinite(scales[3:]).all()
  assert (np.asarray(scales[4]) == smallest).all()
  assert (values[4] == smallest).all()
  assert (np.asarray(scales[5]) == 1).all()


def test_gathered_rows_are_those_quantised_after_gathering():
  x_BK = spread(np.random.default_rng(2), (5, 200), 'float32')
  rows_M = np.array([4, 0, 0, 3, 1, 4, 4], np.int32)
  for actual, expected in zip(quantise_rows(x_BK, rows_M), quantise_tiles(x_BK[rows_M]), strict=True):
    np.testing.assert_array_equal(actual, expected)


def test_the_reference_multiplies_rounded_numbers():
  # On a GPU XLA takes float32 -> FP8 -> float32 for nothing unless a barrier stands between.
  lowered = jax.jit(lambda *x: grouped_matmul_fp8(*x, implementation='reference')).lower(
    jnp.ones((4, 128)), jnp.ones((2, 128, 128)), jnp.array([1, 3])).as_text()
  assert 'optimization_barrier' in lowered


@pytest.mark.parametrize(('quantise', 'shape'), [(quantise_tiles, (3,)), (quantise_blocks, (128, 128))])
def test_shapes_that_cannot_be_quantised(quantise, shape):
  with pytest.raises(ValueError, match=r'to quantise in blocks of .* x must have \d axes, and it is'):
    quantise(jnp.ones(shape))


@settings(max_examples=5, deadline=None, derandomize=True)  # each compiles anew
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6), rest=st.integers(0, 140), gathered=st.booleans())
def test_tokens_of_groups_share_no_tile(sizes, rest, gathered):
  rng, m = np.random.default_rng(3), max(sum(sizes) + rest, 1)
  x_MK = spread(rng, (m, 3), 'float32')
  x_MK[sum(sizes):] = np.nan
  rows_M = rng.permutation(m).astype(np.int32)
  x, rows = (x_MK[np.argsort(rows_M)], rows_M) if gathered else (x_MK, None)
  q_PK, scales_TK = map(np.asarray, scales_module.quantise_tokens(x, jnp.array(sizes), False, rows))
  assert (len(q_PK), len(q_PK) // 128) == (128 * len(scales_TK), len(scales_TK))
  start, place = 0, 0
  for size in sizes:
    padded = -(-size // 128) * 128
    group = np.zeros((padded, 3), np.float32)
    group[:size] = x_MK[start:start + size]
    q, scales = (np.asarray(each) for each in quantise_tiles(group.T))
    np.testing.assert_array_equal(q_PK[place:place + padded], q.T)
    np.testing.assert_array_equal(scales_TK[place // 128:(place + padded) // 128], scales.T)
    start, place = start + size, place + padded
  assert not q_PK[place:].astype(np.float32).any()
  assert (scales_TK[place // 128:] == 1).all()

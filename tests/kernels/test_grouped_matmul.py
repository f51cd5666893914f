import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, grouped_matmul, testing
from tests.kernels.unsuitable import skipped_if_unsuitable

FASTER = [name for name in grouped_matmul.implementations() if name != 'reference']


def oracle(lhs_MK, rhs_GKN, sizes):
  group = np.repeat(np.arange(len(sizes)), sizes)
  y_MN = np.zeros((lhs_MK.shape[0], rhs_GKN.shape[2]))
  for m, g in enumerate(group):
    y_MN[m] = lhs_MK[m].astype(np.float64) @ rhs_GKN[g].astype(np.float64)
  return y_MN


# What the kernels of a chip take; elsewhere small float32 says more.
SERVED = {'gpu': dict(k=64, n=192, dtype='bfloat16'), 'tpu': dict(k=128, n=128, dtype='bfloat16')}


def operands(m=6, k=4, n=3, groups=3, dtype=np.float32):
  rng = np.random.default_rng(1)
  return rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(groups, k, n)).astype(dtype)


@pytest.mark.parametrize('sizes', [(2, 0, 3), (0, 6, 0), (0, 0, 0)])
def test_reference_is_row_by_row(sizes):
  lhs_MK, rhs_GKN = operands()
  y_MN = grouped_matmul(lhs_MK, rhs_GKN, jnp.array(sizes), implementation='reference')
  np.testing.assert_allclose(y_MN, oracle(lhs_MK, rhs_GKN, sizes), atol=1e-5)


def test_reference_scales_fp8_blocks():
  rng = np.random.default_rng(2)
  m, k, n = 3, 130, 129
  lhs_MK, rhs_GKN = (rng.normal(size=s).astype(ml_dtypes.float8_e4m3fn) for s in ((m, k), (2, k, n)))
  lhs_scales, rhs_scales = (rng.uniform(0.5, 2, s).astype(np.float32) for s in ((m, 2), (2, 2, 2)))
  y_MN = grouped_matmul(lhs_MK, rhs_GKN, jnp.array([1, 2]), lhs_scales, rhs_scales, out_dtype='float32',
                        implementation='reference')
  for row, column, g in ((0, 0, 0), (0, 128, 0), (1, 127, 1), (2, 128, 1)):
    expected = sum(float(lhs_MK[row, i]) * lhs_scales[row, i // 128]
                   * float(rhs_GKN[g, i, column]) * rhs_scales[g, i // 128, column // 128] for i in range(k))
    np.testing.assert_allclose(y_MN[row, column], expected, rtol=1e-4, atol=1e-3)
  assert grouped_matmul(lhs_MK, rhs_GKN, jnp.array([1, 2]), lhs_scales, rhs_scales).dtype == jnp.bfloat16


@pytest.mark.parametrize('implementation', FASTER)
@pytest.mark.parametrize('case', testing.CASES['grouped_matmul'], ids=str)
def test_matches_reference(implementation, case):
  with skipped_if_unsuitable(implementation, case):
    testing.check(grouped_matmul, implementation, case)


@pytest.mark.parametrize('implementation', FASTER)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 48), min_size=5, max_size=5))
def test_any_group_sizes(implementation, cuts):
  sizes = tuple(np.diff([0, *sorted(cuts)]).tolist())
  testing.check(grouped_matmul, implementation,
                testing.grouped_matmul_case(str(sizes), sizes, **SERVED.get(implementation, {})))


@pytest.mark.parametrize('implementation', FASTER)
def test_other_groups_and_the_tail_do_not_leak(implementation):
  # Rows 3.. belong to nobody and group 1 has no rows: NaN in either reaches neither output nor gradients.
  served = SERVED.get(implementation, {})
  lhs_MK, rhs_GKN = operands(**{**served, 'dtype': served.get('dtype', 'float32')})
  dy_MN = np.ones((6, rhs_GKN.shape[2]), rhs_GKN.dtype)
  sizes = jnp.array([2, 0, 1])

  @jax.jit
  def run(lhs_MK, rhs_GKN, dy_MN):
    y_MN, transpose = jax.vjp(lambda *x: grouped_matmul(*x, sizes, implementation=implementation), lhs_MK, rhs_GKN)
    return y_MN, *transpose(dy_MN)

  expected = run(lhs_MK, rhs_GKN, dy_MN)
  tolerance = testing.TOLERANCE[lhs_MK.dtype.name]
  testing.assert_close('output', expected[0], oracle(lhs_MK, rhs_GKN, sizes).astype(lhs_MK.dtype), tolerance)
  lhs_MK[3:], rhs_GKN[1], dy_MN[3:] = np.nan, np.nan, np.nan
  for x, y in zip(run(lhs_MK, rhs_GKN, dy_MN), expected, strict=True):
    testing.assert_close('with NaN elsewhere', x, y, tolerance)


def test_inside_scan_and_checkpoint():
  lhs_MK, rhs_GKN = operands(m=6, k=4, n=4)
  weights_LGKN = np.stack([rhs_GKN, 0.5 * rhs_GKN])

  def loss(weights_LGKN, implementation):
    @jax.checkpoint
    def layer(x_MK, rhs_GKN):
      return jnp.tanh(grouped_matmul(x_MK, rhs_GKN, jnp.array([2, 1, 2]), implementation=implementation)), None

    return (jax.lax.scan(layer, jnp.asarray(lhs_MK), weights_LGKN)[0] ** 2).sum()

  grads = [jax.jit(jax.grad(loss), static_argnums=1)(weights_LGKN, name) for name in (None, 'reference')]
  testing.assert_close('gradient', *grads, 2e-5)


@pytest.mark.parametrize('case', testing.CASES['grouped_matmul'][:4], ids=str)
def test_surplus_visits_are_harmless(case, monkeypatch):
  # On accelerators the number of visits is static: more than the groups have.
  monkeypatch.setattr(dispatch, 'platform', lambda *_: 'gpu')
  testing.check(on_an_accelerator, 'xla', case)


def on_an_accelerator(**arguments):
  # A function of its own: `testing` keeps one compiled program an op.
  return grouped_matmul(**arguments)


def test_float32_output_of_bfloat16_operands_is_not_rounded():
  lhs_MK, rhs_GKN = operands(k=64, n=192, dtype=ml_dtypes.bfloat16)
  sizes = (2, 0, 3)
  for name in grouped_matmul.implementations():
    y_MN = grouped_matmul(lhs_MK, rhs_GKN, jnp.array(sizes), out_dtype=jnp.float32, implementation=name)
    assert y_MN.dtype == jnp.float32
    np.testing.assert_allclose(y_MN, oracle(lhs_MK, rhs_GKN, sizes), atol=1e-4)


def test_flops_follow_the_rows_not_the_experts():
  def flops(groups):
    lhs_MK, rhs_GKN = operands(m=512, k=32, n=32, groups=groups)
    sizes = jnp.full(groups, 512 // groups)
    cost = jax.jit(lambda *x: grouped_matmul(*x, implementation='xla')).lower(lhs_MK, rhs_GKN, sizes).compile()
    return cost.cost_analysis()['flops']

  # cost_analysis counts a loop's body once: one visit, whose tile shrinks with the mean group.
  assert flops(64) < flops(4)


def test_fp8_has_no_gradients():
  lhs_MK, rhs_GKN = operands(dtype=ml_dtypes.float8_e4m3fn)
  scales = np.ones((6, 1), np.float32), np.ones((3, 1, 1), np.float32)
  for position in (0, 3):
    operands_and_scales = [lhs_MK, rhs_GKN, jnp.array([1, 2, 3]), *scales]
    with pytest.raises(NotImplementedError, match='no gradients for FP8'):
      jax.vjp(lambda x, position=position, rest=operands_and_scales: grouped_matmul(
        *rest[:position], x, *rest[position + 1:]), operands_and_scales[position])


@pytest.mark.parametrize('implementation', grouped_matmul.implementations())
@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'uint32'])
def test_group_sizes_of_any_integer_dtype_from_numpy_under_jit(implementation, dtype):
  served = SERVED.get(implementation, {})
  lhs_MK, rhs_GKN = operands(m=300, **{**served, 'dtype': served.get('dtype', 'float32')})
  sizes = (100, 90, 100)  # their sum fits in neither small dtype

  def gradients(sizes, implementation):
    return jax.jit(jax.grad(lambda *x: grouped_matmul(*x, sizes, implementation=implementation).astype('f').sum(),
                            (0, 1)))(lhs_MK, rhs_GKN)

  with jax.default_matmul_precision('highest'):
    actual, expected = gradients(np.array(sizes, dtype), implementation), gradients(jnp.array(sizes), 'reference')
  for x, y in zip(actual, expected, strict=True):
    testing.assert_close(dtype, x, y, testing.TOLERANCE[lhs_MK.dtype.name])


@pytest.mark.parametrize('implementation', grouped_matmul.implementations())
def test_without_zeroing_the_tail_the_groups_rows_are_the_same(implementation):
  served = SERVED.get(implementation, {})
  lhs_MK, rhs_GKN = operands(m=300, **{**served, 'dtype': served.get('dtype', 'float32')})
  sizes = jnp.array([130, 0, 60])
  kept, unwritten = (jax.jit(lambda *x, zero_tail=zero_tail: grouped_matmul(
    *x, zero_tail=zero_tail, implementation=implementation))(lhs_MK, rhs_GKN, sizes) for zero_tail in (True, False))
  np.testing.assert_array_equal(kept[:190], unwritten[:190])
  assert not kept[190:].any()


@pytest.mark.parametrize(('change', 'message'), [
  ({'rhs_GKN': np.ones((3, 5, 3), np.float32)}, r'lhs \(6, 4\) and rhs \(3, 5, 3\) must be'),
  ({'group_sizes_G': np.ones(2, np.int32)}, r'group_sizes is int32\[2\] and must be integers \[3\]'),
  ({'group_sizes_G': np.ones(3, np.float32)}, r'group_sizes is float32\[3\]'),
  ({'rhs_GKN': np.ones((3, 4, 3), np.float16)}, 'lhs is float32 and rhs float16'),
  ({'rhs_GKN': np.ones((0, 4, 3), np.float32)}, r'rhs \[0, 4, 3\] has an empty axis'),
  ({'lhs_scales': np.ones((6, 1), np.float32)}, 'scales belong to FP8'),
  ({'lhs_MK': np.ones((6, 4), ml_dtypes.float8_e4m3fn), 'rhs_GKN': np.ones((3, 4, 3), ml_dtypes.float8_e4m3fn)},
   r'lhs_scales is None and must be float32\[6, 1\]'),
  ({'lhs_MK': np.ones((6, 4), ml_dtypes.float8_e4m3fn), 'rhs_GKN': np.ones((3, 4, 3), ml_dtypes.float8_e4m3fn),
    'lhs_scales': np.ones((6, 1), np.float16)}, r'lhs_scales is float16\[6, 1\] and must be float32\[6, 1\]'),
])
def test_bad_operands(change, message):
  lhs_MK, rhs_GKN = operands()
  with pytest.raises(ValueError, match=message):
    grouped_matmul(**{'lhs_MK': lhs_MK, 'rhs_GKN': rhs_GKN, 'group_sizes_G': np.ones(3, np.int32), **change})

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import make_plan, mla_decode, testing
from pallas_kernels.mla_decode import schedule
from tests.kernels.unsuitable import skipped_if_unsuitable

FASTER = [name for name in mla_decode.implementations() if name != 'reference']


def oracle(q_BTNJ, pages_PSJ, table_BP, lengths_B, scale, value_width):
  b, t, n, _ = q_BTNJ.shape
  o_BTNC, lse_BTN = np.zeros((b, t, n, value_width)), np.full((b, t, n), -np.inf)
  size = pages_PSJ.shape[1]
  for i, j, h in np.ndindex(b, t, n):
    keys = range(max(0, lengths_B[i] - t + j + 1))
    cache_SJ = np.array([pages_PSJ[table_BP[i, key // size], key % size] for key in keys], np.float64)
    if len(cache_SJ):
      weights = np.exp(scale * (cache_SJ @ q_BTNJ[i, j, h]))
      o_BTNC[i, j, h] = weights @ cache_SJ[:, :value_width] / weights.sum()
      lse_BTN[i, j, h] = np.log(weights.sum())
  return o_BTNC, lse_BTN


@pytest.mark.parametrize('case', [testing.mla_decode_case('short', (1, 0, 9, 12), t=3, max_pages=3, page=4),
                                  testing.mla_decode_case('one token', (1, 12), t=1, max_pages=3, page=4)], ids=str)
def test_reference_is_query_by_query(case):
  arrays = case.arrays(np.random.default_rng(3))
  out = mla_decode(**arrays, **case.options, implementation='reference')
  expected = oracle(**arrays, scale=case.options['scale'], value_width=case.options['value_width'])
  for x, y in zip(out, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize('implementation', FASTER)
@pytest.mark.parametrize('case', testing.CASES['mla_decode'], ids=str)
def test_matches_reference(implementation, case):
  with skipped_if_unsuitable(implementation, case):
    testing.check(mla_decode, implementation, case)


@pytest.mark.parametrize('implementation', mla_decode.implementations())
def test_scores_beyond_exp_do_not_overflow(implementation):
  case = testing.mla_decode_case('large', (300, 20), t=2, max_pages=19)
  arrays = case.arrays(np.random.default_rng(4))
  arrays['q_BTNJ'] *= 1000
  with skipped_if_unsuitable(implementation), jax.default_matmul_precision('highest'):
    o_BTNC, lse_BTN = mla_decode(**arrays, **case.options, implementation=implementation)
  expected = oracle_of_argmax(**arrays, value_width=case.options['value_width'])
  assert np.isfinite(lse_BTN).all()
  assert float(lse_BTN.max()) > 1000
  # So far apart, nearly every softmax is one key.
  assert np.median(np.abs(o_BTNC - expected)) < 1e-4


def oracle_of_argmax(q_BTNJ, pages_PSJ, table_BP, lengths_B, value_width):
  o_BTNC = np.zeros((*q_BTNJ.shape[:3], value_width))
  for i, j, h in np.ndindex(q_BTNJ.shape[:3]):
    keys = lengths_B[i] - q_BTNJ.shape[1] + j + 1
    used = table_BP[i, :-(-lengths_B[i] // pages_PSJ.shape[1])]
    cache_SJ = pages_PSJ[used].reshape(-1, pages_PSJ.shape[2])[:keys]
    o_BTNC[i, j, h] = cache_SJ[np.argmax(cache_SJ @ q_BTNJ[i, j, h]), :value_width]
  return o_BTNC


def test_a_request_long_enough_is_cut():
  """By an H200's 132 processors, two for the 80 rows; more pieces than the kernel merges at a time."""
  case = next(case for case in testing.CASES['mla_decode'] if 'a cut request' in case.name)
  _, parts_B2 = schedule.make(jnp.asarray(case.arrays(np.random.default_rng(0))['lengths_B']), 66)
  first, last = parts_B2[0]
  assert last - first + 1 > 8


@pytest.mark.parametrize('implementation', FASTER)
def test_a_plan_made_before_changes_nothing(implementation):
  case = testing.mla_decode_case('planned', (2600, 0, 40), t=2, max_pages=41, page=64, heads=16, **testing.GPU)
  arrays = case.arrays(np.random.default_rng(0))
  plan = make_plan(arrays['lengths_B'], tokens=2, heads=16)
  with skipped_if_unsuitable(implementation):
    planned, unplanned = (mla_decode(**arrays, **case.options, plan=p, implementation=implementation)
                          for p in (plan, None))
  for x, y in zip(planned, unplanned, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('implementation', mla_decode.implementations())
@pytest.mark.parametrize('dtype', ['uint8', 'int16'])
def test_lengths_of_any_integer_dtype_and_numpy_arrays_under_jit(implementation, dtype):
  case = testing.mla_decode_case('narrow', (1, 5), t=3, max_pages=1, heads=2)
  arrays = case.arrays(np.random.default_rng(0))
  pages_PSJ, table_BP = arrays['pages_PSJ'], np.array([[0], [1]], dtype)

  @jax.jit
  def run(q_BTNJ, table_BP, lengths_B):
    return mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, **case.options, implementation=implementation)

  with skipped_if_unsuitable(implementation), jax.default_matmul_precision('highest'):
    actual = run(arrays['q_BTNJ'], table_BP, arrays['lengths_B'].astype(dtype))
    expected = mla_decode(**arrays | {'table_BP': table_BP.astype(np.int32)}, **case.options,
                          implementation='reference')
  for x, y in zip(actual, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_it_has_no_gradients():
  case = testing.mla_decode_case('valid', (3, 40), t=1, max_pages=3)
  arrays = case.arrays(np.random.default_rng(0))
  with pytest.raises(NotImplementedError, match='mla_decode has no gradients; flash_attention over expanded keys has'):
    jax.grad(lambda q_BTNJ: mla_decode(**{**arrays, 'q_BTNJ': q_BTNJ}, **case.options)[0].sum())(arrays['q_BTNJ'])


@pytest.mark.parametrize(('change', 'message'), [
  ({'q_BTNJ': np.ones((2, 1, 4, 39), np.float32)}, r'q \(2, 1, 4, 39\) and pages \(7, 16, 40\) must be'),
  ({'table_BP': np.ones((3, 3), np.int32)}, r'table is int32\[3, 3\] and must be integers \[2, max_pages\]'),
  ({'lengths_B': np.ones(2, np.float32)}, r'lengths is float32\[2\] and must be integers \[2\]'),
  ({'table_BP': np.ones((2, 0), np.int32)}, r'table \[2, 0\] has an empty axis'),
  ({'value_width': 41}, 'value_width=41 must be between 1 and the cache width 40'),
])
def test_bad_operands(change, message):
  case = testing.mla_decode_case('valid', (3, 40), t=1, max_pages=3)
  with pytest.raises(ValueError, match=message):
    mla_decode(**{**case.arrays(np.random.default_rng(0)), **case.options, **change})


def test_a_traced_scale_is_refused():
  case = testing.mla_decode_case('valid', (3, 40), t=1, max_pages=3)
  arrays = case.arrays(np.random.default_rng(0))
  with pytest.raises(ValueError, match='mla_decode: scale is traced and must be known when tracing'):
    jax.jit(lambda scale: mla_decode(**arrays, scale=scale, value_width=32))(0.3)

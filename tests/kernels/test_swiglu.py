"""swiglu_gradients: every implementation against the reference, and the kernel in Pallas' simulation of a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu, swiglu, swiglu_gradients, testing
from tests.kernels.unsuitable import skipped_if_unsuitable

FASTER = [name for name in swiglu_gradients.implementations() if name != 'reference']
CASES = testing.CASES['swiglu_gradients']


@pytest.mark.parametrize('implementation', FASTER)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_matches_reference(implementation, case):
  with skipped_if_unsuitable(implementation, case):
    testing.check(swiglu_gradients, implementation, case)


@pytest.mark.skipif(mosaic_gpu.unavailable() is not None, reason=str(mosaic_gpu.unavailable()))
@pytest.mark.parametrize('case', [case for case in CASES if 'tiles of a GPU' in case.name], ids=str)
def test_simulated_kernel_matches_reference(case, capfd):
  with mosaic_gpu.interpreter():
    testing.check(swiglu_gradients, 'gpu', case)
  assert 'RACE DETECTED' not in capfd.readouterr().out


def test_first_result_is_swiglu_and_extreme_gates_stay_finite():
  h_M2F = jnp.array([[-200.0, 200.0, 0.0, 3.0, 5.0, 7.0]])
  y_MF, dh_M2F, dweights_M = swiglu_gradients(h_M2F, jnp.array([0.5]), jnp.ones((1, 3)))
  np.testing.assert_array_equal(y_MF, swiglu(h_M2F, jnp.array([0.5])))
  np.testing.assert_allclose(y_MF, [[0, 500, 0]])
  np.testing.assert_allclose(dh_M2F, [[0, 2.5, 1.75, 0, 100, 0]])
  np.testing.assert_allclose(dweights_M, [1000])


def test_a_row_that_is_nan_harms_no_other():
  h_M2F, dy_MF = jax.random.normal(jax.random.key(0), (5, 8)), jnp.ones((5, 4))
  clean = swiglu_gradients(h_M2F, jnp.ones(5), dy_MF)
  spoilt = swiglu_gradients(h_M2F.at[3:].set(jnp.nan), jnp.ones(5), dy_MF)
  for a, b in zip(clean, spoilt, strict=True):
    np.testing.assert_array_equal(a[:3], b[:3])


@pytest.mark.parametrize(('shapes', 'dtypes', 'message'), [
  (((3, 8), (3,), (3, 5)), ('float32', 'float32', 'float32'), r'must be \[M, 2 F\], \[M\] and \[M, F\]'),
  (((3, 8), (4,), (3, 4)), ('float32', 'float32', 'float32'), r'weights \(4,\)'),
  (((3, 8), (3,), (12,)), ('float32', 'float32', 'float32'), r'dy \(12,\)'),
  (((0, 8), (0,), (0, 4)), ('float32', 'float32', 'float32'), r'h \[0, 8\] has an empty axis'),
  (((3, 8), (3,), (3, 4)), ('bfloat16', 'float32', 'float32'), 'make the first two equal'),
  (((3, 8), (3,), (3, 4)), ('bfloat16', 'bfloat16', 'bfloat16'), 'and the last float32'),
])
def test_what_does_not_fit_is_said(shapes, dtypes, message):
  with pytest.raises(ValueError, match=message):
    swiglu_gradients(*(jnp.ones(s, d) for s, d in zip(shapes, dtypes, strict=True)))


@pytest.mark.parametrize(('h', 'weights'), [((3, 7), (3,)), ((8,), (8,)), ((3, 8), (1,))])
def test_swiglu_of_what_does_not_fit_is_said(h, weights):
  with pytest.raises(ValueError, match=r'swiglu: h .* must be \[M, 2 F\], \[M\]$'):
    swiglu(jnp.ones(h), jnp.ones(weights))

"""Norm and SwiGLU against the gradients of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.model import layers

EPSILON = 1e-3  # large enough to be seen in a gradient


def rms_norm(x, scale):
  return x / jnp.sqrt((x ** 2).mean(-1, keepdims=True) + EPSILON) * scale


def swiglu(x_BTD, wi_D2F, wo_FD):
  gate_BTF, up_BTF = (x_BTD @ wi_D2F[:, z] for z in (0, 1))
  return (jax.nn.silu(gate_BTF) * up_BTF) @ wo_FD


@pytest.mark.parametrize(('function', 'formula', 'shapes', 'keeps'), [
    (lambda x, scale: layers.rms_norm(x, scale, EPSILON), rms_norm, [(2, 5, 12), (12,)], 2 * 5 * 12 + 2 * 5 + 12),
    (lambda x, scale: layers.rms_norm(x, scale, EPSILON), rms_norm, [(7, 12), (12,)], 7 * 12 + 7 + 12),
    (layers.swiglu, swiglu, [(2, 5, 8), (8, 2, 6), (6, 8)], 2 * 5 * (8 + 2 * 6) + 8 * 2 * 6 + 6 * 8)])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 2e-5), ('bfloat16', 3e-2)])
def test_gradients_are_those_of_the_formula_and_little_is_kept_for_them(function, formula, shapes, keeps, dtype,
                                                                        tolerance):
  random = np.random.default_rng(0)
  operands = [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]
  y, gradient = jax.vjp(function, *operands)
  assert sum(leaf.size for leaf in jax.tree.leaves(gradient)) == keeps
  dy = jnp.asarray(random.standard_normal(y.shape), dtype)
  expected_y, expected = jax.vjp(formula, *(x.astype(jnp.float32) for x in operands))
  for found, wanted in zip((y, *gradient(dy)), (expected_y, *expected(dy.astype(jnp.float32))), strict=True):
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=tolerance * np.abs(wanted).max())

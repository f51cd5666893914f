"""Sorting by expert, and the way of the rows there and back: values and gradients against a dense layer in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.model import experts, moe
from pallas_kernels import grouped_matmul

T, D, E, X, F = 75, 16, 8, 3, 12


def inputs(dtype=np.float32, seed=0):
  random = np.random.default_rng(seed)

  def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)

  ids_TX = np.stack([random.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
  ids_TX[ids_TX == 2] = 6  # an expert with no rows, and tokens that chose one expert twice
  x_TD, wi_ED2F, wo_EFD, dy_TD = (a.astype(dtype) for a in (normal(T, D), normal(E, D, 2, F) / 4, normal(E, F, D) / 4,
                                                            normal(T, D)))
  return x_TD, ids_TX, random.random((T, X)).astype(np.float32), wi_ED2F, wo_EFD, dy_TD


def dense(x_TD, ids_TX, weights_TX, wi_ED2F, wo_EFD):
  """Every expert for every token."""
  chosen_TXE = ids_TX[:, :, None] == jnp.arange(E)
  h_TE2F = jnp.einsum('TD,EDZF->TEZF', x_TD, wi_ED2F)
  a_TEF = jax.nn.silu(h_TE2F[:, :, 0]) * h_TE2F[:, :, 1]
  return jnp.einsum('TX,TXE,TEF,EFD->TD', weights_TX, chosen_TXE.astype(x_TD.dtype), a_TEF, wo_EFD)


def with_gradients(function, x_TD, ids_TX, weights_TX, wi_ED2F, wo_EFD, dy_TD):
  """(y, gradients to x, weights, wi, wo)."""
  @jax.jit
  def run(x_TD, weights_TX, wi_ED2F, wo_EFD, dy_TD):
    y_TD, pull = jax.vjp(lambda x, w, wi, wo: function(x, ids_TX, w, wi, wo), x_TD, weights_TX, wi_ED2F, wo_EFD)
    return y_TD, *pull(dy_TD)

  return [np.asarray(a, np.float64) for a in run(x_TD, weights_TX, wi_ED2F, wo_EFD, dy_TD)]


@functools.cache
def expected(dtype):
  with jax.enable_x64(True):
    return with_gradients(dense, *(a if a.dtype == np.int32 else a.astype(np.float64) for a in inputs(dtype)))


def everywhere(*operands):
  return experts.experts(*operands, 0)


def in_shards(x_TD, ids_TX, weights_TX, wi_ED2F, wo_EFD):
  """As over an expert axis of 4: most rows of a shard are elsewhere."""
  return sum(experts.experts(x_TD, ids_TX, weights_TX, wi_ED2F[e:e + 2], wo_EFD[e:e + 2], e) for e in (0, 2, 4, 6))


def assert_close(ours, theirs, tolerance):
  for name, a, b in zip(('y', 'dx', 'dweights', 'dwi', 'dwo'), ours, theirs, strict=True):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < tolerance, f'{name}: {error:.1e}'


@pytest.mark.parametrize('rows', [1, 3, 32, 33, 320])
@pytest.mark.parametrize(('first', 'count'), [(0, 9), (3, 4), (8, 1)])
def test_sort_agrees_with_a_stable_sort(rows, first, count):
  ids_TX = np.random.default_rng(rows).integers(0, 9, (rows, 1))
  here = (ids_TX[:, 0] >= first) & (ids_TX[:, 0] < first + count)
  routes = jax.jit(functools.partial(experts.sort, count=count))(ids_TX, first)
  order = [r for r in np.argsort(ids_TX[:, 0], kind='stable') if here[r]]
  np.testing.assert_array_equal(routes.choice_M[:len(order)], order)
  assert sorted(routes.choice_M.tolist()) == list(range(rows))
  np.testing.assert_array_equal(routes.place_TX[order, 0], np.arange(len(order)))
  np.testing.assert_array_equal(routes.place_TX[~here], rows)
  np.testing.assert_array_equal(routes.sizes_E, np.bincount(ids_TX[here, 0] - first, minlength=count))


@pytest.mark.parametrize('layer', [everywhere, in_shards, jax.checkpoint(everywhere)], ids=['whole', 'shards', 'remat'])
def test_gradients_against_a_dense_layer(layer):
  assert_close(with_gradients(layer, *inputs()), expected(np.float32), 5e-7)


def test_bfloat16_loses_only_its_own_digits():
  """Each of the three products and their inputs is rounded to 8 bits: 2^-9 a rounding."""
  assert_close(with_gradients(everywhere, *inputs(jnp.bfloat16)), expected(jnp.bfloat16), 6e-3)


def test_what_is_past_the_groups_may_be_nan(monkeypatch):
  """The tail of every operand and result of the grouped matmuls, forward and backward."""
  @jax.custom_vjp
  def spoil(x_MK, sizes_E):
    return jnp.where((jnp.arange(len(x_MK)) < sizes_E.sum())[:, None], x_MK, jnp.nan)

  spoil.defvjp(lambda x_MK, sizes_E: (spoil(x_MK, sizes_E), sizes_E), lambda sizes_E, g: (spoil(g, sizes_E), None))
  calls = []

  def spoilt(lhs_MK, rhs_EKN, sizes_E, zero_tail):
    calls.append(zero_tail)
    return spoil(grouped_matmul(spoil(lhs_MK, sizes_E), rhs_EKN, sizes_E, zero_tail=zero_tail), sizes_E)

  monkeypatch.setattr(experts, 'grouped_matmul', spoilt)
  assert_close(with_gradients(in_shards, *inputs()), expected(np.float32), 5e-7)
  assert calls
  assert not any(calls)  # nobody pays for zeros that nobody reads


@pytest.mark.parametrize('width', [D, D + 1])
def test_rows_travel_as_words_on_a_gpu(monkeypatch, width):
  x_TD = jax.random.normal(jax.random.key(0), (T, width), jnp.bfloat16)
  routes = experts.sort(inputs()[1], 0, E)
  plain_MD = experts.spread(x_TD, routes)
  monkeypatch.setattr(experts.dispatch, 'platform', lambda *_: 'gpu')
  np.testing.assert_array_equal(experts.spread(x_TD, routes), plain_MD)
  words = 'bitcast_convert_type' in str(jax.make_jaxpr(experts.spread)(x_TD, routes))
  assert words == (width % 2 == 0)


def test_no_scatter_adds_anything():
  """A GPU adds with atomics, in another order every time."""
  x_TD, ids_TX, weights_TX, wi_ED2F, wo_EFD, _ = inputs()

  def gradient(layer):
    def total(x, w, wi, wo):
      return layer(x, ids_TX, w, wi, wo).sum()
    return str(jax.make_jaxpr(jax.grad(total, (0, 1, 2, 3)))(x_TD, weights_TX, wi_ED2F, wo_EFD))

  assert 'scatter-add' not in gradient(everywhere)
  assert 'scatter-add' in gradient(lambda x_TD, ids_TX, *_: x_TD[ids_TX])  # what the word looks for


@pytest.mark.parametrize('remat', [False, True])
def test_what_stays_between_forward_and_backward(remat):
  """Sorted rows, gate and up; beside these the operands, and for each row its places and weight. With remat nothing."""
  operands = inputs()[:5]
  layer = jax.checkpoint(everywhere) if remat else everywhere

  def forward(x, w, wi, wo):
    return jax.vjp(lambda x, w, wi, wo: layer(x, operands[1], w, wi, wo), x, w, wi, wo)[1]

  saved = jax.tree.leaves(jax.eval_shape(forward, operands[0], *operands[2:]))
  known = {a.shape for a in operands} | {(E, D, 2 * F)}
  shapes = sorted(a.shape for a in saved if a.ndim and a.shape not in known and a.dtype == np.float32)
  assert shapes == ([] if remat else [(T * X, D), (T * X, 2 * F)])
  small = sum(a.size for a in saved if a.dtype != np.float32)
  assert small <= 8 * T * X, 'a few indices a row'


def test_router_logits_of_bfloat16_tokens_are_as_good_as_float32():
  random = np.random.default_rng(0)
  x_BTD = jnp.asarray(random.standard_normal((2, 300, 256)), jnp.bfloat16)
  router_DE = random.standard_normal((256, 16)).astype(np.float32)
  g_BTE = random.standard_normal((2, 300, 16)).astype(np.float32)

  @jax.jit
  def run(x_BTD, router_DE, g_BTE):
    logits_BTE, pull = jax.vjp(moe.router_logits, x_BTD, router_DE)
    return logits_BTE, *pull(g_BTE)

  x, w, g = (np.asarray(a, np.float64) for a in (x_BTD, router_DE, g_BTE))
  ours = run(x_BTD, router_DE, g_BTE)
  exact = np.einsum('BTD,DE->BTE', x, w), np.einsum('BTE,DE->BTD', g, w), np.einsum('BTD,BTE->DE', x, g)
  assert [a.dtype for a in ours] == [np.float32, jnp.bfloat16, np.float32]
  for a, b, tolerance in zip(ours, exact, (1e-6, 2.5e-3, 1e-6), strict=True):
    assert np.linalg.norm(np.asarray(a, np.float64) - b) < tolerance * np.linalg.norm(b)

"""The step against plain NumPy, and against itself in pieces."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mla_jax import axes
from mla_jax.config import MeshConfig
from mla_jax.model import transformer
from mla_jax.training import loss
from mla_jax.training.state import initial_state, make_optimizer, store_as
from mla_jax.training.step import Controls, train_step
from tests.training import small

CONTROLS = Controls(*map(np.float32, (1.0, 0.3, 1e-3)))


@pytest.fixture(scope='module')
def mesh():
  return axes.make_mesh(MeshConfig(data=1), jax.devices()[:1])


def run(config, mesh, batch, optimizer=None, params=None):
  """(metrics, weights before - after, state): gradients, for the identity as optimizer and a rate of 1."""
  optimizer = optimizer or optax.identity()
  state = initial_state(config.model, optimizer, 0, mesh)
  if params is not None:
    state = jax.tree.map(lambda x: x, state)
    state = type(state)(params(state.params), state.buffers, state.optimizer, state.skipped)
  before = jax.device_get(state.params)
  with jax.set_mesh(mesh):
    state, metrics = train_step(config, optimizer)(state, batch, CONTROLS)
  return jax.device_get(metrics), jax.tree.map(np.subtract, before, jax.device_get(state.params)), state


@pytest.fixture(scope='module')
def whole(mesh):
  return run(small.config(), mesh, small.batch(8, 24))


@pytest.mark.parametrize('remat', ['full', pytest.param('dots', marks=pytest.mark.long)])
def test_accumulation_remat_and_unrolling_change_nothing(mesh, whole, remat):
  """Rows differ in padding and documents, so a mean of micro-batch means would differ (facts.md, trap 5)."""
  config = small.config(gradient_accumulation=8 if remat == 'full' else 2, remat=remat, unroll_layers=remat == 'full')
  metrics, gradients, state = run(config, mesh, small.batch(8, 24))
  for name in ('loss', 'main_loss', 'mtp_loss', 'balance_loss', 'grad_norm'):
    assert metrics[name] == pytest.approx(whole[0][name], rel=1e-5), name
  assert metrics['balance_loss'] > 0
  assert (metrics['load_LE'] == whole[0]['load_LE']).all()
  assert (state.buffers['bias_LE'] == whole[2].buffers['bias_LE']).all()
  for ours, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(whole[1]), strict=True):
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max() + 1e-9)


def test_losses_are_the_mean_over_predictions_within_documents(whole):
  """Main and MTP losses from the model's own logits, summed position by position in NumPy."""
  config, batch = small.config(), small.batch(8, 24)
  model = transformer.Transformer(config.model, jax.random.key(0))

  @jax.jit
  def logits(tokens, positions, segments):
    hidden, _ = model.hidden(tokens[:, :-1], positions[:, :-1], segments[:, :-1])
    draft, _ = model.mtp_hidden(1, hidden, tokens[:, 1:], positions[:, :-1], segments[:, :-1],
                                loss.predicted(segments, 1))
    return model.logits(hidden), model.logits(draft)

  main, draft = (np.asarray(x, np.float64) for x in logits(batch['tokens'], batch['positions'], batch['segments']))
  for found, values, distance in ((whole[0]['main_loss'], main, 1), (whole[0]['mtp_loss'], draft, 2)):
    nats = []
    for row in range(8):
      for i in range(24):
        j = i + distance
        if j <= 24 and batch['segments'][row, i] > 0 and batch['segments'][row, i] == batch['segments'][row, j]:
          z = values[row, i]
          nats.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[batch['tokens'][row, j]])
    assert found == pytest.approx(np.mean(nats), rel=1e-5)


def test_total_weighs_its_parts(whole):
  m = whole[0]
  assert m['loss'] == pytest.approx(m['main_loss'] + 0.3 * m['mtp_loss'] + m['balance_loss'], rel=1e-6)


def test_bias_moves_against_the_load(whole):
  metrics, _, state = whole
  load_LE, bias_LE = metrics['load_LE'], np.asarray(state.buffers['bias_LE'])
  np.testing.assert_allclose(bias_LE, 1e-3 * np.sign(load_LE.mean(-1, keepdims=True) - load_LE), rtol=1e-6)
  # The main MoE layer counts every real token twice (two experts each); the MTP module only those it can use.
  segments = small.batch(8, 24)['segments']
  assert load_LE[0].sum() == 2 * (segments[:, :-1] > 0).sum()
  assert load_LE[1].sum() == 2 * np.asarray(loss.predicted(segments, 1)).sum()


def test_router_bias_gets_no_gradient_but_experts_do(whole):
  gradients = whole[1]
  assert np.abs(gradients['moe_blocks']['ffn']['router_DE']).max() > 0
  assert np.abs(gradients['mtp_modules']['block']['ffn']['wi_ED2F']).max() > 0


def test_a_step_without_finite_gradient_changes_nothing(mesh):
  def poison(params):
    return params | {'norm_D': params['norm_D'].at[0].set(np.nan)}

  config = small.config()
  letters = axes.letters_of(transformer.abstract(config.model).params)
  metrics, moved, state = run(config, mesh, small.batch(8, 24), make_optimizer(config.optimizer, letters), poison)
  assert metrics['skipped_steps'] == 1
  assert all((np.nan_to_num(m) == 0).all() for m in jax.tree.leaves(moved))
  assert (np.asarray(state.buffers['bias_LE']) == 0).all()
  assert all((np.asarray(m) == 0).all() for m in jax.tree.leaves(state.optimizer))


def test_documents_do_not_see_each_other():
  """With masked documents, another first document leaves the second one's hidden states as they were."""
  config = small.config()
  model = transformer.Transformer(config.model, jax.random.key(1))
  tokens = np.arange(24, dtype=np.int32)[None] * 3 % 256
  other = tokens.copy()
  other[:, :10] += 1
  segments = np.where(np.arange(24) < 10, 1, 2).astype(np.int32)[None]
  positions = np.where(np.arange(24) < 10, np.arange(24), np.arange(24) - 10).astype(np.int32)[None]
  hidden = nnx.jit(lambda model, tokens: model.hidden(tokens, positions, segments)[0])
  a, b = np.asarray(hidden(model, tokens)), np.asarray(hidden(model, other))
  np.testing.assert_array_equal(a[:, 10:], b[:, 10:])
  assert np.abs(a[:, :10] - b[:, :10]).max() > 1e-3


def test_no_decay_on_norms_and_bf16_moments_are_close():
  config = small.config()
  model = transformer.abstract(config.model)
  letters = axes.letters_of(model.params)
  params = jax.tree.map(lambda v: np.ones(v.shape, np.float32), model.params, is_leaf=axes.is_variable)
  zero = jax.tree.map(np.zeros_like, params)
  optimizer = make_optimizer(config.optimizer, letters)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  assert (np.asarray(updates['norm_D']) == 0).all()
  assert (np.asarray(updates['moe_blocks']['norm_ffn_D']) == 0).all()
  np.testing.assert_allclose(updates['head_WD'], config.optimizer.weight_decay)
  exact = optax.scale_by_adam()
  half = store_as(exact, np.dtype('bfloat16'))
  gradient = {'w': np.linspace(-1, 1, 64, dtype=np.float32)}
  a, b = exact.init(gradient), half.init(gradient)
  for _ in range(3):
    u, a = exact.update(gradient, a)
    v, b = half.update(gradient, b)
  assert b.mu['w'].dtype == 'bfloat16'
  np.testing.assert_allclose(u['w'], v['w'], atol=0.02)

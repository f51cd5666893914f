"""Routers, balancing and dropless dispatch against NumPy, a token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import EXPERTS, config

from mla_jax.model import moe

B, T, D, E, X = 2, 6, 16, 8, 3
V3 = config(**EXPERTS | dict(num_experts_per_tok=X))
ROUTERS = {
    'v2_lite': dataclasses.replace(V3, scoring_func='softmax', topk_method='greedy', norm_topk_prob=False,
                                   routed_scaling_factor=1.0),
    'v2': dataclasses.replace(V3, scoring_func='softmax', topk_method='group_limited_greedy', norm_topk_prob=False,
                              routed_scaling_factor=16.0),
    'v3': V3,
    'v3 without groups': dataclasses.replace(V3, n_group=1, topk_group=1),
}


def inputs(seed=0):
  random = np.random.default_rng(seed)
  x_BTD = random.standard_normal((B, T, D)).astype(np.float32)
  router_DE = (random.standard_normal((D, E)) / 2).astype(np.float32)
  bias_E = (-1.5 + 0.3 * random.standard_normal(E)).astype(np.float32)  # every biased score is negative
  return x_BTD, router_DE, bias_E


def oracle(x_D, router_DE, bias_E, c):
  """(scores, {expert: weight}) of one token, float64."""
  logits_E = x_D.astype(np.float64) @ router_DE.astype(np.float64)
  scores_E = 1 / (1 + np.exp(-logits_E)) if c.scoring_func == 'sigmoid' else np.exp(logits_E) / np.exp(logits_E).sum()
  ranked_E = scores_E + bias_E if c.topk_method == 'noaux_tc' else scores_E
  reachable = range(E)
  if c.topk_method != 'greedy' and c.n_group > 1:
    members = np.split(np.arange(E), c.n_group)
    worth = [np.sort(ranked_E[m])[-2:].sum() if c.topk_method == 'noaux_tc' else ranked_E[m].max() for m in members]
    reachable = [e for g in np.argsort(worth)[-c.topk_group:] for e in members[g]]
  chosen = sorted(reachable, key=lambda e: -ranked_E[e])[:X]
  total = sum(scores_E[e] for e in chosen) if c.norm_topk_prob else 1.0
  return scores_E, {e: scores_E[e] / total * c.routed_scaling_factor for e in chosen}


def route(x_BTD, router_DE, bias_E, valid_BT, c):
  @jax.jit
  def run(x_BTD, router_DE, bias_E, valid_BT):
    scores_BTE = moe.scores(x_BTD, router_DE, c.scoring_func)
    ids_BTX = moe.choose(scores_BTE, bias_E, c)
    return scores_BTE, ids_BTX, moe.weigh(scores_BTE, ids_BTX, c), moe.balance(scores_BTE, ids_BTX, valid_BT, c)

  return jax.tree.map(np.asarray, run(x_BTD, router_DE, bias_E, valid_BT))


@pytest.mark.parametrize('name', ROUTERS)
def test_router_and_balance(name):
  c, (x_BTD, router_DE, bias_E) = ROUTERS[name], inputs()
  valid_BT = np.ones((B, T), bool)
  valid_BT[0, 4:] = False  # padding: routed, but neither load nor loss
  scores_BTE, ids_BTX, weights_BTX, seen = route(x_BTD, router_DE, bias_E, valid_BT, c)
  assert weights_BTX.dtype == np.float32
  load_E, loss, chosen_by_bias_alone = np.zeros(E), 0.0, 0
  for b in range(B):
    f_E, p_E = np.zeros(E), np.zeros(E)
    for t in range(T):
      expected_E, weights = oracle(x_BTD[b, t], router_DE, bias_E, c)
      np.testing.assert_allclose(scores_BTE[b, t], expected_E, rtol=1e-5)
      ours = dict(zip(ids_BTX[b, t].tolist(), weights_BTX[b, t].tolist(), strict=True))
      assert ours == pytest.approx(weights, rel=1e-5)
      best = np.argsort(expected_E)[-X:]
      chosen_by_bias_alone += len(set(weights) - set(best.tolist()))
      if valid_BT[b, t]:
        load_E[list(weights)] += 1
        f_E[best if c.topk_method == 'noaux_tc' else list(weights)] += 1
        p_E += expected_E / expected_E.sum()
    length = valid_BT[b].sum()
    loss += (E / (X * length) * f_E) @ (p_E / length)
  np.testing.assert_array_equal(seen.load_E, load_E)
  assert seen.loss == pytest.approx(loss, rel=1e-5)
  assert (chosen_by_bias_alone > 0) == (name != 'v2_lite')  # bias and groups do matter here


def test_balance_loss_of_even_and_of_collapsed_routing():
  """1 a sequence where tokens spread evenly, E / X where all choose the same."""
  c = dataclasses.replace(ROUTERS['v2_lite'], num_experts_per_tok=2)
  valid_BT = np.ones((1, 4), bool)
  even = moe.balance(jnp.full((1, 4, E), 1 / E), jnp.arange(8).reshape(1, 4, 2), valid_BT, c)
  assert even.loss == pytest.approx(1)
  collapsed = moe.balance(jnp.tile(jnp.array([0.5, 0.5] + [0.0] * 6), (1, 4, 1)), jnp.tile(jnp.arange(2), (1, 4, 1)),
                          valid_BT, c)
  assert collapsed.loss == pytest.approx(E / 2)
  off = moe.balance(jnp.full((1, 4, E), 1 / E), jnp.arange(8).reshape(1, 4, 2), valid_BT,
                    dataclasses.replace(c, aux_loss_alpha=0.0))
  assert off.loss == 0
  np.testing.assert_array_equal(off.load_E, np.ones(E))


def test_rebalance_lowers_the_loaded_and_lifts_the_idle():
  """Layer by layer, by the speed and by nothing else; an expert at the mean stays."""
  bias_LE = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
  load_LE = jnp.array([[7.0, 4.0, 1.0, 4.0], [100.0, 0.0, 0.0, 100.0]])
  moved = moe.rebalance(bias_LE, load_LE, 0.001)
  np.testing.assert_allclose(moved, [[0.499, 0.5, 0.501, 0.5], [-0.001, 0.001, 0.001, -0.001]], atol=1e-7)
  # The next choice follows: with equal scores, the idle experts win.
  ids_BTX = moe.choose(jnp.full((1, 1, 4), 0.5), moved[1], dataclasses.replace(
      V3, n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2))
  assert set(ids_BTX.ravel().tolist()) == {1, 2}


def test_no_token_is_dropped():
  """Random routing, and all tokens to one expert; the shards of an expert axis add up to the whole."""
  random = np.random.default_rng(3)
  tokens, width, hidden = 40, 8, 5
  x_MD = random.standard_normal((tokens, width)).astype(np.float32)
  wi_ED2F = random.standard_normal((E, width, 2, hidden)).astype(np.float32)
  wo_EFD = random.standard_normal((E, hidden, width)).astype(np.float32)
  weights_MX = random.random((tokens, X)).astype(np.float32)
  spread = np.stack([random.permutation(E)[:X] for _ in range(tokens)])
  alone = np.full((tokens, X), 5)  # more than any capacity factor would hold
  run = jax.jit(moe.experts)
  for ids_MX in (spread, alone):
    expected_MD = np.zeros((tokens, width))
    for m in range(tokens):
      for x in range(X):
        e = ids_MX[m, x]
        gate_F, up_F = np.einsum('d,dzf->zf', x_MD[m].astype(np.float64), wi_ED2F[e])
        expected_MD[m] += weights_MX[m, x] * (gate_F / (1 + np.exp(-gate_F)) * up_F) @ wo_EFD[e]
    ours = run(x_MD, ids_MX, weights_MX, wi_ED2F, wo_EFD, 0)
    np.testing.assert_allclose(ours, expected_MD, atol=1e-4)
    halves = [run(x_MD, ids_MX, weights_MX, wi_ED2F[h:h + 4], wo_EFD[h:h + 4], h) for h in (0, 4)]
    np.testing.assert_allclose(halves[0] + halves[1], expected_MD, atol=1e-4)
    if ids_MX is alone:
      np.testing.assert_array_equal(halves[0], 0)


@pytest.mark.parametrize(('first', 'experts', 'dense', 'moe_layers', 'routers'), [
    (0, 8, 0, 4, 5), (1, 8, 1, 3, 4), (4, 8, 4, 0, 1), (9, 8, 4, 0, 1), (1, 0, 4, 0, 0)])
def test_which_layers_are_dense(first, experts, dense, moe_layers, routers):
  """The first k; without experts all. Every MTP module of a model with experts has a router too."""
  made = config(**EXPERTS | dict(num_hidden_layers=4, first_k_dense_replace=first, n_routed_experts=experts,
                                 num_nextn_predict_layers=1))
  assert (made.num_dense_layers, made.num_moe_layers, made.num_routers) == (dense, moe_layers, routers)

"""Routers, balancing and dropless dispatch against NumPy, a token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import EXPERTS, config

from mla_jax.model import moe

B, T, D, E, X, GROUPS, KEPT = 2, 6, 16, 8, 3, 4, 2
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


@jax.jit(static_argnums=3)
def route(x_BTD, router_DE, bias_E, c):
  scores_BTE = moe.scores(x_BTD, router_DE, c.scoring_func)
  ids_BTX = moe.choose(scores_BTE, bias_E, c)
  return scores_BTE, ids_BTX, moe.weigh(scores_BTE, ids_BTX, c)

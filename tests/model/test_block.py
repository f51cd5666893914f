import jax
import numpy as np
from flax import nnx

from tests.model.model_cases import EXPERTS, Model, config


def test_unrolled_layers_are_those_of_the_loop():
  """In their order, each with its own bias: two dense and three MoE layers."""
  model = Model(config(**EXPERTS | dict(num_hidden_layers=5, first_k_dense_replace=2)))
  tokens_BT = np.random.default_rng(0).integers(0, 23, (2, 7))

  @jax.jit
  def both(params, buffers, tokens_BT):
    network = nnx.merge(model.graph, params, buffers)
    return network.hidden(tokens_BT), network.hidden(tokens_BT, unroll=True)

  looped, unrolled = both(model.params, model.buffers, tokens_BT)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), looped, unrolled)

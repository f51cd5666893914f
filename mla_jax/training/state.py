"""What a training step carries: float32 master weights, buffers, optimizer state; and how it is laid out on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mla_jax import axes
from mla_jax.config import ModelConfig, OptimizerConfig
from mla_jax.model import transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  params: dict
  buffers: dict
  optimizer: optax.OptState
  skipped: jax.Array  # int32, steps not taken because the gradient was not finite


def store_as(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
  """Keeps a transformation's float32 moments in `dtype` between steps and computes with them in float32."""

  def convert(state, to):
    return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, convert(state, jnp.float32), params)
    return updates, convert(state, dtype)

  return optax.GradientTransformation(lambda params: convert(inner.init(params), dtype), update)


def make_optimizer(o: OptimizerConfig, letters) -> optax.GradientTransformation:
  """AdamW up to the learning rate, which the step multiplies in. `letters` is the tree of weights' axis letters:
  norms (one axis) and biases (their names begin with b) don't decay."""
  def decays(path, axis_letters):
    return len(axis_letters) > 1 and not path[-1].key.startswith('b')

  adam = optax.scale_by_adam(o.beta1, o.beta2, o.epsilon)
  return optax.chain(
      optax.clip_by_global_norm(o.clip_norm),
      adam if o.moment_dtype == 'float32' else store_as(adam, jnp.dtype(o.moment_dtype)),
      optax.add_decayed_weights(o.weight_decay, mask=jax.tree_util.tree_map_with_path(decays, letters)))


def shardings(model: transformer.Split, optimizer: optax.GradientTransformation, mesh) -> TrainState:
  """Weights by the letter table, moments like their weights, the rest whole."""
  whole = NamedSharding(mesh, PartitionSpec())
  params = axes.shardings(model.params, mesh)
  shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), model.params, is_leaf=axes.is_variable)
  optimizer = optax.tree_map_params(
      optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, shapes), params, transform_non_params=lambda _: whole)
  return TrainState(params, axes.shardings(model.buffers, mesh), optimizer, whole)


def initial_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, mesh) -> TrainState:
  """Initialised where it will live: no device ever holds the whole."""
  model = transformer.abstract(config)

  def init(key):
    _, params, buffers = transformer.split(transformer.Transformer(config, key))
    return TrainState(params, buffers, optimizer.init(params), jnp.zeros((), jnp.int32))

  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=shardings(model, optimizer, mesh))(jax.random.key(seed))

"""Run by test_mesh.py in a process with eight simulated devices: loss, gradients and router-bias updates on meshes
(data x fsdp x expert, e.g. 2x2x2) against one device. Prints one JSON line a mesh."""

import json
import sys

import jax
import numpy as np
import optax

from mla_jax import axes
from mla_jax.config import MeshConfig
from mla_jax.training.state import initial_state
from mla_jax.training.step import Controls, train_step
from tests.training import small


def one_step(config, mesh):
  """With the identity as optimizer and a rate of 1, weights move by exactly their gradient."""
  optimizer = optax.identity()
  state = initial_state(config.model, optimizer, 0, mesh)
  before = jax.device_get(state.params)
  inputs = small.batch(config.training.batch_size, 24), Controls(*map(np.float32, (1.0, 0.3, 1e-3)))
  with jax.set_mesh(mesh):
    step = train_step(config, optimizer).lower(state, *inputs).compile()
    state, metrics = step(state, *inputs)
  gradients = jax.tree.map(np.subtract, before, jax.device_get(state.params))
  layouts = {jax.tree_util.keystr(path): str(leaf.sharding.spec)
             for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
  found = dict(loss=metrics['loss'], load=metrics['load_LE'], bias=state.buffers['bias_LE'])
  return jax.device_get(found), gradients, layouts, step.as_text().count(' all-gather(')


def main(accumulation: int, batch_size: int, meshes: list[str]):
  config = small.config(batch_size=batch_size, gradient_accumulation=accumulation)
  expected, gradients, _, _ = one_step(
      small.config(batch_size=batch_size), axes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  for mesh in meshes:
    data, fsdp, expert = map(int, mesh.split('x'))
    found, theirs, layouts, gathers = one_step(config, axes.make_mesh(MeshConfig(data=data, fsdp=fsdp, expert=expert)))
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12)), theirs, gradients)
    print(json.dumps(dict(
        mesh=[data, fsdp, expert], gathers=gathers, loss=abs(float(found['loss'] - expected['loss'])),
        gradient=max(jax.tree.leaves(errors)), load=bool((found['load'] == expected['load']).all()),
        bias=bool((found['bias'] == expected['bias']).all()), bias_moved=bool(np.abs(found['bias']).max() > 0),
        experts=layouts["['moe_blocks']['ffn']['wi_ED2F']"])), flush=True)


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

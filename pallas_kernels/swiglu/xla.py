"""SwiGLU in plain JAX. XLA makes one pass over memory of `forward` and, for GPUs, two of `gradients`: it cannot join
results of different widths."""

import jax
import jax.numpy as jnp


def forward(h_M2F, weights_M):
  gate_MF, up_MF = _halves(h_M2F)
  return (jax.nn.silu(gate_MF) * up_MF * weights_M[:, None]).astype(h_M2F.dtype)


def gradients(h_M2F, weights_M, dy_MF):
  # Behind the barrier, or XLA finds these activations to be the forward pass's and keeps those till now.
  h_M2F, dy_MF = jax.lax.optimization_barrier((h_M2F, dy_MF))
  gate_MF, up_MF = _halves(h_M2F)
  dy_MF = dy_MF.astype(jnp.float32)
  sigmoid_MF = jax.nn.sigmoid(gate_MF)
  silu_MF = gate_MF * sigmoid_MF
  weighted_MF = dy_MF * weights_M[:, None]
  dgate_MF = weighted_MF * up_MF * (sigmoid_MF + silu_MF * (1 - sigmoid_MF))
  dh_M2F = jnp.concatenate([dgate_MF.astype(h_M2F.dtype), (weighted_MF * silu_MF).astype(h_M2F.dtype)], axis=1)
  # Behind the barrier, or XLA for GPUs lets whoever reads a row's sum compute it, in one thread.
  return forward(h_M2F, weights_M), *jax.lax.optimization_barrier((dh_M2F, (dy_MF * silu_MF * up_MF).sum(1)))


def _halves(h_M2F):
  return (half.astype(jnp.float32) for half in jnp.split(h_M2F, 2, axis=1))

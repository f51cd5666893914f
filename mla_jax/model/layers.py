"""The small parts: normalisation, SwiGLU, initial values, dtype rules."""

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.model.fp8 import is_fp8

# Weights that stay float32 whatever the compute dtype: a bf16 router turns near-ties into other experts.
FLOAT32_WEIGHTS = ('norm', 'router')


class Buffer(nnx.Variable):
  """State that the step updates and no gradient touches: the routers' selection bias."""


def normal(key, shape: tuple[int, ...], letters: str, std: float) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=letters)


def zeros(shape: tuple[int, ...], letters: str) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape, jnp.float32), axes=letters)


def ones(width: int, letter: str) -> nnx.Param:
  return nnx.Param(jnp.ones(width, jnp.float32), axes=letter)


def cast(params, dtype):
  """Weights as the forward pass computes with them; those kept in FP8 stay so, and become `dtype` on use."""
  def one(path, w):
    name = path[-1].key
    return w if name.startswith(FLOAT32_WEIGHTS) else w.astype(dtype)
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_fp8)


def rms_norm(x, scale, epsilon: float):
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
  return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def unembed(x_BTD, w_WD):
  """Logits in float32. The gradient's matmuls run in the operands' dtype: left to itself, jax would run them in the
  float32 of the output, at a small part of a GPU's speed."""
  return jnp.einsum('BTD,WD->BTW', x_BTD, w_WD, preferred_element_type=jnp.float32)


def _unembed_forward(x_BTD, w_WD):
  return unembed(x_BTD, w_WD), (x_BTD, w_WD)


def _unembed_backward(saved, g_BTW):
  x_BTD, w_WD = saved
  g_BTW = g_BTW.astype(x_BTD.dtype)
  return jnp.einsum('BTW,WD->BTD', g_BTW, w_WD), jnp.einsum('BTW,BTD->WD', g_BTW, x_BTD)


unembed.defvjp(_unembed_forward, _unembed_backward)


def swiglu(x_BTD, wi_D2F, wo_FD):
  # Matmuls here and below keep their operands' dtype on the outside; XLA accumulates bf16 in float32 on every
  # backend. preferred_element_type=float32 would make the backward pass multiply in float32 too (see `unembed`).
  with jax.named_scope('swiglu'):
    h_BT2F = jnp.einsum('BTD,DZF->BTZF', x_BTD, wi_D2F)
    return jnp.einsum('BTF,FD->BTD', jax.nn.silu(h_BT2F[:, :, 0]) * h_BT2F[:, :, 1], wo_FD)


class SwiGLU(nnx.Module):

  def __init__(self, width: int, hidden: int, std: float, key):
    keys = jax.random.split(key)
    self.wi_D2F = normal(keys[0], (width, 2, hidden), 'D2F', std)
    self.wo_FD = normal(keys[1], (hidden, width), 'FD', std)

  def __call__(self, x_BTD):
    return swiglu(x_BTD, self.wi_D2F[...], self.wo_FD[...])

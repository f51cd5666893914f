"""The small parts: normalisation, SwiGLU, initial values, dtype rules."""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, epsilon: float):
  return _scaled(x, _inverse_rms(x, epsilon), scale)


def _inverse_rms(x, epsilon):
  x32 = x.astype(jnp.float32)
  return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)


def _scaled(x, inverse, scale):
  return (x.astype(jnp.float32) * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def _rms_norm_forward(x, scale, epsilon):
  inverse = _inverse_rms(x, epsilon)
  return _scaled(x, inverse, scale), (x, inverse, scale)


def _rms_norm_backward(epsilon, saved, g):
  """From the input and one number a row, where autodiff would keep the normalised input too."""
  del epsilon
  x, inverse, scale = saved
  g32, normal32 = g.astype(jnp.float32), x.astype(jnp.float32) * inverse
  dnormal32 = g32 * scale.astype(jnp.float32)
  dx32 = inverse * (dnormal32 - normal32 * jnp.mean(dnormal32 * normal32, axis=-1, keepdims=True))
  return dx32.astype(x.dtype), (g32 * normal32).sum(range(x.ndim - 1)).astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


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


def _activate(h_BT2F):
  gate_BTF, up_BTF = jnp.split(h_BT2F, 2, axis=-1)
  return jax.nn.silu(gate_BTF) * up_BTF


@jax.custom_vjp
def swiglu(x_BTD, wi_D2F, wo_FD):
  # Matmuls here and below keep their operands' dtype on the outside; XLA accumulates bf16 in float32 on every
  # backend. preferred_element_type=float32 would make the backward pass multiply in float32 too (see `unembed`).
  return _swiglu_forward(x_BTD, wi_D2F, wo_FD)[0]


def _swiglu_forward(x_BTD, wi_D2F, wo_FD):
  with jax.named_scope('swiglu'):
    h_BT2F = jnp.einsum('BTD,DF->BTF', x_BTD, wi_D2F.reshape(len(wi_D2F), -1))
    return jnp.einsum('BTF,FD->BTD', _activate(h_BT2F), wo_FD), (x_BTD, wi_D2F, wo_FD, h_BT2F)


def _swiglu_backward(saved, dy_BTD):
  """From gate and up, activated again; autodiff would keep the activations and what they were made of."""
  x_BTD, wi_D2F, wo_FD, h_BT2F = saved
  with jax.named_scope('swiglu'):
    a_BTF, activation_gradient = jax.vjp(_activate, h_BT2F.astype(jnp.float32))
    (dh_BT2F,) = activation_gradient(jnp.einsum('BTD,FD->BTF', dy_BTD, wo_FD).astype(jnp.float32))
    dh_BT2F = dh_BT2F.astype(h_BT2F.dtype)
    dwo_FD = jnp.einsum('BTF,BTD->FD', a_BTF.astype(h_BT2F.dtype), dy_BTD)
    dwi_D2F = jnp.einsum('BTD,BTF->DF', x_BTD, dh_BT2F).reshape(wi_D2F.shape)
    dx_BTD = jnp.einsum('BTF,DF->BTD', dh_BT2F, wi_D2F.reshape(len(wi_D2F), -1))
    return dx_BTD, dwi_D2F, dwo_FD


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class SwiGLU(nnx.Module):

  def __init__(self, width: int, hidden: int, std: float, key):
    keys = jax.random.split(key)
    self.wi_D2F = normal(keys[0], (width, 2, hidden), 'D2F', std)
    self.wo_FD = normal(keys[1], (hidden, width), 'FD', std)

  def __call__(self, x_BTD):
    return swiglu(x_BTD, self.wi_D2F[...], self.wo_FD[...])

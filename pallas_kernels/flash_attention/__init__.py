"""Softmax attention for training and prefill; the score matrix is never stored whole."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, mosaic_gpu, mosaic_tpu
from pallas_kernels.flash_attention import gpu, reference, tpu, xla


def differentiable(kernels):
  """An implementation whose gradients are a kernel of its own: `forward` and `backward`."""
  @functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
  def run(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal):
    return kernels.forward(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal)

  def forward(*args):
    o_BTNV, lse_BTN = run(*args)
    return (o_BTNV, lse_BTN), (args[:5], o_BTNV, lse_BTN)

  def backward(scale, causal, saved, cotangents):
    args, o_BTNV, lse_BTN = saved
    do_BTNV, dlse_BTN = cotangents
    return *kernels.backward(*args, scale, causal, o_BTNV, lse_BTN, do_BTNV, dlse_BTN), None, None

  run.defvjp(forward, backward)
  return run


registry = dispatch.Registry(
  'flash_attention',
  dispatch.Implementation('tpu', differentiable(tpu), ('tpu',), interpreted=mosaic_tpu.interpreted,
                          unsuitable=mosaic_tpu.unsuitable),
  dispatch.Implementation('gpu', differentiable(gpu), ('gpu',), mosaic_gpu.unavailable, unsuitable=gpu.unsuitable),
  dispatch.Implementation('xla', differentiable(xla)),
  dispatch.Implementation('reference', reference.flash_attention),
)


@registry.public
def flash_attention(q_BTNH, k_BSNH, v_BSNV, *, scale, causal=True, q_segments=None, kv_segments=None, return_lse=False,
                    implementation=None):
  """o_BTNV = softmax(scale * q k^T) v for each head, softmax in float32; H and V may differ. Differentiable.

  causal: query t sees keys s <= t + S - T, that is, the last query sees every key (chunked prefill).
  q_segments, kv_segments: int32 [B, T] and [B, S]; a query sees only keys of its own segment.
  return_lse: returns (o_BTNV, lse_BTN), lse the natural log of the sum of exp(scores), float32, differentiable too.
  A query that sees no key has o = 0, lse = -inf and zero gradients.
  implementation: None = the best for the platform, or a name of `flash_attention.implementations()`.

  Raises ValueError for shapes or names that do not fit, NotImplementedError for an implementation that cannot run here.
  """
  _check(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments)
  run = registry.choose(implementation, q_BTNH, k_BSNH, v_BSNV)
  scale = dispatch.known_number('flash_attention', 'scale', scale)
  operands = dispatch.operands(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments)
  with jax.named_scope('flash_attention'):
    o_BTNV, lse_BTN = run(*operands, scale, bool(causal))
  return (o_BTNV, lse_BTN) if return_lse else o_BTNV


def _check(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments):
  shapes = f'q {q_BTNH.shape}, k {k_BSNH.shape}, v {v_BSNV.shape}'
  if not q_BTNH.ndim == k_BSNH.ndim == v_BSNV.ndim == 4:
    raise ValueError(f'flash_attention: {shapes} must be [B, T, N, H], [B, S, N, H] and [B, S, N, V]')
  (b, t, n, h), s = q_BTNH.shape, k_BSNH.shape[1]
  if k_BSNH.shape != (b, s, n, h) or v_BSNV.shape[:3] != (b, s, n):
    raise ValueError(f'flash_attention: {shapes} must be [B, T, N, H], [B, S, N, H] and [B, S, N, V]; '
                     'repeat shared key and value heads first')
  dispatch.refuse_empty('flash_attention', q=q_BTNH, k=k_BSNH, v=v_BSNV)
  if not q_BTNH.dtype == k_BSNH.dtype == v_BSNV.dtype:
    raise ValueError(f'flash_attention: q, k, v are {q_BTNH.dtype}, {k_BSNH.dtype}, {v_BSNV.dtype}; cast to one dtype')
  if (q_segments is None) != (kv_segments is None):
    raise ValueError('flash_attention: q_segments and kv_segments go together; one of them is None')
  for name, segments, length in (('q_segments', q_segments, t), ('kv_segments', kv_segments, s)):
    if segments is not None and (segments.shape != (b, length) or not jnp.issubdtype(segments.dtype, jnp.integer)):
      raise ValueError(f'flash_attention: {name} is {segments.dtype}{list(segments.shape)} and must be integers '
                       f'[{b}, {length}]')

"""SwiGLU of rows that carry a weight each, between an expert's two matrix products, and all its backward pass needs."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, mosaic_gpu
from pallas_kernels.swiglu import gpu, reference, xla

registry = dispatch.Registry(
  'swiglu_gradients',
  dispatch.Implementation('gpu', gpu.gradients, ('gpu',), mosaic_gpu.unavailable, interpreted=mosaic_gpu.interpreted,
                          unsuitable=gpu.unsuitable),
  dispatch.Implementation('xla', xla.gradients),
  dispatch.Implementation('reference', reference.gradients),
)


def swiglu(h_M2F, weights_M):
  """silu(gate) * up * weight, [M, F] in h_M2F's dtype; a row of h_M2F is its gate, then its up. Computed in float32.

  XLA makes one pass of it on every platform, so there is no kernel; for its gradient, `swiglu_gradients`.

  Raises ValueError for shapes that do not fit.
  """
  _check('swiglu', h_M2F, weights_M)
  return xla.forward(h_M2F, weights_M)


@registry.public
def swiglu_gradients(h_M2F, weights_M, dy_MF, implementation=None):
  """(swiglu(h_M2F, weights_M) again, its gradient to h_M2F, and to weights_M in float32) for the cotangent dy_MF.

  For a backward pass that keeps h_M2F alone: a row's results depend on nothing but that row.

  implementation: None = the best for the platform, or a name of `swiglu_gradients.implementations()`.

  Raises ValueError for shapes, dtypes or names that do not fit, NotImplementedError for an implementation that cannot
  run here.
  """
  _check('swiglu_gradients', h_M2F, weights_M, dy_MF)
  if h_M2F.dtype != dy_MF.dtype or weights_M.dtype != jnp.float32:
    raise ValueError(f'swiglu_gradients: h is {h_M2F.dtype}, dy {dy_MF.dtype} and weights {weights_M.dtype}; make the '
                     'first two equal and the last float32')
  run = registry.choose(implementation, h_M2F, weights_M, dy_MF)
  with jax.named_scope('swiglu_gradients'):
    return run(*dispatch.operands(h_M2F, weights_M, dy_MF))


def _check(op, h_M2F, weights_M, dy_MF=None):
  fits = h_M2F.ndim == 2 and h_M2F.shape[1] % 2 == 0 and weights_M.shape == h_M2F.shape[:1]
  if not fits or (dy_MF is not None and dy_MF.shape != (len(h_M2F), h_M2F.shape[1] // 2)):
    last = '' if dy_MF is None else f' and dy {dy_MF.shape}'
    raise ValueError(f'{op}: h {h_M2F.shape}, weights {weights_M.shape}{last} must be [M, 2 F], [M]'
                     f'{"" if dy_MF is None else " and [M, F]"}')
  dispatch.refuse_empty(op, h=h_M2F)

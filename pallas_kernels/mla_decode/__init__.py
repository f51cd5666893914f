"""Latent attention in absorbed form over a paged cache: decoding, verification of drafts, chunked prefill."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, mosaic_gpu, mosaic_tpu
from pallas_kernels.mla_decode import gpu, reference, tpu, xla

registry = dispatch.Registry(
  'mla_decode',
  dispatch.Implementation('gpu', gpu.mla_decode, ('gpu',), mosaic_gpu.unavailable, unsuitable=gpu.unsuitable),
  dispatch.Implementation('tpu', tpu.mla_decode, ('tpu',), interpreted=mosaic_tpu.interpreted,
                          unsuitable=mosaic_tpu.unsuitable),
  dispatch.Implementation('xla', xla.mla_decode),
  dispatch.Implementation('reference', reference.mla_decode),
)


@registry.public
def mla_decode(q_BTNJ, pages_PSJ, table_BP, lengths_B, *, scale, value_width, plan=None, return_lse=False,
               implementation=None):
  """o_BTNC = softmax(scale * q c^T) c[:value_width] over the cached latents c of each sequence. Not differentiable.

  q_BTNJ: queries already absorbed, J = latent width + RoPE width; the T newest tokens of each sequence.
  pages_PSJ: the pool of cache pages. table_BP: int32, the pages of each sequence in order; entries past its last page
    are ignored. lengths_B: int32, valid keys of each sequence, its T newest included, at most max_pages * page.
  Query t sees keys < lengths_B - T + t + 1; one that sees none has o = 0 and lse = -inf. Cache rows past a sequence's
  length may hold anything, NaN included.
  plan: `make_plan(lengths_B, tokens=T, heads=N)`, made once and shared by layers; made here when None.
  return_lse: returns (o_BTNC, lse_BTN), lse the natural log of the sum of exp(scores), float32.
  implementation: None = the best for the platform, or a name of `mla_decode.implementations()`.

  Raises ValueError for shapes or names that do not fit, NotImplementedError for an implementation that cannot run here.
  """
  _check(q_BTNJ, pages_PSJ, table_BP, lengths_B, value_width)
  run = registry.choose(implementation, q_BTNJ, pages_PSJ, value_width=value_width)
  scale = dispatch.known_number('mla_decode', 'scale', scale)
  operands = dispatch.operands(q_BTNJ, pages_PSJ, table_BP, lengths_B)
  operands = dispatch.refuse_gradients('mla_decode has no gradients; flash_attention over expanded keys has', operands)
  with jax.named_scope('mla_decode'):
    o_BTNC, lse_BTN = run(*operands, plan, scale, value_width)
  return (o_BTNC, lse_BTN) if return_lse else o_BTNC


def make_plan(lengths_B, *, tokens, heads):
  """How a chip's processors share the work of `mla_decode` on these lengths, for all layers of a step. None where the
  best implementation does not split work: `plan=None` is always right, and this only saves making the plan again. A
  plan serves calls of these lengths, tokens and heads."""
  if 'gpu' in registry.implementations(dispatch.platform(lengths_B)):
    return gpu.make_plan(lengths_B, tokens * heads)
  return None


def _check(q_BTNJ, pages_PSJ, table_BP, lengths_B, value_width):
  if q_BTNJ.ndim != 4 or pages_PSJ.ndim != 3 or q_BTNJ.shape[3] != pages_PSJ.shape[2]:
    raise ValueError(f'mla_decode: q {q_BTNJ.shape} and pages {pages_PSJ.shape} must be [B, T, N, J] and [P, page, J]')
  dispatch.refuse_empty('mla_decode', q=q_BTNJ, pages=pages_PSJ, table=table_BP)
  batch, width = q_BTNJ.shape[0], q_BTNJ.shape[3]
  if not 1 <= value_width <= width:
    raise ValueError(f'mla_decode: value_width={value_width} must be between 1 and the cache width {width}')
  for name, x, shape in (('table', table_BP, (batch, *table_BP.shape[-1:])), ('lengths', lengths_B, (batch,))):
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
      wanted = f'[{batch}, max_pages]' if name == 'table' else f'[{batch}]'
      raise ValueError(f'mla_decode: {name} is {x.dtype}{list(x.shape)} and must be integers {wanted}')

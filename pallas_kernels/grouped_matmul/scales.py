"""Block scales of FP8 operands, as in DeepSeek-V3: 1x128 tiles of activations, 128x128 blocks of weights."""

import jax.numpy as jnp

BLOCK = 128


def dequantise(x, scales, blocks):
  """x * scales in float32, each scale covering a block of `blocks` elements; the last block of an axis may be cut."""
  for axis, block in enumerate(blocks):
    if block > 1:
      scales = jnp.repeat(scales, block, axis=axis, total_repeat_length=None)
  return x.astype(jnp.float32) * scales[tuple(slice(n) for n in x.shape)]

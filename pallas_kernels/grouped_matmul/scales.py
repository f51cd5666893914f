"""Block scales of FP8 operands, as in DeepSeek-V3: 1x128 tiles of activations, 128x128 blocks of weights.

A scale is |x|max / 448, the largest e4m3 number, in float32, or that rounded up to a power of two; 1 where all is zero.
It is at least 2^-126, because accelerators take smaller numbers for zero. A tile or block with a number that is not
finite has a scale of NaN, so that the damage shows in every product it enters.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn, which has no infinity: what is larger becomes NaN
FP8 = jnp.float8_e4m3fn


def quantise_tiles(x_MK, powers_of_two=False):
  """(float8_e4m3fn [M, K], float32 scales [M, ceil(K/128)]) of activations, a scale for each 128 numbers of a row.

  x is about element * scale: within 2^-4 of |x|, or scale * 2^-10 where that is more. The last tile may be cut.
  powers_of_two: round the scales up to powers of two (V3 report, section 3.3.2): multiplying with them loses nothing.
  Elements that become float32 again in the same program need `jax.lax.optimization_barrier` first: on a GPU XLA takes
  the two conversions for none. Raises ValueError unless x has two axes.
  """
  return _quantise(x_MK, (1, BLOCK), powers_of_two)


def quantise_blocks(w_GKN, powers_of_two=False):
  """(float8_e4m3fn [G, K, N], float32 scales [G, ceil(K/128), ceil(N/128)]) of weights, a scale for each 128x128.

  Precision, `powers_of_two` and errors as for `quantise_tiles`, of three axes. Blocks at the end of an axis may be cut.
  """
  return _quantise(w_GKN, (1, BLOCK, BLOCK), powers_of_two)


def quantise_rows(x_BK, rows_M, powers_of_two=False):
  """`quantise_tiles(x_BK[rows_M])`, each row of x quantised once: for the gather that sorts tokens by expert.

  A scale needs a whole tile before its first number can be divided, so XLA reads a gathered row twice, or writes it
  in between. Gathering afterwards moves one byte a number instead of two or more, and a token that goes to X experts is
  quantised once and not X times.
  """
  q_BK, scales_BT = quantise_tiles(x_BK, powers_of_two)
  return q_BK[rows_M], scales_BT[rows_M]


def quantise_tokens(x_MK, group_sizes_G, powers_of_two=False, tokens_M=None):
  """What the gradient to rhs contracts: (float8_e4m3fn [P, K], float32 scales [P/128, K]), a scale for 128 rows of one
  column and one group (1x128 tiles of the transpose; V3 report, section 3.3.1).

  Each group's rows are completed with zeros to a multiple of 128, `padded_sizes`, so that no tile has rows of two
  groups. P is the most that any sizes of sum M need; rows past the last group's are zero, whatever x has there.
  tokens_M: the row of x that each row is a copy of; None: x has the rows.
  """
  m, groups = len(x_MK if tokens_M is None else tokens_M), len(group_sizes_G)
  tiles = (m + (BLOCK - 1) * min(groups, m)) // BLOCK
  tile_T = jnp.arange(tiles)
  size_G = group_sizes_G.astype(jnp.int32)
  end_G, last_tile_G = jnp.cumsum(size_G), jnp.cumsum(padded_sizes(size_G)) // BLOCK
  group_T = jnp.minimum(jnp.searchsorted(last_tile_G, tile_T, side='right', method='compare_all'), groups - 1)
  first_T = (end_G - size_G)[group_T] + (tile_T - (last_tile_G - padded_sizes(size_G) // BLOCK)[group_T]) * BLOCK
  row_P = (first_T[:, None] + jnp.arange(BLOCK)).reshape(-1)
  mine_P = row_P < jnp.repeat(end_G[group_T], BLOCK)
  row_P = jnp.where(mine_P, row_P, 0)
  x_PK = jnp.where(mine_P[:, None], jnp.asarray(x_MK)[row_P if tokens_M is None else tokens_M[row_P]], 0)
  return _quantise(x_PK, (BLOCK, 1), powers_of_two)


def padded_sizes(group_sizes_G):
  """Rows of each group in `quantise_tokens`."""
  return -(-group_sizes_G // BLOCK) * BLOCK


def _quantise(x, blocks, powers_of_two):
  if x.ndim != len(blocks):
    raise ValueError(f'to quantise in blocks of {blocks} x must have {len(blocks)} axes, and it is {list(x.shape)}')
  split = []
  for size, block in zip(x.shape, blocks, strict=True):
    split += [-(-size // block), block]
  padding = [(0, -size % block) for size, block in zip(x.shape, blocks, strict=True)]
  # Zeros fit any scale.
  whole = jnp.pad(x, padding) if any(end for _, end in padding) else x
  values = whole.reshape(split).astype(jnp.float32)
  inside = tuple(range(1, len(split), 2))
  scales = scale_of(jnp.abs(values).max(inside, keepdims=True), powers_of_two)
  q = (values / scales).astype(FP8).reshape(whole.shape)
  return q[tuple(slice(n) for n in x.shape)], scales.squeeze(inside)


def scale_of(largest, powers_of_two):
  """The scale of numbers whose largest magnitude is `largest`, in float32."""
  scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
  if powers_of_two:
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    # A mantissa that is not zero carries into the exponent.
    scale = jax.lax.bitcast_convert_type((bits + 0x7fffff) & 0x7f800000, jnp.float32)
  scale = jnp.where(largest == 0, 1, scale)
  return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def dequantise(x, scales, blocks):
  """x * scales in float32, each scale covering a block of `blocks` elements; the last block of an axis may be cut."""
  for axis, block in enumerate(blocks):
    if block > 1:
      scales = jnp.repeat(scales, block, axis=axis, total_repeat_length=None)
  return x.astype(jnp.float32) * scales[tuple(slice(n) for n in x.shape)]

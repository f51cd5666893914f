"""FP8 weights as DeepSeek publishes them: float8_e4m3 and, for every block of 128 x 128, a factor to multiply with,
in float32 or, as ue8m0, a power of two (V3 report, section 3.3.2; README_WEIGHTS.md of deepseek-ai/DeepSeek-V3).
Blocks at the lower and right edge are cut where the matrix ends.
"""

import math

import ml_dtypes
import numpy as np

BLOCK = (128, 128)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = float(ml_dtypes.finfo(FP8).max)  # 448
SCALE_FORMATS = ('float32', 'ue8m0')
# Looking a byte up is several times faster than converting it.
VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def scale_shape(shape, block=BLOCK) -> tuple[int, ...]:
  return tuple(-(-size // width) for size, width in zip(shape, block, strict=True))


def dequantize(q_MK, scales, rows: slice, columns: slice, block, dtype) -> np.ndarray:
  """The part [rows, columns] of a matrix. `q_MK` is that part; `scales` are those of the blocks it touches."""
  out = np.empty(q_MK.shape, dtype)
  top, factor_K = rows.start // block[0], np.arange(columns.start, columns.stop) // block[1] - columns.start // block[1]
  # A row of blocks at a time: the float32 in between stays small.
  for i, scale in enumerate(scales.astype(np.float32)):
    begin = max((top + i) * block[0] - rows.start, 0)
    end = min((top + i + 1) * block[0] - rows.start, len(q_MK))
    out[begin:end] = VALUES[q_MK[begin:end].view(np.uint8)] * scale[factor_K]
  return out


def quantize(w_MK: np.ndarray, scale_format: str, block=BLOCK) -> tuple[np.ndarray, np.ndarray]:
  """(float8_e4m3 matrix, float32 scales). The scale is |w|max / 448, for ue8m0 rounded up to a power of two.

  Weights that came from FP8 by `dequantize` give the same weights again, bit for bit: where |w|max / 448 does not,
  the scale is moved within what rounding allows. Raises ValueError for weights that are not finite."""
  columns = w_MK.shape[1]
  q_MK = np.empty(w_MK.shape, FP8)
  scales = np.empty(scale_shape(w_MK.shape, block), np.float32)
  for i in range(scales.shape[0]):
    band = w_MK[i * block[0]:(i + 1) * block[0]]
    # [blocks, rows, columns of a block]; what the last one lacks is zero, which fits any scale.
    padded = np.zeros((len(band), scales.shape[1] * block[1]), w_MK.dtype)
    padded[:, :columns] = band
    w = padded.reshape(len(band), -1, block[1]).swapaxes(0, 1)
    values, scales[i] = _quantize_blocks(w, scale_format)
    q_MK[i * block[0]:(i + 1) * block[0]] = values.swapaxes(0, 1).reshape(len(band), -1)[:, :columns]
  return q_MK, scales


def _quantize_blocks(w, scale_format: str):
  """w: [blocks, rows, columns]."""
  w32 = w.astype(np.float32)
  largest = np.abs(w32).max((1, 2))
  if not np.isfinite(largest).all():
    raise ValueError('weights are not finite')
  # In float64: 448 times a subnormal scale must not be lost. A block of zeros has scale 1.
  scale = np.where(largest > 0, largest.astype(np.float64) / LARGEST, 1.0)
  if scale_format == 'ue8m0':
    scale = np.exp2(np.clip(np.ceil(np.log2(scale)), -127, 127))
    return (w32 / scale[:, None, None]).astype(FP8), scale.astype(np.float32)
  scale = np.maximum(scale, np.finfo(np.float32).tiny)
  q = (w32 / scale[:, None, None]).astype(FP8)
  return q, _settle(w, q, scale.astype(np.float32))


def _settle(w, q, scale):
  """Of the float32 scales near `scale`, one a block with which q gives exactly w, if there is one; else `scale`."""
  back = np.abs(VALUES[q.view(np.uint8)])

  def exact(chosen, which):
    return ((back[which] * chosen[:, None, None]).astype(w.dtype) == np.abs(w[which])).all((1, 2))

  wrong = np.flatnonzero(~exact(scale, slice(None)))
  if not len(wrong):
    return scale
  # |w| is what reals between `low` and `high` round to, so the scale lies between low / |q| and high / |q| for all.
  size, factor = np.abs(w[wrong].astype(np.float64)), back[wrong].astype(np.float64)
  mantissa, exponent = np.frexp(size)
  bits = ml_dtypes.finfo(w.dtype).nmant + 1
  half = np.ldexp(0.5, exponent - bits)
  there = factor > 0
  low = np.where(there, (size - np.where(mantissa == 0.5, half / 2, half)) / np.where(there, factor, 1), 0).max((1, 2))
  high = np.where(there, (size + half) / np.where(there, factor, 1), math.inf).min((1, 2))
  possible = low <= high
  wrong, low, high = wrong[possible], low[possible], high[possible]
  middle = ((low + high) / 2).astype(np.float32)
  scale = scale.copy()
  for candidate in (np.clip(scale[wrong], low, high).astype(np.float32), middle,
                    np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))):
    good = exact(candidate, wrong)
    scale[wrong[good]] = candidate[good]
  return scale

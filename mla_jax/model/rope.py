"""Rotary position embedding (arXiv 2104.09864) and YaRN (arXiv 2309.00071) with DeepSeek's two mscale factors.

Layout: a head's rope width is stored as [all first halves of the pairs, all second halves]. Published checkpoints
interleave the pairs; the converter permutes the rows once, which changes no score.
"""

import math

import jax.numpy as jnp
import numpy as np

from mla_jax.config import RopeScaling


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Radians a position, one a pair, float64."""
  plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  if not scaling.enabled:
    return plain

  def pair_turning(turns):
    """The (fractional) pair that turns this often over the original context."""
    return width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
  high = min(math.ceil(pair_turning(scaling.beta_slow)), width - 1)
  ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
  # Pairs before `low` turn often enough within the original context and are kept; those past `high` are stretched.
  return plain * (1 - ramp) + plain / scaling.factor * ramp


def rotation(positions_BT, width: int, theta: float, scaling: RopeScaling, repeats: int = 1):
  """cos and sin, float32 [B, T, width / 2], with YaRN's magnitude factor in them. The frequencies are those of
  width / repeats, all of them `repeats` times."""
  frequencies = np.tile(inverse_frequencies(width // repeats, theta, scaling), repeats)
  angle = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
  magnitude = scaling.attention_factor(scaling.mscale) / scaling.attention_factor(scaling.mscale_all_dim)
  return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(x, cos_sin):
  """x [B, T, R] or [B, T, N, R], each pair (i, i + R/2) turned by its position's angle, computed in float32."""
  cos, sin = (c if x.ndim == 3 else c[:, :, None] for c in cos_sin)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

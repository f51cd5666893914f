"""From logits to a token. Every setting is an array with one entry a row, and a row's random numbers depend on its seed
and the token's position alone: what else is in the batch changes nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.config import ConfigError

# What a random number at a position is for. A position's three are used at most once on the way to its final token.
DRAFT, ACCEPT, TOKEN = range(3)


class Sampling(NamedTuple):
  """How each row chooses. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing."""

  temperature_B: jax.Array  # float32
  top_k_B: jax.Array  # int32
  top_p_B: jax.Array  # float32
  min_p_B: jax.Array  # float32, relative to the most probable token
  seed_B: jax.Array  # uint32


def per_row(name: str, value, batch: int, dtype) -> np.ndarray:
  """A setting given once for all rows, or as one value a row. Raises ConfigError where the count is wrong."""
  values = np.asarray(value)
  if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
    raise ConfigError(f'{name} has {values.size} values for {batch} prompts; give one value, or one a prompt')
  whole = np.issubdtype(dtype, np.integer)
  if whole and values.dtype == object and all(isinstance(x, int) for x in values.flat):  # beyond NumPy's integers
    raise ConfigError(f'{name}={value!r} is out of range; use at most {np.iinfo(dtype).max}')
  if not np.issubdtype(values.dtype, np.number) or (whole and (values % 1).any()):
    raise ConfigError(f'{name}={value!r} is wrong; use {"whole numbers" if whole else "numbers"}')
  return np.broadcast_to(values, batch)


def make_sampling(batch: int, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> Sampling:
  """Checked settings, each one value or one a row. Raises ConfigError."""
  temperature = per_row('temperature', temperature, batch, np.float32)
  top_k = per_row('top_k', top_k, batch, np.int32)
  top_p = per_row('top_p', top_p, batch, np.float32)
  min_p = per_row('min_p', min_p, batch, np.float32)
  seed = per_row('seed', seed, batch, np.uint32)
  for name, values, right, limit in (
      ('temperature', temperature, (temperature >= 0) & np.isfinite(temperature), 'use 0 (greedy) or more'),
      ('top_k', top_k, (top_k >= 0) & (top_k < 2**31), f'use 0 (all tokens) to {2**31 - 1}'),
      ('top_p', top_p, (top_p > 0) & (top_p <= 1), 'use more than 0 and at most 1 (all tokens)'),
      ('min_p', min_p, (min_p >= 0) & (min_p < 1), 'use at least 0 (all tokens) and less than 1'),
      ('seed', seed, (seed >= 0) & (seed < 2**32), 'use 0 to 4294967295')):
    if not right.all():
      raise ConfigError(f'{name}={values[~right][0]} is out of range; {limit}')
  return Sampling(temperature.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32),
                  min_p.astype(np.float32), seed.astype(np.uint32))


def distribution(logits_BTW, s: Sampling):
  """What a row samples from: softmax(logits / temperature) of the top_k, then of the top_p of these, then of those at
  least min_p times as probable as the first. One-hot at the argmax where temperature is 0. Tokens as probable as the
  last one kept are kept too."""
  temperature_B11, top_p_B11, min_p_B11 = (x[:, None, None] for x in (s.temperature_B, s.top_p_B, s.min_p_B))
  greedy_B11 = temperature_B11 == 0
  # The maximum goes first, so that no temperature, however small, overflows.
  scaled_BTW = (logits_BTW - logits_BTW.max(-1, keepdims=True)) / jnp.where(greedy_B11, 1, temperature_B11)

  def filtered(scaled_BTW):
    sorted_BTW = -jnp.sort(-scaled_BTW, axis=-1)
    width = sorted_BTW.shape[-1]
    last_B = jnp.clip(jnp.where(s.top_k_B > 0, s.top_k_B, width), 1, width) - 1
    limit_BT1 = jnp.take_along_axis(sorted_BTW, jnp.broadcast_to(last_B[:, None, None], (*sorted_BTW.shape[:2], 1)), -1)
    p_BTW = jax.nn.softmax(jnp.where(sorted_BTW >= limit_BT1, sorted_BTW, -jnp.inf), axis=-1)
    # A token belongs to the top_p if those before it have less than top_p; the first (0 here) always does.
    inside_BTW = (jnp.cumsum(p_BTW, axis=-1) - p_BTW < top_p_B11) & (p_BTW > 0)
    least_BT1 = jnp.where(inside_BTW, sorted_BTW, 0).min(-1, keepdims=True)
    limit_BT1 = jnp.where(top_p_B11 < 1, least_BT1, limit_BT1)
    limit_BT1 = jnp.maximum(limit_BT1, jnp.log(min_p_B11))
    return jnp.where(scaled_BTW >= limit_BT1, scaled_BTW, -jnp.inf)

  # Sorting a vocabulary costs more than all the rest here.
  filters = ((s.top_k_B > 0) | (s.top_p_B < 1) | (s.min_p_B > 0)).any()
  scaled_BTW = jax.lax.cond(filters, filtered, lambda x: x, scaled_BTW)
  best_BTW = jax.nn.one_hot(logits_BTW.argmax(-1), logits_BTW.shape[-1])
  return jnp.where(greedy_B11, best_BTW, jax.nn.softmax(scaled_BTW, axis=-1))


def draw(p_BW, seed_B, position_B, purpose: int):
  """A token a row from (not necessarily normalised) probabilities."""
  keys_B = jax.vmap(_key, (0, 0, None))(seed_B, position_B, purpose)
  return jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BW)).astype(jnp.int32)


def uniform(seed_B, position_BT, purpose: int):
  """Float32 in [0, 1)."""
  keys_BT = jax.vmap(jax.vmap(_key, (None, 0, None)), (0, 0, None))(seed_B, position_BT, purpose)
  return jax.vmap(jax.vmap(jax.random.uniform))(keys_BT)


def _key(seed, position, purpose):
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

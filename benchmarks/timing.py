"""How long a function takes on the device that is there, and how fast that device can be."""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp


def median_seconds(function, *operand_sets, launches=20, repeats=5):
  """Seconds of one call of a compiled function: the median over repeats of launches queued back to back.

  operand_sets: tuples of operands, taken in turn. Where the operands of one call fit in the chip's cache, give so many
  sets that together they do not, or the cache is what is measured.
  """
  jax.block_until_ready([function(*operands) for operands in operand_sets])
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    for i in range(launches):
      out = function(*operand_sets[i % len(operand_sets)])
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / launches)
  return statistics.median(seconds)


def on_gpu() -> bool:
  return jax.default_backend() == 'gpu'


def hardware() -> str:
  return f'{len(jax.local_devices())} x {jax.local_devices()[0].device_kind}'


@functools.cache
def matmul_limit() -> float:
  """FLOP/s of a large bfloat16 matrix product (float32 on a CPU), measured now."""
  n, dtype = (8192, jnp.bfloat16) if jax.default_backend() != 'cpu' else (1024, jnp.float32)
  a = jax.random.normal(jax.random.key(0), (n, n), dtype)
  return 2 * n**3 / median_seconds(jax.jit(jnp.matmul), (a, a))


@functools.cache
def copy_limit() -> float:
  """Bytes/s, read and written, of a large copy, measured now."""
  n = 2**31 if jax.default_backend() != 'cpu' else 2**26
  x = jax.random.bits(jax.random.key(0), (n,), jnp.uint8)
  return 2 * n / median_seconds(jax.jit(lambda x: x ^ 1), (x,))


def print_line(**fields):
  """One JSON object on a line, numbers to four digits."""
  print(json.dumps({name: float(f'{x:.4g}') if isinstance(x, float) else x for name, x in fields.items()}), flush=True)

"""How long a function takes on the device that is there, and how fast that device can be."""

import functools
import itertools
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


def alternate(calls, *, seconds=0.1, rounds=5) -> dict[str, float]:
  """Median seconds of a call of each of {name: (call, wait)}, in rounds that alternate.

  A GPU at its power limit slows down under whatever runs, so each is measured in every state of the chip; a round is so
  many seconds of calls queued back to back, for power is averaged over milliseconds.
  """
  times = {name: [] for name in calls}
  for _ in range(rounds):
    for name, (call, wait) in calls.items():
      wait(call())
      start = time.perf_counter()
      wait(call())
      count = max(1, int(seconds / (time.perf_counter() - start)))
      start = time.perf_counter()
      for _ in range(count):
        out = call()
      wait(out)
      times[name].append((time.perf_counter() - start) / count)
  return {name: statistics.median(t) for name, t in times.items()}


def kernel_seconds(function, *operand_sets, launches=200) -> dict[str, float]:
  """Seconds of each kernel that a call launches, {name: median over the launches}, by the GPU's own clock (CUPTI).

  What the host takes to launch is not in it, which for a small call is more than the call. Before each call a buffer
  larger than the L2 is written, as triton's do_bench does, with which the field's figures are taken: the cache is cold,
  and the chip does not sit at its power limit. operand_sets: as for `median_seconds`.
  """
  from jax._src.lib import mosaic_gpu  # what jax.experimental.mosaic.gpu.profiler calls; that takes one set of operands

  def profiled(run):
    mosaic_gpu._mosaic_gpu_ext._cupti_init()
    try:
      run()
    finally:
      launched = mosaic_gpu._mosaic_gpu_ext._cupti_get_timings(True)
    times = {}
    for name, milliseconds in launched:
      times.setdefault(name, []).append(milliseconds / 1e3)
    return times

  flush = jax.jit(lambda x: x ^ 1, donate_argnums=0)
  buffer = jax.block_until_ready(flush(jnp.ones(2**28, jnp.uint8)))

  def run():
    nonlocal buffer
    for i in range(launches):
      buffer = flush(buffer)
      out = function(*operand_sets[i % len(operand_sets)])
    jax.block_until_ready((buffer, out))

  def only_flush():
    nonlocal buffer
    buffer = jax.block_until_ready(flush(buffer))

  others = profiled(only_flush)
  run()
  times = {name: t for name, t in profiled(run).items() if name not in others}
  return {name: statistics.median(t) * (len(t) / launches) for name, t in times.items()}


def relative_error(x, expected) -> float:
  """In the Euclidean norm."""
  x, expected = jnp.asarray(x, jnp.float32), jnp.asarray(expected, jnp.float32)
  return float(jnp.linalg.norm((x - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def no_torch() -> str | None:
  """Why torch cannot be timed here, in one clause, or None."""
  if not on_gpu():
    return 'jax sees none here'
  try:
    import torch
  except ImportError:
    return 'torch is not installed'
  return None if torch.cuda.is_available() else 'torch sees none'


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
  n = 2**29 if jax.default_backend() != 'cpu' else 2**24
  flip = jax.jit(lambda x: x ^ 1, donate_argnums=0)  # in place: allocating so much takes as long
  x = jax.random.bits(jax.random.key(0), (n,), jnp.uint32)

  def step():
    nonlocal x
    x = flip(x)
    return x

  return 2 * x.nbytes / median_seconds(step, ())


_lines = itertools.count()


def lines_printed() -> bool:
  return next(_lines) > 0


def print_line(**fields):
  """One JSON object on a line, numbers to four digits."""
  next(_lines)
  print(json.dumps({name: float(f'{x:.4g}') if isinstance(x, float) else x for name, x in fields.items()}), flush=True)

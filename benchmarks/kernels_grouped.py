"""grouped_matmul's part of benchmarks.kernels: forward and both gradients, with balanced and Zipf(1.0) groups.

Rounds of ours and of torch._grouped_mm, on the same arrays, alternate: a GPU at its power limit slows down under
whatever runs first.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import grouped_matmul

# Groups, rows, contraction, columns. On a CPU a small one.
SHAPES = {True: ((32, 8192, 7168, 2048), (32, 8192, 2048, 7168), (32, 32768, 7168, 4096), (64, 32768, 2048, 1408),
                 (8, 65536, 7168, 4096)),
          False: ((8, 512, 256, 128),)}


def group_sizes(groups: int, rows: int, load: str) -> np.ndarray:
  """Rows of each group: equal, or proportional to 1 / rank in a fixed random order."""
  share = np.ones(groups) if load == 'balanced' else 1 / np.arange(1, groups + 1)
  sizes = np.floor(rows * share / share.sum()).astype(np.int32)
  sizes[0] += rows - sizes.sum()
  return np.random.default_rng(0).permutation(sizes)


def run(peer: bool, only: str):
  for shape in SHAPES[timing.on_gpu()]:
    for load in ('balanced', 'zipf'):
      if only in f'{_name(*shape)} {load}':
        measure(*shape, load, peer)


def _name(groups, m, k, n):
  return f'G{groups} M{m} K{k} N{n}'


def measure(groups, m, k, n, load, peer):
  keys = jax.random.split(jax.random.key(0), 3)
  dtype = jnp.bfloat16 if timing.on_gpu() else jnp.float32
  lhs, rhs, dy = (jax.random.normal(key, shape, dtype)
                  for key, shape in zip(keys, ((m, k), (groups, k, n), (m, n)), strict=True))
  sizes = group_sizes(groups, m, load)

  def transpose(argument):
    def gradient(lhs, rhs, dy, sizes):
      return jax.vjp(lambda *x: grouped_matmul(*x, sizes), lhs, rhs)[1](dy)[argument]
    return jax.jit(gradient)

  forward, to_lhs, to_rhs = jax.jit(grouped_matmul), transpose(0), transpose(1)
  sizes_G, ready = jnp.asarray(sizes), jax.block_until_ready
  ours = {'forward': lambda: forward(lhs, rhs, sizes_G), 'gradient to lhs': lambda: to_lhs(lhs, rhs, dy, sizes_G),
          'gradient to rhs': lambda: to_rhs(lhs, rhs, dy, sizes_G)}
  theirs = {}
  if peer:
    import torch
    a, b, d = map(torch.from_dlpack, (lhs, rhs, dy))
    ends = torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(a.device)
    theirs = {'forward': lambda: torch._grouped_mm(a, b, offs=ends),
              'gradient to lhs': lambda: torch._grouped_mm(d, b.transpose(1, 2), offs=ends),
              'gradient to rhs': lambda: torch._grouped_mm(a.t(), d, offs=ends)}
  for op, call in ours.items():
    calls = {'ours': (call, ready)}
    if peer:
      calls['torch'] = theirs[op], lambda _: torch.cuda.synchronize()
    seconds = timing.alternate(calls)
    rate = {name: 2 * m * k * n / t / 1e12 for name, t in seconds.items()}
    fields = {}
    if peer:
      fields = dict(peer='torch._grouped_mm', peer_ms=seconds['torch'] * 1e3,
                    peer_over_ours=seconds['torch'] / seconds['ours'])
    timing.print_line(op='grouped_matmul', direction=op, hardware=timing.hardware(), shape=_name(groups, m, k, n),
                      load=load, implementation=grouped_matmul.implementations()[0], ms=seconds['ours'] * 1e3,
                      tflops=rate['ours'], fraction_of_matmul=rate['ours'] * 1e12 / timing.matmul_limit(), **fields)

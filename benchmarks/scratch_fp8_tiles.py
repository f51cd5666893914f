"""Scratch, for one measurement and then to be removed: FP8 forward and gradient to rhs with other tiles in turn.

  python -m benchmarks.scratch_fp8_tiles [G,M,K,N ...]
"""

import functools
import os
import sys

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp

from benchmarks import kernels_grouped, timing
from pallas_kernels import grouped_matmul, quantise_blocks, quantise_tiles
from pallas_kernels.grouped_matmul import gpu, xla
from pallas_kernels.grouped_matmul.gpu_pipeline import Tiling
from pallas_kernels.grouped_matmul.scales import quantise_tokens

TILINGS = {
  'a 128 slots5 late': dict(slots=5, columns=128),
  'b 128 slots5 buffers2 now': dict(slots=5, columns=128, late=False),
  'c 128 slots6 buffers1 now': dict(slots=6, columns=128, late=False, buffers=1),
  'd 192 slots4 buffers3 now': dict(slots=4, columns=192, late=False, buffers=3),
  'e 192 slots4 buffers1 now': dict(slots=4, columns=192, late=False, buffers=1),
  'f 192 slots5 buffers1 now': dict(slots=5, columns=192, late=False, buffers=1),
  'g 128 slots5 late, no cluster': dict(slots=5, columns=128, cluster=1),
  'h 192 slots4 buffers3 now, no cluster': dict(slots=4, columns=192, late=False, buffers=3, cluster=1),
}


TOKENS = {
  'p 128 slots5 late': dict(),
  'q 128 slots5 late, no cluster': dict(cluster=1),
  'r 128 slots5 buffers2 now': dict(late=False),
  's 128 slots6 buffers1 now': dict(late=False, slots=6, buffers=1),
}


def multiply(lhs, rhs, sizes, lhs_scales, rhs_scales, **options):
  return grouped_matmul(lhs, rhs.swapaxes(1, 2), sizes, lhs_scales, rhs_scales.swapaxes(1, 2), **options)


def compiled_with(tiling, operands):
  gpu._rows_tiling = lambda *_: tiling
  return jax.jit(lambda *x: multiply(*x)).lower(*operands).compile()


def gradient_with(options, operands):
  gpu.Tiling = lambda **chosen: Tiling(**{**chosen, **options})
  run = functools.partial(kernels_grouped._rhs_gradient, gpu, dtype=jnp.bfloat16)
  return jax.jit(run).lower(*operands).compile()


def main():
  shapes = [tuple(map(int, x.split(','))) for x in sys.argv[1:]] or [
    (32, 32768, 7168, 4096), (32, 8192, 2048, 7168), (64, 32768, 2048, 1408)]
  for groups, m, k, n in shapes:
    keys = jax.random.split(jax.random.key(0), 2)
    lhs, lhs_scales = jax.jit(quantise_tiles)(jax.random.normal(keys[0], (m, k), jnp.bfloat16))
    rhs, rhs_scales = jax.jit(quantise_blocks)(jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16))
    operands = lhs, rhs, jnp.asarray(kernels_grouped.group_sizes(groups, m, 'balanced')), lhs_scales, rhs_scales
    calls = {}
    for name, options in TILINGS.items():
      run = compiled_with(Tiling(**{'rows': 128, 'depth': 128, 'cluster': 2, **options}), operands)
      expected = functools.partial(multiply, out_dtype=jnp.float32, implementation='xla')
      timing.print_line(tiling=name, error=kernels_grouped.error(run(*operands), expected, operands))
      calls[name] = functools.partial(run, *operands), jax.block_until_ready
    tokens = jax.jit(lambda x, sizes_G: kernels_grouped._transposed(*quantise_tokens(x, sizes_G)))
    dy = jax.random.normal(keys[1], (m, n), jnp.bfloat16)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    operands = *tokens(x, operands[2]), *tokens(dy, operands[2]), operands[2]
    for name, options in TOKENS.items() if timing.on_gpu() else ():
      run = gradient_with(options, operands)
      expected = functools.partial(kernels_grouped._rhs_gradient, xla, dtype=jnp.float32)
      timing.print_line(tiling=name, error=kernels_grouped.error(run(*operands), expected, operands))
      calls[name] = functools.partial(run, *operands), jax.block_until_ready
    for name, seconds in timing.alternate(calls).items():
      timing.print_line(shape=f'G{groups} M{m} K{k} N{n}', tiling=name, ms=seconds * 1e3,
                        tflops=2 * m * k * n / seconds / 1e12)


if __name__ == '__main__':
  main()

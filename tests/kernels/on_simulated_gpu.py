"""Run by test_grouped_matmul_gpu.py in a process of its own: the Hopper kernels in Pallas' simulation of a GPU, against
the reference. It prints 'RACE DETECTED' where accesses race."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_matmul_fp8, mosaic_gpu, testing
from pallas_kernels.grouped_matmul import gpu, scales, xla
from tests.kernels import hopper_interpreter

# The simulator takes the two views of a buffer for one place, whichever warpgroup's part is meant, so races are looked
# for where no piece is written in part: here the groups are of whole pieces.
WHOLE = (
  testing.grouped_matmul_case('clusters of two', (256, 0, 256), m=768, k=128, n=256, dtype='bfloat16'),
  testing.grouped_matmul_case('no clusters', (256, 256), m=512, k=64, n=384, dtype='bfloat16'),
  testing.grouped_matmul_fp8_case('FP8', (128, 0, 128), m=384, k=256, n=128),
  testing.grouped_matmul_fp8_case('FP8, wide tiles', (128, 0, 128), m=384, k=256, n=512),
)
# Pieces past the last column, and a block of weights past the last one of an odd number.
CUT = (
  testing.grouped_matmul_fp8_case('FP8, wide tiles cut', (70, 0, 98, 9), m=197, k=128, n=448),
  testing.grouped_matmul_fp8_case('FP8, narrow tiles cut', (70, 0, 98, 9), m=197, k=128, n=320),
  testing.grouped_matmul_fp8_case('FP8, an odd number of blocks', (3, 5), m=8, k=128, n=2688),
)


def ragged_gradient_to_weights(parity):
  """The kernel itself: through the op the forward kernel would run too, which writes pieces in part. Rows of groups of
  the other parity, and of none, leave no trace."""
  rng, sizes_G = np.random.default_rng(0), jnp.array((70, 150, 131, 9, 61, 0, 95))
  group_M = np.repeat(np.arange(8), (*sizes_G, 528 - sizes_G.sum()))
  others_M1 = ((group_M % 2 != parity) | (group_M == 7))[:, None]
  operands = [jnp.asarray(rng.standard_normal((528, width)), jnp.bfloat16) for width in (128, 256)]
  lhs_MK, dy_MN = (jnp.where(others_M1, trace, x) for x, trace in zip(operands, (jnp.nan, jnp.inf), strict=True))
  with mosaic_gpu.interpreter():
    actual = jax.jit(gpu.rhs_gradient, static_argnums=3)(lhs_MK, dy_MN, sizes_G, jnp.dtype(jnp.bfloat16))
  expected = xla.rhs_gradient(*operands, sizes_G, jnp.dtype(jnp.bfloat16))
  for g in range(parity, 7, 2):
    testing.assert_close(f'gradient to rhs, group {g}', actual[g], expected[g], 5e-3)


def fp8_gradient_to_weights(cluster):
  """The kernel itself, as above; its tiles have whole pieces only."""
  rng, sizes_G = np.random.default_rng(1), jnp.array((70, 0, 131, 129))
  lhs_MK, dy_MN = (jnp.asarray(rng.standard_normal((350, width), np.float32)).at[330:].set(jnp.nan)
                   for width in (256, 128))
  operands = *scales.quantise_tokens(lhs_MK, sizes_G), *scales.quantise_tokens(dy_MN, sizes_G), sizes_G
  # Clusters are for more rows than a simulation can have.
  gpu._shared_dy = lambda *_: cluster
  with mosaic_gpu.interpreter():
    actual = jax.jit(gpu.rhs_gradient_tokens, static_argnums=5)(*operands, jnp.dtype(jnp.float32))
  expected = xla.rhs_gradient_tokens(*operands, jnp.dtype(jnp.float32))
  testing.assert_close('FP8 gradient to rhs', actual, expected, 1e-5)


def main():
  # The simulator dispatches small programs itself. Where 32 of ours are queued behind the kernel that it simulates, as
  # an op-by-op reference soon has them, jax admits no other until the kernel ends, and both wait for good.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  hopper_interpreter.refuse_stores_past_the_end(pytest.MonkeyPatch())
  for op, name in ((grouped_matmul, 'grouped_matmul'), (grouped_matmul_fp8, 'grouped_matmul_fp8')):
    for case in testing.CASES[name]:
      if 'tiles of a GPU' in case.name:
        with mosaic_gpu.interpreter(detect_races=False):
          testing.check(op, 'gpu', case)
        print(name, case, flush=True)
  for case in CUT:
    with mosaic_gpu.interpreter(detect_races=False):
      testing.check(grouped_matmul, 'gpu', case)
    print(case, flush=True)
  for case in WHOLE:
    with mosaic_gpu.interpreter():
      testing.check(grouped_matmul, 'gpu', case)
    print(case, flush=True)
  for parity in (0, 1):
    ragged_gradient_to_weights(parity)
    print('ragged gradient', parity, flush=True)
  for cluster in (1, 2):
    fp8_gradient_to_weights(cluster)
    print('FP8 gradient, clusters of', cluster, flush=True)


if __name__ == '__main__':
  main()

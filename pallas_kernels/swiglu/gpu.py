"""SwiGLU's backward pass for Hopper (Mosaic GPU) in one pass over memory: three tiles in, three out.

A program has one warpgroup and 64 rows, and walks their columns 64 at a time while TMA loads the next tiles and stores
the last ones; two programs share a multiprocessor, so that one computes while the other waits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu

TILE = 64  # rows and columns: a row of 16-bit numbers is the 128 bytes of the widest swizzle
STAGES = 2  # six tiles of 8 KB each; with three only one program fits on a multiprocessor


def unsuitable(h_M2F, weights_M, dy_MF) -> str | None:
  """What about the operands it does not serve, in one clause, or None."""
  if dy_MF.dtype.name not in ('bfloat16', 'float16'):
    return f'it takes bfloat16 or float16 and this is {dy_MF.dtype}'
  m, f = dy_MF.shape
  if m % 8 or f % TILE:  # TMA sees tiles of 8 rows
    return f'it needs M a multiple of 8 and F of {TILE} and they are {m} and {f}'
  return dispatch.divided(h_M2F, weights_M, dy_MF)


def gradients(h_M2F, weights_M, dy_MF):
  (m, f), dtype = dy_MF.shape, dy_MF.dtype
  programs = pl.cdiv(m, TILE)
  weights_M = jnp.pad(weights_M, (0, programs * TILE - m))  # TMA leaves out the rows past the end, plain loads do not
  kind = jax.typeof(dy_MF).manual_axis_type

  def result(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)

  y_MF, dh_M2F, dweights_M = plgpu.kernel(
    _body, out_type=(result((m, f), dtype), result((m, 2 * f), dtype), result(weights_M.shape, jnp.float32)),
    scratch_types=[*[mosaic_gpu.tiles(dtype, STAGES, 3, TILE, TILE)] * 2, plgpu.SMEM((TILE,), jnp.float32),
                   plgpu.Barrier(num_barriers=STAGES, num_arrivals=3)], grid=(programs,), grid_names=('program',),
    compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    kernel_name='swiglu_gradients')(h_M2F, weights_M, dy_MF)
  return y_MF, dh_M2F, dweights_M[:m]


def _body(h, weights, dy, y, dh, dweights, arrived, results, sums, ready):
  rows = pl.ds(pl.multiple_of(lax.axis_index('program') * TILE, TILE), TILE)
  f = dy.shape[1]
  steps = f // TILE
  weight = mosaic_gpu.across(plgpu.load(weights.at[rows], layout=mosaic_gpu.ROW, optimized=False), (TILE, TILE), 0)

  def columns(step, half=0):
    return pl.ds(pl.multiple_of(half * f + step * TILE, TILE), TILE)

  def fetch(step):
    slot = mosaic_gpu.slot(step, STAGES)
    for i, source in enumerate((h.at[rows, columns(step)], h.at[rows, columns(step, 1)], dy.at[rows, columns(step)])):
      plgpu.copy_gmem_to_smem(source, arrived.at[slot, i], ready.at[slot])

  def step(number, total):
    slot = mosaic_gpu.slot(number, STAGES)
    plgpu.barrier_wait(ready.at[slot])
    gate, up, dy_ = (arrived[slot, i].astype(jnp.float32) for i in range(3))
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    product, weighted = silu * up, dy_ * weight
    plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)  # the stores that left this slot before
    for i, result in enumerate((product * weight, weighted * up * (sigmoid + silu * (1 - sigmoid)), weighted * silu)):
      results[slot, i] = result.astype(y.dtype)
    plgpu.commit_smem()
    pl.when(number + STAGES < steps)(lambda: fetch(number + STAGES))
    targets = y.at[rows, columns(number)], dh.at[rows, columns(number)], dh.at[rows, columns(number, 1)]
    for i, target in enumerate(targets):
      plgpu.copy_smem_to_gmem(results.at[slot, i], target, commit_group=i == 2)
    return total + (dy_ * product).sum(1)

  for first in range(min(STAGES, steps)):
    fetch(jnp.int32(first))
  sums[...] = lax.fori_loop(0, steps, step, plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), mosaic_gpu.ROW))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(sums, dweights.at[rows])
  plgpu.wait_smem_to_gmem(0)

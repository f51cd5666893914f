"""What the Hopper kernels share: where they can run, and two instructions that Pallas does not offer."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import dispatch

OLDEST_JAX = (0, 11, 2)
STREAMING_MULTIPROCESSORS = 132  # of an H100 or H200 SXM
ROW = plgpu.Layout.WGMMA.reduce(1)


def unavailable() -> str | None:
  """Why Hopper kernels cannot run in this process, or None."""
  if jax.__version_info__ < OLDEST_JAX:
    return f'it needs jax {".".join(map(str, OLDEST_JAX))} or newer and this is {jax.__version__}'
  capability = getattr(dispatch.device(), 'compute_capability', None)  # an absent chip does not say
  if capability not in (None, '9.0'):
    return f'it is for Hopper (compute capability 9.0) and this GPU is a {dispatch.device().device_kind} ({capability})'
  return None


def opaque_zero():
  """A zero the compiler cannot see through. Indexing with it keeps wgmma descriptors, some 140 registers of them in a
  large kernel, from being hoisted out of the loop, where they would spill."""
  @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
  def zero(_):
    register = llvm.inline_asm(ir.IntegerType.get_signless(32), [], 'mov.u32 $0, 0;', '=r', has_side_effects=True)
    return mgpu.FragmentedArray.splat(register, (), is_signed=True)

  return zero()


def any_in_warp(x_M):
  """Whether any of the rows held by this warp is positive, float32 in the layout `ROW`. The answer is one in a warp and
  not in a warpgroup, so only register arithmetic may depend on it."""
  @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
  def vote(_, x):
    zero = arith.constant(ir.F32Type.get(), 0.0)
    rows = [vector.extract(r, [], [0]) for r in x.registers.flat]
    mine = functools.reduce(arith.ori, [arith.cmpf(arith.CmpFPredicate.OGT, r, zero) for r in rows])
    i32 = ir.IntegerType.get_signless(32)
    register = llvm.inline_asm(
      i32, [arith.extui(i32, mine)],
      '{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.u32 $0, 1, 0, p; }', '=r,r',
      has_side_effects=True)
    return mgpu.FragmentedArray.splat(register, (), is_signed=True)

  return vote(x_M) > 0

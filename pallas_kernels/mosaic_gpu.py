"""What the Hopper kernels share: when they can run, how work is spread over the chip, and tricks of the trade."""

import contextlib
import contextvars
import functools
import heapq
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of 16-bit operands of wgmma in shared memory
MATRIX = plgpu.Layout.WGMMA  # of a 64-row matrix in the registers of a warpgroup
ROW = plgpu.Layout.WGMMA.reduce(1)  # of one number a row of it
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # of one number a column of it
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of a running maximum: finite, so that exp2 of a masked score minus it is 0 and not NaN
LAZY = 8.0  # how far, in powers of two, a score may exceed the running maximum before that follows
_interpreting = contextvars.ContextVar('interpreting', default=False)


def unavailable() -> str | None:
  """Why Hopper kernels cannot run here, in one clause, or None."""
  if jax.__version_info__ < (0, 11, 2):
    return f'it needs jax 0.11.2 or later and this is {jax.__version__}'
  capability = getattr(dispatch.device(), 'compute_capability', '9.0')
  return None if capability == '9.0' else f'it is for Hopper, compute capability 9.0, and this GPU has {capability}'


def multiprocessors(*operands) -> int:
  """Streaming multiprocessors of the GPU that the program being traced is for; an H200's 132 where it does not say."""
  if interpreted():
    return 4
  device = dispatch.device(*operands)
  return getattr(device, 'core_count', None) or getattr(device, 'num_cores', None) or 132


@contextlib.contextmanager
def interpreter(**options):
  """Inside it programs traced for the CPU may use the Hopper kernels, which run in Pallas' simulation of a GPU.

  options: of `plgpu.InterpretGPUParams`; by default races are looked for.
  """
  token = _interpreting.set(True)
  try:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**{'detect_races': True, **options})):
      yield
  finally:
    _interpreting.reset(token)


def interpreted() -> bool:
  """Whether `interpreter` is in force."""
  return _interpreting.get()


@functools.lru_cache(maxsize=64)
def balanced_schedule(costs: tuple[int, ...], heads: int, most: int, workers: int):
  """`list_schedule` with groups of at most `most` heads, of the size that leaves the workers idle for least at the end.

  A last group of few heads starts its dearest tiles when little else is left: nine heads together instead of eight
  cost 9% of the time of 64 heads with 32 tiles each.
  """
  fewest = -(-heads // most)
  # With so many items to a worker the end hardly counts, and trying takes long.
  counts = range(fewest, 2 * fewest + 1) if heads * len(costs) <= 100 * workers else (fewest,)
  sizes = sorted({-(-heads // n) for n in counts}, reverse=True)
  return min((list_schedule(costs, heads, size, workers) for size in sizes), key=lambda schedule: max(
    sum(costs[tile] for tile, _ in own) for own in schedule))


def list_schedule(costs: tuple[int, ...], heads: int, group: int, workers: int):
  """The items (tile, head) of each worker, in order; an item costs costs[tile].

  Groups of heads come one after the other, so that the keys they share stay in L2; inside a group the dearest tiles
  come first; each item goes to the worker that is free first.
  """
  workers = min(workers, heads * len(costs))
  free = [(0, worker) for worker in range(workers)]
  items = [[] for _ in range(workers)]
  tiles = sorted(range(len(costs)), key=lambda tile: -costs[tile])
  for start in range(0, heads, group):
    for tile in tiles:
      for head in range(start, min(start + group, heads)):
        time, worker = heapq.heappop(free)
        items[worker].append((tile, head))
        heapq.heappush(free, (time + costs[tile], worker))
  return tuple(map(tuple, items))


def opaque_zero():
  """A zero that the compiler cannot see through. An index plus it keeps wgmma descriptors, some 140 registers of them,
  from being hoisted out of a loop, where they would spill."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
  def opaque(_):
    register = llvm.inline_asm(ir.IntegerType.get_signless(32), [], 'mov.u32 $0, 0;', '=r', has_side_effects=True)
    return mgpu.FragmentedArray.splat(register, (), is_signed=True)

  return opaque()


def raised(maximum_M, top_M):
  """The running maximum of scores in powers of two, top_M being the new scores'. Left alone while no score is above it
  by 2^8: weights stay below 2^8 then, which costs no precision, and the accumulator needs no rescaling
  (FlashAttention-4's rule)."""
  return jnp.where(top_M > maximum_M + LAZY, top_M, maximum_M)


def any_in_warp(x_M):
  """Whether any of the rows held by this warp is positive; x_M is float32 in the layout `ROW`. The answer is one in a
  warp and not in a warpgroup, so only register arithmetic may depend on it."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, vector

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


def slot(i, stages):
  """Where the i-th of a stream of blocks lies in a ring of buffers."""
  return lax.rem(i, jnp.int32(stages))


def tiles(dtype, *shape):
  """Shared memory for 16-bit operands of wgmma."""
  return plgpu.SMEM(shape, dtype, transforms=TILES)


def accumulator(rows, columns):
  """An accumulator of wgmma; it starts from zero unless something is stored into it first."""
  return plgpu.ACC((rows, columns), jnp.float32)


def fetch(i, stages, free, ready, *copies):
  """Loads the i-th block of a stream into its slots of rings, once the block before it there is used up.

  copies: (source in GMEM, ring in shared memory) pairs.
  """
  at = slot(i, stages)
  pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
  for source, ring in copies:
    plgpu.copy_gmem_to_smem(source, ring.at[at], ready.at[at])


def split_roles(consume, load):
  """Runs consume(0) and consume(1) in two warpgroups with most of the registers, and load() in the third."""
  warpgroup = lax.axis_index('warpgroup')

  def consumer(me):
    plgpu.set_max_registers(240, action='increase')
    consume(me)

  def loader():
    plgpu.set_max_registers(24, action='decrease')
    load()

  for me in range(2):
    pl.when(warpgroup == me)(functools.partial(consumer, me))
  pl.when(warpgroup == 2)(loader)


def zeros(*shape):
  """A float32 matrix in registers."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def across(x, shape, axis):
  """x, one number a row (axis 0) or a column (axis 1), as a matrix."""
  return lax.broadcast_in_dim(x, shape, [axis])


def wait_for(acc, in_flight):
  """The value of a wgmma accumulator, once at most `in_flight` younger products are still running.

  The barrier keeps whatever uses the value after the wait: neither LLVM nor ptxas knows that the registers change.
  """
  return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=in_flight))


def multiply_add(total, a, b):
  """total + a @ b, complete."""
  def product(acc):
    acc[...] = total
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(product, accumulator(*total.shape))


def copy_where(condition, source, target):
  """Starts the copy of source in shared memory to GMEM, uncommitted, if condition.

  A predicate rather than a branch: with dozens of branches around large arrays in registers LLVM does not finish.
  Pallas' interpreter knows branches only.
  """
  if interpreted():
    pl.when(condition)(lambda: plgpu.copy_smem_to_gmem(source, target, commit_group=False))
  else:
    plgpu.copy_smem_to_gmem(source, target, condition, commit_group=False)


def store_tile(x, staging, destination):
  """Writes a 64-row matrix from registers to GMEM, 64 columns at a time through one buffer in shared memory.

  destination(columns): the reference for a slice of columns. Rows past the end of the array are dropped by TMA.
  """
  for start in range(0, x.shape[1], 64):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = x[:, start:start + 64]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, destination(pl.ds(start, 64)))


def persistent(body, operands, outputs, scratch, programs, *, name):
  """Launches body in that many programs of three warpgroups, which stay on the chip until all work is done.

  body(*operand_refs, *output_refs, *scratch_refs). outputs: (shape, dtype) pairs; they vary over the manual mesh axes
  that the operands vary over.
  """
  axes = dispatch.varying_axes(*operands)
  operands = [dispatch.vary(x, axes) for x in operands]
  kind = jax.typeof(operands[0]).manual_axis_type
  out_type = tuple(jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in outputs)
  params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
  return plgpu.kernel(body, out_type=out_type, scratch_types=scratch, grid=(programs,), grid_names=('program',),
                      num_threads=3, thread_name='warpgroup', compiler_params=params, kernel_name=name)(*operands)

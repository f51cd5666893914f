"""What the TPU kernels share: the chip a program is for, and a `pallas_call` that knows it."""

import contextlib
import contextvars
import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

MIB = 1 << 20
_interpreting = contextvars.ContextVar('interpreting', default=False)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What kernels' tiles depend on; a block's products should outlast the fixed cost of a grid step, about 0.35 us.

  vmem: bytes of vector memory a core has. cores: TensorCores that one device drives (two on v4 and v5p).
  attention_block: queries, and keys, of a block. attention_queries: most queries whose gradient one call makes.
  matmul_unit: width of the matrix unit. matmul_rows, matmul_columns: most of a grouped matmul's tile. matmul_part: rows
  computed at a time in a tile that several groups share.
  multiplies_fp8: whether the matrix unit takes e4m3 as it is. decode_keys: cached keys a step.
  """

  vmem: int
  cores: int = 1
  attention_block: int = 512
  attention_queries: int = 1 << 30
  matmul_unit: int = 128
  matmul_rows: int = 512
  matmul_columns: int = 2048
  matmul_part: int = 128
  multiplies_fp8: bool = False
  decode_keys: int = 512


_V5E = Chip(128 * MIB)
_V5P = Chip(64 * MIB)
_V6E = Chip(128 * MIB, attention_block=1024, matmul_unit=256, decode_keys=1024)
CHIPS = {
  'TPU v5 lite': _V5E, 'TPU v5e': _V5E,
  'TPU v5': _V5P, 'TPU v5p': _V5P,
  'TPU v6 lite': _V6E, 'TPU v6e': _V6E,
  'TPU7x': Chip(64 * MIB, attention_block=1024, matmul_unit=256, multiplies_fp8=True, decode_keys=1024),
  # Interpreted: blocks so small that small arrays have several.
  'cpu': Chip(16 * MIB, attention_block=64, matmul_rows=16, matmul_columns=16,
              matmul_part=8, decode_keys=64),
}
OTHER = Chip(16 * MIB, attention_block=256, matmul_rows=256)  # TPU v4 and older


def chip(*operands) -> Chip:
  """The chip that the program being traced is for."""
  device = dispatch.device(*operands)
  found = CHIPS.get(device.device_kind, OTHER)
  return dataclasses.replace(found, cores=getattr(device, 'num_cores', None) or found.cores)


@contextlib.contextmanager
def interpreter(**options):
  """Inside it programs traced for the CPU may use the TPU kernels, which run in Pallas' simulation of a TPU's memories.

  options: of `pltpu.InterpretParams`; by default memory starts as NaN, copies land as late as they may, and races are
  looked for.
  """
  token = _interpreting.set(True)
  try:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**{'detect_races': True, **options})):
      yield
  finally:
    _interpreting.reset(token)


def interpreted() -> bool:
  """Whether `interpreter` is in force."""
  return _interpreting.get()


def unsuitable(*operands, **_) -> str | None:
  """For `dispatch.Implementation`: these kernels compute what one device holds."""
  return dispatch.divided(*operands)


def call(kernel, operands, *, out_shape, grid, in_specs, out_specs, scratch_shapes, dimensions, prefetched=0, name):
  """`pl.pallas_call` of operands, the first `prefetched` of them scalars that index maps see too.

  dimensions: 'parallel' or 'arbitrary' for each axis of the grid; cores share the parallel ones.
  out_shape: (shape, dtype) pairs; outputs vary over the manual mesh axes that the operands vary over.
  """
  axes = dispatch.varying_axes(*operands)
  operands = [dispatch.vary(x, axes) for x in operands]
  kind = jax.typeof(operands[0]).manual_axis_type
  out_shape = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in out_shape]
  params = pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=vmem_limit(chip(*operands)))
  grid_spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=prefetched, grid=grid, in_specs=in_specs,
                                           out_specs=out_specs, scratch_shapes=scratch_shapes)
  return pl.pallas_call(kernel, out_shape, grid_spec=grid_spec, compiler_params=params, name=name)(*operands)


def vmem_limit(chip: Chip) -> int:
  """Bytes a kernel may use; XLA keeps the rest."""
  return chip.vmem * 3 // 4


def dot(a, b, contract=(1, 0)):
  """float32 product of two matrices over axis contract[0] of a and contract[1] of b."""
  return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def row_of_column(x_M1):
  """[M, 1] -> [1, M] float32, by selection on the diagonal: exact, infinities included."""
  m = x_M1.shape[0]
  parts = []
  for start in range(0, m, 128):
    part_m1 = x_M1[start:start + 128]
    parts.append(jnp.where(_diagonal(part_m1.shape[0]), part_m1, 0).sum(0, keepdims=True))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def column_of_row(x_1M):
  """[1, M] -> [M, 1] float32."""
  m = x_1M.shape[1]
  parts = []
  for start in range(0, m, 128):
    part_1m = x_1M[:, start:start + 128]
    parts.append(jnp.where(_diagonal(part_1m.shape[1]), part_1m, 0).sum(1, keepdims=True))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _diagonal(m):
  return jax.lax.broadcasted_iota(jnp.int32, (m, m), 0) == jax.lax.broadcasted_iota(jnp.int32, (m, m), 1)

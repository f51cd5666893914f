"""Do the TPU kernels compile, what do they take, and what could they reach? No TPU is needed, only libtpu.

  make aot-tpu                                             # the environment, and the tests that run these cases
  .venv-tpu/bin/python -m benchmarks.tpu_compile [--chip=v5e,v5p,v6e,tpu7x] [--only=mla_decode]

Each kernel is compiled ahead of time at DeepSeek-V3's and V2-Lite's sizes for one device of each generation. A JSON
line a kernel and chip, then a table:

  vmem_mib      vector memory that the compiler gave the kernel (of the largest, where there are several), of the
                vmem_limit_mib that we let it use
  temp_mib      HBM beside arguments and results; close to 0 means that no operand was copied into another layout
  tflop, gbyte  what the task needs at least: products of visible pairs and of rows, each operand read and each result
                written once, in the kernel's dtype
  roofline_us   the larger of tflop / peak and gbyte / bandwidth, with `bound` naming it. A limit, not a prediction:
                nothing here has run on a TPU
"""

import functools
import importlib
import json
import math
import os
import re
import time
from dataclasses import dataclass

# Set before libtpu is loaded: it looks for a TPU's metadata server, and for another process that holds a TPU.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import mosaic_tpu

TOPOLOGIES = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
BF16, FP8, F32, I32 = jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32, jnp.int32
MLA, ATTENTION, MATMUL = (importlib.import_module(f'pallas_kernels.{op}.tpu')
                          for op in ('mla_decode', 'flash_attention', 'grouped_matmul'))


@dataclass(frozen=True)
class Case:
  """function(*operands) is one kernel; operands: (shape, dtype), or with the order of axes in memory as a third.

  flop, gbyte: what the task needs, see above; fp8: the products are of FP8 numbers.
  """

  name: str
  function: object
  operands: tuple
  flop: float
  gbyte: float
  fp8: bool = False

  def __str__(self):
    return self.name


def decode(name, batch, keys, heads, tokens, page=64, width=576, value_width=512):
  pages = batch * keys // page + 1
  flop = 2 * batch * tokens * heads * keys * (width + value_width)
  gbyte = (batch * keys * width + batch * tokens * heads * (width + value_width)) * 2 / 1e9
  return Case(f'mla_decode, {name}', functools.partial(MLA.mla_decode, plan=None, scale=0.1, value_width=value_width),
              (((batch, tokens, heads, width), BF16), ((pages, page, width), BF16), ((batch, keys // page), I32),
               ((batch,), I32)), flop, gbyte)


def attention(name, batch, length, heads, segments, width=192, value_width=128):
  """Forward and gradients, heads before positions in memory as the products that make q, k and v can write them."""
  def array(width, dtype=BF16):
    return (batch, length, heads, width), dtype, (0, 2, 1, 3)

  qkv = array(width), array(width), array(value_width)
  rows = (batch, length, heads), F32, (0, 2, 1)
  ids = (((batch, length), I32),) * 2 if segments else ()
  pairs = batch * heads * length * (length + 1) / 2
  q_bytes, v_bytes = (2 * batch * length * heads * w for w in (width, value_width))

  def forward(q, k, v, *ids):
    return ATTENTION.forward(q, k, v, *(ids or (None, None)), 0.1, True)

  def backward(q, k, v, o, lse, do, dlse, *ids):
    return ATTENTION.backward(q, k, v, *(ids or (None, None)), 0.1, True, o, lse, do, dlse)

  yield Case(f'flash_attention, {name}', forward, (*qkv, *ids), 2 * pairs * (width + value_width),
             (2 * q_bytes + 2 * v_bytes) / 1e9)
  yield Case(f'flash_attention gradients, {name}', backward, (*qkv, array(value_width), rows, array(value_width), rows,
             *ids), 2 * pairs * (3 * width + 2 * value_width), (4 * q_bytes + 4 * v_bytes) / 1e9)


def matmul(name, groups, rows, k, n, fp8=False):
  """Forward and both gradients, or the scaled FP8 forward and gradient to rhs."""
  lhs, rhs, dy, sizes = ((rows, k), BF16), ((groups, k, n), BF16), ((rows, n), BF16), ((groups,), I32)
  flop, gbyte = 2 * rows * k * n, 2 * (rows * (k + n) + groups * k * n) / 1e9

  def forward(lhs, rhs, sizes, *scales):
    return MATMUL.forward(lhs, rhs, sizes, *(scales or (None, None)), BF16, True)

  if fp8:
    scales = ((rows, k // 128), F32), ((groups, k // 128, n // 128), F32)
    yield Case(f'grouped_matmul FP8, {name}', forward, (((rows, k), FP8), ((groups, k, n), FP8), sizes, *scales), flop,
               (rows * k + groups * k * n + 2 * rows * n) / 1e9, fp8=True)
    tokens = (rows + 127 * groups) // 128 * 128  # groups completed to tiles
    yield Case(f'grouped_matmul FP8 gradient to rhs, {name}',
               functools.partial(MATMUL.rhs_gradient_tokens, out_dtype=BF16),
               (((tokens, k), FP8), ((tokens // 128, k), F32), ((tokens, n), FP8), ((tokens // 128, n), F32), sizes),
               flop, (rows * (k + n) + 2 * groups * k * n) / 1e9, fp8=True)
    return
  yield Case(f'grouped_matmul, {name}', forward, (lhs, rhs, sizes), flop, gbyte)
  yield Case(f'grouped_matmul gradient to lhs, {name}',
             functools.partial(MATMUL.lhs_gradient, out_dtype=BF16), (dy, rhs, sizes), flop, gbyte)
  yield Case(f'grouped_matmul gradient to rhs, {name}',
             functools.partial(MATMUL.rhs_gradient, out_dtype=BF16), (lhs, dy, sizes), flop, gbyte)


CASES = (
  decode('V3 B128 S4096 T1', 128, 4096, 128, 1),
  decode('V3 B128 S4096 T2', 128, 4096, 128, 2),
  decode('V3 B1 S32768 T8, pages of 128', 1, 32768, 128, 8, page=128),
  decode('Lite B128 S4096 T1', 128, 4096, 16, 1),
  decode('Lite B128 S4096 T2, pages of 16', 128, 4096, 16, 2, page=16),
  *attention('V3 B1 T4096', 1, 4096, 128, segments=False),
  *attention('Lite B4 T4096, packed', 4, 4096, 16, segments=True),
  *attention('128 wide B1 T8192 N16, packed', 1, 8192, 16, segments=True, width=128),
  *matmul('V3 gate and up, G32 M32768 K7168 N4096', 32, 32768, 7168, 4096),
  *matmul('V3 down, G32 M32768 K2048 N7168', 32, 32768, 2048, 7168),
  *matmul('V3 gate and up decoding, G32 M256 K7168 N4096', 32, 256, 7168, 4096),
  *matmul('Lite gate and up, G64 M32768 K2048 N2816', 64, 32768, 2048, 2816),
  *matmul('Lite down, G64 M32768 K1408 N2048', 64, 32768, 1408, 2048),
  *matmul('V3 gate and up, G32 M32768 K7168 N4096', 32, 32768, 7168, 4096, fp8=True),
  *matmul('Lite down, G64 M32768 K1408 N2048', 64, 32768, 1408, 2048, fp8=True),
)


@functools.cache
def topology(chip: str):
  """An absent TPU's devices. Asked for once: to jax the devices of another answer are other devices."""
  return topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[chip])


@functools.cache
def mesh(chip: str) -> Mesh:
  """One device of an absent TPU."""
  return Mesh(np.array(topology(chip).devices[:1]), ('device',), axis_types=(AxisType.Auto,))


def compile_for(chip: str, function, operands):
  return lower_for(chip, function, operands).compile()


def lower_for(chip: str, function, operands):
  """The program, yet to be compiled; operands lie in row-major order unless they name another."""
  def abstract(shape, dtype, order=None):
    layout = Layout(order or tuple(range(len(shape))))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(layout, NamedSharding(mesh(chip), PartitionSpec())))

  with jax.set_mesh(mesh(chip)):
    # A new function: jax would return what it traced for another chip. Results lie as the kernel writes them.
    run = jax.jit(lambda *x: function(*x), out_shardings=Format(Layout.AUTO))
    return run.lower(*(abstract(*x) for x in operands))


def vmem_mib(compiled) -> float:
  """What the compiled program's custom calls say that they use."""
  used = r'tpu_custom_call.*"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"}\]'
  sizes = re.findall(used, compiled.as_text())
  return round(max(map(int, sizes)) / mosaic_tpu.MIB, 1)


def measure(chip: str, case: Case) -> dict:
  start = time.perf_counter()
  compiled = compile_for(chip, case.function, case.operands)
  seconds = time.perf_counter() - start
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  with jax.set_mesh(mesh(chip)):
    info = pltpu.get_tpu_info()
    limit = mosaic_tpu.vmem_limit(mosaic_tpu.chip())
    fp8 = case.fp8 and mosaic_tpu.chip().multiplies_fp8
  peak = info.num_cores * (info.fp8_ops_per_second if fp8 else info.bf16_ops_per_second)
  compute, memory = case.flop / peak, case.gbyte * 1e9 / (info.num_cores * info.mem_bw_bytes_per_second)
  return {'kernel': case.name, 'chip': chip, 'compile_seconds': round(seconds, 1), 'vmem_mib': vmem_mib(compiled),
          'vmem_limit_mib': limit // mosaic_tpu.MIB, 'temp_mib': round(temporaries / mosaic_tpu.MIB),
          'tflop': round(case.flop / 1e12, 3), 'gbyte': round(case.gbyte, 3),
          'roofline_us': round(1e6 * max(compute, memory)), 'bound': 'compute' if compute > memory else 'memory'}


def table(rows) -> str:
  """Markdown: a line a kernel, "VMEM MiB, temporaries MiB, roofline us and what bounds it" for each chip."""
  chips = list(dict.fromkeys(row['chip'] for row in rows))
  out = [f'| kernel | {" | ".join(chips)} |', '|---' * (len(chips) + 1) + '|']
  for name in dict.fromkeys(row['kernel'] for row in rows):
    cells = (f'{math.ceil(row["vmem_mib"])}; {row["temp_mib"]}; {row["roofline_us"]} {row["bound"][0]}'
             for row in rows if row['kernel'] == name)
    out.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(out)


def main(_):
  rows = []
  for case in CASES:
    if _ONLY.value in case.name:
      for chip in _CHIP.value:
        rows.append(measure(chip, case))
        print(json.dumps(rows[-1]), flush=True)
  print(table(rows))


if __name__ == '__main__':
  _CHIP = flags.DEFINE_list('chip', list(TOPOLOGIES), 'generations to compile for')
  _ONLY = flags.DEFINE_string('only', '', 'cases whose name holds this')
  app.run(main)

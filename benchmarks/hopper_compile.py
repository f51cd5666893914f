"""Do the Hopper kernels compile, and do their registers suffice? No GPU is needed, only jax's CUDA plugin.

  make aot-hopper                                          # the environment, and the tests that run these cases
  .venv-hopper/bin/python -m benchmarks.hopper_compile [--only=mla_decode]

Each kernel is compiled to machine code for an absent H200, whose description `h200.txtpb` is (printed by one, through
`xla_client.get_topology_for_devices`). A JSON line a case: for each of its kernels the registers a thread and the bytes
spilled to memory, and whether the assembler made products wait for each other.
"""

import functools
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'  # the assembler's report, on the process's output

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import flash_attention, grouped_matmul, grouped_matmul_fp8, mla_decode, swiglu_gradients

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


@dataclass(frozen=True)
class Case:
  """function(*operands) holds the kernels; operands: (shape, dtype). spills: bytes stored that a kernel may, if any."""

  name: str
  function: object
  operands: tuple
  spills: dict = field(default_factory=dict)

  def __str__(self):
    return self.name


def decode(name, batch, keys, heads, tokens, page=64, value_width=512, spills=0):
  width = value_width + 64
  return Case(f'mla_decode, {name}',
              functools.partial(mla_decode, scale=0.1, value_width=value_width, implementation='gpu'),
              (((batch, tokens, heads, width), BF16), ((batch * keys // page + 1, page, width), BF16),
               ((batch, keys // page), I32), ((batch,), I32)), {'mla_decode': spills})


def attention(name, t, s, heads, width, value_width, causal=True, segmented=False, spills=None):
  """Forward and both kernels of the gradients."""
  def loss(q, k, v, *ids):
    ids = dict(zip(('q_segments', 'kv_segments'), ids, strict=True)) if segmented else {}
    o, lse = flash_attention(q, k, v, scale=0.1, causal=causal, return_lse=True, implementation='gpu', **ids)
    return o.astype(F32).sum() + lse.sum()

  ids = (((2, t), I32), ((2, s), I32)) if segmented else ()
  operands = ((2, t, heads, width), BF16), ((2, s, heads, width), BF16), ((2, s, heads, value_width), BF16), *ids
  return Case(f'flash_attention, {name}', jax.grad(loss, (0, 1, 2)), operands, spills or {})


def grouped(name, groups, m, k, n, out=BF16):
  """Forward, and the gradients' kernels."""
  multiply = functools.partial(grouped_matmul, out_dtype=out, implementation='gpu')
  operands = ((m, k), BF16), ((groups, k, n), BF16), ((groups,), I32)

  def gradients(lhs, rhs, sizes, dy):
    return jax.vjp(lambda *x: multiply(*x, sizes), lhs, rhs)[1](dy)

  return (Case(f'grouped_matmul, {name}', multiply, operands),
          Case(f'grouped_matmul, {name}, gradients', gradients, (*operands, ((m, n), out))))


# Bytes that FP8 tiles 256 columns wide may spill: numbers of a tile or of the launch, none in the loop over steps.
FP8_SPILLS = {'grouped_matmul': 8}


def grouped_fp8(name, groups, m, k, n):
  """Weights stored with the contraction innermost."""
  def multiply(lhs, rhs_GNK, *rest):
    return grouped_matmul(lhs, rhs_GNK.swapaxes(1, 2), *rest, implementation='gpu')

  return Case(f'grouped_matmul, {name}, FP8', multiply,
              (((m, k), jnp.float8_e4m3fn), ((groups, n, k), jnp.float8_e4m3fn), ((groups,), I32),
               ((m, k // 128), F32), ((groups, k // 128, -(-n // 128)), F32)), FP8_SPILLS)


def swiglu(name, m, f):
  return Case(f'swiglu_gradients, {name}', functools.partial(swiglu_gradients, implementation='gpu'),
              (((m, 2 * f), BF16), ((m,), F32), ((m, f), BF16)))


def quantising(name, groups, m, k, n, weights=BF16):
  """Forward and both gradients of operands that are quantised on the way."""
  def gradients(lhs, rhs, sizes, dy):
    y, transpose = jax.vjp(lambda *x: grouped_matmul_fp8(*x, sizes, implementation='gpu'), lhs, rhs)
    return y, transpose(dy)

  return Case(f'grouped_matmul_fp8, {name}, forward and gradients', gradients,
              (((m, k), BF16), ((groups, k, n), weights), ((groups,), I32), ((m, n), BF16)), FP8_SPILLS)


DKV = 'flash_attention_dkv'
CASES = (
  # Of what dkv spills, nothing lies in the loop over blocks that need no mask.
  attention('V3', 4096, 4096, 128, 192, 128, spills={DKV: 184}),
  attention('Lite, packed documents', 4096, 4096, 16, 192, 128, segmented=True,
            spills={'flash_attention_forward': 32, DKV: 224}),
  attention('chunked prefill, odd lengths', 1000, 4093, 16, 192, 128, spills={DKV: 184}),
  attention('equal widths', 2048, 2048, 32, 128, 128),
  attention('narrow, all keys', 77, 300, 4, 64, 64, causal=False),
  *grouped('V3 gate and up', 32, 32768, 7168, 4096),
  *grouped('V3 down', 32, 8192, 2048, 7168),
  *grouped('Lite gate', 64, 32768, 2048, 1408),
  *grouped('float32 result, odd rows', 8, 1001, 192, 320, F32),
  grouped_fp8('V3 gate and up', 32, 32768, 7168, 4096),
  grouped_fp8('Lite down', 64, 32768, 1408, 2048),
  swiglu('Lite', 196608, 1408),
  swiglu('a cut tile', 1000, 192),
  quantising('V3 gate and up', 32, 32768, 7168, 4096),
  quantising('Lite down, float32 weights', 64, 32768, 1408, 2048, F32),
  decode('V3, one token', 128, 4096, 128, 1),
  decode('V3, two tokens', 128, 4096, 128, 2),
  decode('Lite, one token', 128, 4096, 16, 1),
  decode('64 heads, three tokens', 2, 8192, 64, 3),
  decode('narrow latent, odd heads', 3, 256, 5, 2, value_width=256),
  decode('pages of 128', 4, 1024, 16, 8, page=128),
  # The loading warpgroup's addresses do not all fit; it waits for memory anyway.
  decode('pages of 32', 4, 1024, 128, 1, page=32, spills=64),
  decode('pages of 16', 4, 1024, 128, 2, page=16, spills=64),
)


@functools.cache
def _sharding():
  description = pathlib.Path(__file__).with_name('h200.txtpb').read_text()
  topology = topologies.get_topology_desc(platform='cuda', topology_name='h200', target_config=description,
                                          topology='1x1x1')
  return NamedSharding(Mesh(np.array(topology.devices), ('device',), axis_types=(AxisType.Auto,)), PartitionSpec())


def compile_case(case: Case) -> dict:
  """Compiles for an H200; returns what the assembler reported of each kernel.

  Raises RuntimeError if no report came: jax's CUDA plugin prints it, and a cached program has none.
  """
  operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding()) for shape, dtype in case.operands]
  start = time.perf_counter()
  with _output() as report, jax.set_mesh(_sharding().mesh):
    jax.jit(case.function).lower(*operands).compile()
  text = report()
  kernels = re.findall(r'Function properties for (\w+?)(?:_mosaic_gpu_kernel)?\n.*?(\d+) bytes spill stores', text)
  registers = re.findall(r'Used (\d+) registers', text)
  if not kernels:
    raise RuntimeError(f'{case}: the assembler reported nothing; it said {text[-300:]!r}')
  spilled = {name: max(int(stored) for other, stored in kernels if other == name) for name, _ in kernels}
  return dict(case=case.name, spilled_bytes=spilled,
              registers=max(map(int, registers)), serialized='serialized' in text, seconds=time.perf_counter() - start)


class _output:
  """What this process, C++ included, prints to its two streams while the context is open."""

  def __enter__(self):
    sys.stdout.flush(), sys.stderr.flush()
    self._file = tempfile.TemporaryFile()
    self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    for fd, _ in self._saved:
      os.dup2(self._file.fileno(), fd)
    return self._read

  def __exit__(self, *_):
    for fd, saved in self._saved:
      os.dup2(saved, fd)
      os.close(saved)
    self._file.seek(0)
    self._text = self._file.read().decode(errors='replace')
    self._file.close()

  def _read(self) -> str:
    return self._text


def main(_):
  for case in CASES:
    if ONLY.value in case.name:
      print(json.dumps(dict(jax=jax.__version__, **compile_case(case))), flush=True)


if __name__ == '__main__':
  ONLY = flags.DEFINE_string('only', '', 'Cases whose name holds this')
  app.run(main)

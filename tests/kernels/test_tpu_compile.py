"""The TPU kernels compiled ahead of time for absent TPUs, at the models' sizes. Needs libtpu: `make aot-tpu`."""

import importlib.util
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import tpu_compile as bench
from mla_jax import axes
from mla_jax.config import MeshConfig
from mla_jax.model.attention import attend
from mla_jax.model.moe import dispatch as experts_of_all_devices
from pallas_kernels import flash_attention, grouped_matmul, grouped_matmul_fp8, mla_decode, mosaic_tpu

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                     reason='libtpu is not installed here; `make aot-tpu` does, in .venv-tpu, and runs these tests'),
]
CHIPS = tuple(bench.TOPOLOGIES)


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('case', bench.CASES, ids=str)
def test_kernel_fits(chip, case):
  compiled = bench.compile_for(chip, case.function, case.operands)  # raises where VMEM does not suffice
  memory = compiled.memory_analysis()
  # No operand is copied into another layout; the scales of FP8 blocks are spread over columns.
  allowed = 0.01 * memory.argument_size_in_bytes + (2**20 if not case.fp8 else 2**26) + 2**23
  assert memory.temp_size_in_bytes <= allowed
  with jax.set_mesh(bench.mesh(chip)):
    assert bench.vmem_mib(compiled) <= mosaic_tpu.vmem_limit(mosaic_tpu.chip()) / mosaic_tpu.MIB


def attention_loss(q_BTNH, k_BTNH, v_BTNV, ids_BT):
  o_BTNV, lse_BTN = flash_attention(q_BTNH, k_BTNH, v_BTNV, scale=0.1, q_segments=ids_BT, kv_segments=ids_BT,
                                    return_lse=True)
  return o_BTNV.astype(jnp.float32).sum() + lse_BTN.sum()


def matmul_loss(lhs_MK, rhs_GKN, sizes_G):
  return grouped_matmul(lhs_MK, rhs_GKN, sizes_G).astype(jnp.float32).sum()


def fp8_loss(lhs_BK, rhs_GKN, sizes_G, order_M):
  return grouped_matmul_fp8(lhs_BK, rhs_GKN, sizes_G, order_M).astype(jnp.float32).sum()


def attention_operands(batch, length, dtype, width=192, value_width=128):
  return (((batch, length, 16, width), dtype), ((batch, length, 16, width), dtype),
          ((batch, length, 16, value_width), dtype), ((batch, length), bench.I32))


PROGRAMS = {
  # Lengths that fill no block, widths that fill no lane, a dtype twice as wide.
  'attention, odd length': (jax.grad(attention_loss, (0, 1, 2)), attention_operands(2, 1000, bench.BF16), 2),
  'attention, narrow float32': (jax.grad(attention_loss, (0, 1, 2)), attention_operands(1, 600, bench.F32, 48, 32), 2),
  # More queries than VMEM holds the gradients of.
  'attention, 16k': (jax.grad(attention_loss, (0, 1, 2)), attention_operands(1, 16384, bench.BF16), 3),
  'grouped matmul, Lite': (jax.grad(matmul_loss, (0, 1)), (((4096, 2048), bench.BF16), ((64, 2048, 2816), bench.BF16),
                                                           ((64,), bench.I32)), 2),
  'grouped matmul, odd float32': (jax.grad(matmul_loss, (0, 1)), (((100, 200), bench.F32), ((3, 200, 72), bench.F32),
                                                                  ((3,), bench.I32)), 2),
  'grouped matmul, few rows': (matmul_loss, (((3, 2048), bench.BF16), ((64, 2048, 2816), bench.BF16),
                                             ((64,), bench.I32)), 1),
  'quantising grouped matmul, Lite': (
    jax.value_and_grad(fp8_loss, (0, 1)),
    (((4096, 2048), bench.BF16), ((64, 2048, 2816), bench.F32), ((64,), bench.I32), ((24576,), bench.I32)), 3),
  'quantising grouped matmul, odd widths': (
    jax.value_and_grad(fp8_loss, (0, 1)),
    (((100, 200), bench.F32), ((3, 200, 72), bench.F32), ((3,), bench.I32), ((300,), bench.I32)), 3),
  'decode, narrow float32': (
    lambda *x: mla_decode(*x, scale=0.1, value_width=32),
    (((3, 2, 4, 40), bench.F32), ((20, 16, 40), bench.F32), ((3, 5), bench.I32), ((3,), bench.I32)), 1),
  'decode, float32 queries': (
    lambda *x: mla_decode(*x, scale=0.1, value_width=512),
    (((3, 1, 16, 576), bench.F32), ((20, 32, 576), bench.BF16), ((3, 5), bench.I32), ((3,), bench.I32)), 1),
  'prefill through decode': (
    lambda *x: mla_decode(*x, scale=0.1, value_width=512),
    (((2, 256, 16, 576), bench.BF16), ((99, 64, 576), bench.BF16), ((2, 40), bench.I32), ((2,), bench.I32)), 1),
}


@pytest.mark.parametrize(('name', 'chip'), [
  (name, chip) for name in PROGRAMS for chip in CHIPS if name != 'attention, 16k' or chip == 'v5p'])
def test_public_op_compiles(name, chip):
  function, operands, kernels = PROGRAMS[name]
  lowered = bench.lower_for(chip, function, operands)
  # Counted before compiling: what XLA makes of a gather for v5p's SparseCores it cannot print.
  assert lowered.as_text().count('@tpu_custom_call') == kernels
  lowered.compile()


@pytest.mark.parametrize('name', ['attention', 'grouped matmul', 'decode'])
def test_inside_shard_map(name):
  """Four devices, each its own batch; check_vma needs each kernel's outputs to say what they vary over."""
  devices = bench.topology('v5e').devices
  mesh = Mesh(devices, ('data',), axis_types=(AxisType.Auto,))
  rows, everywhere = P('data'), P()

  def attention(*x):
    return jax.grad(attention_loss, (0, 1, 2))(*x)

  def matmul(*x):
    return jax.grad(matmul_loss, (0, 1))(*x)

  def decode(*x):
    return mla_decode(*x, scale=0.1, value_width=512)

  function, operands, in_specs, out_specs = {
    'attention': (attention, attention_operands(4, 512, bench.BF16), (rows,) * 4, (rows,) * 3),
    'grouped matmul': (matmul, (((1024, 256), bench.BF16), ((8, 256, 512), bench.BF16), ((32,), bench.I32)),
                       (rows, everywhere, rows), (rows, everywhere)),
    'decode': (decode, (((8, 2, 16, 576), bench.BF16), ((99, 64, 576), bench.BF16), ((8, 40), bench.I32),
                        ((8,), bench.I32)), (rows, everywhere, rows, rows), rows),
  }[name]
  operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
              for (shape, dtype), spec in zip(operands, in_specs, strict=True)]
  with jax.set_mesh(mesh):
    run = jax.jit(jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=True))
    assert 'tpu_custom_call' in run.lower(*operands).as_text()
    run.lower(*operands).compile()


def test_the_model_uses_the_kernels_on_a_mesh(caplog):
  """Attention and experts as a training step calls them, on four devices, gradients included."""
  caplog.set_level(logging.INFO, 'pallas_kernels')
  mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, expert=2), bench.topology('v5p').devices[:4])
  rows, experts = P(axes.TABLE['B']), P('expert')
  arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in (
    ((8, 512, 4, 192), bench.BF16, rows), ((8, 512, 4, 128), bench.BF16, rows), ((8, 512), bench.I32, rows),
    ((8, 512, 256), bench.BF16, rows), ((8, 512, 2), bench.I32, rows), ((8, 512, 2), bench.F32, rows),
    ((8, 256, 2, 128), bench.BF16, experts), ((8, 128, 256), bench.BF16, experts))]

  def loss(qk, v, x, weights, wi, wo, segments, ids):
    return (attend(qk, qk, v, segments, segments, 0.1).astype(jnp.float32).sum()
            + experts_of_all_devices(x, ids, weights, wi, wo).astype(jnp.float32).sum())

  qk, v, segments, x, ids, weights, wi, wo = arrays
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, range(6))).lower(qk, v, x, weights, wi, wo, segments, ids)
    lowered.compile()
  # Attention: forward and gradients; experts: two products, four gradients.
  assert lowered.as_text().count('@tpu_custom_call') >= 2 + 6 - 1
  portable = [line for line in caplog.text.splitlines() if ' xla on ' in line]
  assert all('swiglu_gradients: ' in line for line in portable), portable  # the one without a TPU kernel

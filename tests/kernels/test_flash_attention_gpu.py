"""The Hopper kernels on a GPU where there is one, and interpreted on the CPU."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import flash_attention, mosaic_gpu, testing
from pallas_kernels.flash_attention import differentiable, gpu, gpu_tiles
from tests.kernels import hopper_interpreter

NEEDS_JAX = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason='Hopper kernels need jax 0.11.2')
KERNELS = differentiable(gpu)


def served(case):
  shapes = jax.eval_shape(lambda: {name: None if x is None else jnp.asarray(x)
                                   for name, x in case.arrays(np.random.default_rng(0)).items()})
  return gpu.unsuitable(shapes['q_BTNH'], shapes['k_BSNH'], shapes['v_BSNV']) is None


CASES = [case for case in testing.CASES['flash_attention'] if served(case)]


def interpreted(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal, return_lse, implementation):
  """`flash_attention`, but 'gpu' needs no GPU."""
  if implementation == 'gpu':
    return KERNELS(q_BTNH, k_BSNH, v_BSNV, q_segments, kv_segments, scale, causal)
  return flash_attention(q_BTNH, k_BSNH, v_BSNV, scale=scale, causal=causal, q_segments=q_segments,
                         kv_segments=kv_segments, return_lse=return_lse, implementation=implementation)


@pytest.mark.skipif('gpu' not in flash_attention.implementations(),
                    reason=f'flash_attention on a Hopper GPU: {flash_attention.unavailable().get("gpu")}')
@pytest.mark.parametrize('case', CASES, ids=str)
def test_matches_reference_on_a_gpu(case):
  testing.check(flash_attention, 'gpu', case)


@NEEDS_JAX
@pytest.mark.long
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_matches_reference(case, monkeypatch):
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    testing.check(interpreted, 'gpu', case)
    assert not races_found()


@NEEDS_JAX
@pytest.mark.long
def test_interpreter_finds_a_planted_race(monkeypatch):
  monkeypatch.setattr(mosaic_gpu.plgpu, 'commit_smem', lambda: None)  # results leave before they are written
  x = jnp.ones((1, 75, 1, 64), jnp.bfloat16)
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    jax.block_until_ready(jax.jit(lambda x: gpu.forward(x, x, x, None, None, 0.1, False))(x))
    assert races_found()


@pytest.mark.parametrize(('dtype', 'widths', 'length', 'reason'), [
  ('bfloat16', (192, 128), 8, None),
  ('bfloat16', (64, 64), 1, None),
  ('float32', (192, 128), 8, 'it takes bfloat16 and these are float32'),
  ('bfloat16', (192, 192), 8, 'it takes widths 64, 128 or 192 of q with 64 or 128 of v, and these are 192 and 192'),
  ('bfloat16', (24, 16), 8, 'it takes widths 64, 128 or 192 of q with 64 or 128 of v, and these are 24 and 16'),
])
def test_operands_it_takes(dtype, widths, length, reason):
  q, k, v = (jax.ShapeDtypeStruct((2, length, 3, width), dtype) for width in (widths[0], *widths))
  assert gpu.unsuitable(q, k, v) == reason


@NEEDS_JAX
def test_other_operands_fall_back_or_raise(caplog):
  caplog.set_level(logging.INFO, 'pallas_kernels')
  x = jnp.ones((1, 4, 1, 64))
  hopper = jax.sharding.AbstractDevice(device_kind='NVIDIA H200', num_cores=132, platform='cuda')
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), (AxisType.Auto,), abstract_device=hopper)):
    def run(implementation):
      return jax.make_jaxpr(lambda x: flash_attention(x, x, x, scale=1.0, implementation=implementation))(x)

    assert 'pallas' not in str(run(None))
    assert 'gpu: it takes bfloat16 and these are float32' in caplog.text
    with pytest.raises(NotImplementedError, match=r"'gpu' cannot run: it takes bfloat16.*here it can be None, 'xla'"):
      run('gpu')


@pytest.mark.parametrize(('costs', 'heads', 'group', 'workers'), [
  ((5, 1, 3), 4, 2, 3), ((1,), 1, 1, 132), ((2, 9), 7, 3, 5)])
def test_schedule_gives_every_item_once_and_evenly(costs, heads, group, workers):
  schedule = mosaic_gpu.list_schedule(costs, heads, group, workers)
  items = [item for own in schedule for item in own]
  assert sorted(items) == [(tile, head) for tile in range(len(costs)) for head in range(heads)]
  loads = [sum(costs[tile] for tile, _ in own) for own in schedule]
  assert len(schedule) == min(workers, len(items))
  assert max(loads) - min(loads) <= max(costs)
  for own in schedule:
    groups = [head // group for _, head in own]
    assert groups == sorted(groups)


@pytest.mark.parametrize(('batch', 'heads', 'length'), [(2, 128, 4096), (1, 128, 8192), (4, 16, 4096)])
@pytest.mark.parametrize(('side', 'block'), [('queries', 128), ('queries', 64), ('keys', 64)])
def test_an_h200_is_kept_busy(batch, heads, length, side, block):
  call = gpu_tiles.Attention(batch, heads, length, length, 192, 128, 0.1, True, False)
  table, counts = (np.asarray(x) for x in call.work(side, block))
  busy = [table[row, :count, 4].sum() + count for row, count in enumerate(counts)]
  assert len(busy) == 132
  assert np.mean(busy) >= 0.99 * max(busy)

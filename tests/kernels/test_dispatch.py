import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import (
  dispatch,
  flash_attention,
  grouped_matmul,
  grouped_matmul_fp8,
  mla_decode,
  swiglu_gradients,
)
from pallas_kernels.flash_attention import gpu as flash_attention_gpu
from pallas_kernels.grouped_matmul import gpu as grouped_matmul_gpu
from pallas_kernels.mla_decode import gpu as mla_decode_gpu
from pallas_kernels.swiglu import gpu as swiglu_gpu

OPS = (flash_attention, grouped_matmul, grouped_matmul_fp8, mla_decode, swiglu_gradients)


def absent(platform):
  device = jax.sharding.AbstractDevice(device_kind='not here', num_cores=None, platform=platform)
  return jax.sharding.use_abstract_mesh(AbstractMesh((4,), ('data',), (AxisType.Auto,), abstract_device=device))


def registry():
  return dispatch.Registry(
    'op',
    dispatch.Implementation('tpu', 'on a TPU', ('tpu',)),
    dispatch.Implementation('gpu', 'on a GPU', ('gpu',), lambda: 'it needs jax 99'),
    dispatch.Implementation('xla', 'anywhere'),
  )


@pytest.mark.parametrize('op', OPS)
def test_every_op_lists_what_it_can_use(op):
  assert {'xla', 'reference'} <= set(op.implementations())
  assert not set(op.unavailable()) & set(op.implementations())


@pytest.mark.parametrize(('unsuitable', 'shapes', 'facts'), [
  (flash_attention_gpu.unsuitable, ((2, 8, 2, 192), (2, 8, 2, 192), (2, 8, 2, 128)), {}),
  (grouped_matmul_gpu.unsuitable, ((8, 64), (2, 64, 64)), {}),
  (grouped_matmul_gpu.unsuitable_quantised, ((8, 128), (2, 128, 128)), {}),
  (mla_decode_gpu.unsuitable, ((2, 1, 16, 192), (4, 64, 192)), {'value_width': 128}),
  (swiglu_gpu.unsuitable, ((8, 128), (8,), (8, 64)), {}),
])
def test_kernels_of_a_gpu_are_not_divided_by_the_compiler(unsuitable, shapes, facts):
  operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  assert unsuitable(*operands, **facts) is None
  with absent('gpu'):
    assert 'over the mesh (data=4): call the op inside jax.shard_map' in unsuitable(*operands, **facts)


def test_platform_is_the_meshs_before_the_default_backends():
  assert dispatch.platform() == jax.default_backend()
  for name, expected in (('tpu', 'tpu'), ('gpu', 'gpu'), ('cuda', 'gpu')):
    with absent(name):
      assert dispatch.platform(np.ones(3)) == expected
      assert jax.jit(lambda x: x + len(dispatch.platform(x)))(0) == len(expected)


def test_platform_of_an_operand_on_a_mesh():
  # No ambient mesh, but the operand says what it is for.
  with absent('tpu'):
    mesh = jax.sharding.get_abstract_mesh()
  x = jax.ShapeDtypeStruct((4,), np.float32, sharding=jax.NamedSharding(mesh, jax.P('data')))
  seen = []
  jax.eval_shape(lambda x: seen.append(dispatch.platform(x)), x)
  assert seen == ['tpu']


def test_none_takes_the_best_for_the_platform_and_says_so_once(caplog):
  caplog.set_level(logging.INFO, 'pallas_kernels')
  ours = registry()
  with absent('tpu'):
    assert ours.implementations() == ('tpu', 'xla')
    assert [ours.choose(None) for _ in range(3)] == ['on a TPU'] * 3
  with absent('gpu'):
    assert [ours.choose(None) for _ in range(3)] == ['anywhere'] * 3
  tpu, gpu = caplog.messages
  assert tpu.startswith('op: tpu on tpu')
  assert gpu.startswith('op: xla on gpu')
  assert 'gpu: it needs jax 99' in gpu


def test_a_name_is_that_one_or_an_error():
  ours = registry()
  with absent('gpu'):
    assert ours.choose('xla') == 'anywhere'
    with pytest.raises(NotImplementedError, match=r"'gpu' cannot run: it needs jax 99; here it can be None, 'xla'$"):
      ours.choose('gpu')
    with pytest.raises(NotImplementedError, match="'tpu' cannot run: it serves tpu and this program is for gpu"):
      ours.choose('tpu')
    with pytest.raises(NotImplementedError, match="'reference' is not written for this op"):
      ours.choose('reference')
    with pytest.raises(ValueError, match=r"op: implementation='triton' is unknown; here it can be None, 'xla'$"):
      ours.choose('triton')


def test_public_ops_pass_the_error_on():
  with pytest.raises(ValueError, match="grouped_matmul: implementation='fast' is unknown; here it can be None, 'xla'"):
    grouped_matmul(np.ones((2, 3)), np.ones((1, 3, 2)), np.array([2]), implementation='fast')


def test_on_eight_devices():
  """shard_map with check_vma, and automatic partitioning; a process of its own, since devices are counted at start."""
  here = pathlib.Path(__file__).parent
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(here.parents[1]),
                 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, here / 'on_eight_devices.py'], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]

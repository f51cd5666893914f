"""Compiles Hopper kernels to machine code where there is no GPU, and says what registers they need.

Needs Python 3.12, jax 0.11.2 and, installed without their dependencies, jax-cuda13-plugin and jax-cuda13-pjrt of the
same version. h200_target_config.txtpb was printed by an H200 (`get_topology_for_devices(...).target_config`).
"""

import functools
import os
import pathlib
import re

os.environ.setdefault('MOSAIC_GPU_DUMP_PTXAS', '1')  # ptxas' report goes to standard output

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@functools.cache
def mesh() -> Mesh:
  """One H200 that is not there."""
  config = pathlib.Path(__file__).with_name('h200_target_config.txtpb').read_text()
  topology = topologies.get_topology_desc(platform='cuda', topology_name='h200', target_config=config, topology='1x1x1')
  return Mesh(np.array(topology.devices), ('x',), axis_types=(AxisType.Auto,))


def compile_for_hopper(function, *operands):
  """The compiled program of function(*operands), operands being (shape, dtype) pairs."""
  sharding = NamedSharding(mesh(), PartitionSpec())
  specs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
  with jax.set_mesh(mesh()):
    return jax.jit(function).lower(*specs).compile()


def spills(report: str) -> dict[str, int]:
  """Bytes that each kernel stores to local memory for want of registers, from ptxas' report."""
  found = re.findall(r'Function properties for (\w+?)(?:_mosaic_gpu_kernel)?\n.*?(\d+) bytes spill stores', report)
  return {name: int(stored) for name, stored in found}

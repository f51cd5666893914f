"""The Hopper kernels compiled ahead of time for an absent H200. Needs jax's CUDA plugin: `make aot-hopper`."""

import importlib.util

import pytest

from benchmarks import hopper_compile as bench

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None,
                     reason="jax's CUDA plugin is not installed here; `make aot-hopper` installs it, in .venv-hopper"),
]


@pytest.mark.parametrize('case', bench.CASES, ids=str)
def test_kernels_compile_and_their_registers_suffice(case):
  report = bench.compile_case(case)
  print(report)
  assert all(stored <= case.spills.get(kernel, 0) for kernel, stored in report['spilled_bytes'].items())
  # The assembler says so where it makes products of one warpgroup wait for each other, whatever the kernel says.
  assert not report['serialized']

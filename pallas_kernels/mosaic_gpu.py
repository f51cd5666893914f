"""What the Hopper kernels share: when they can run, and on how many processors."""

import contextlib
import contextvars

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

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


def copy_where(condition, source, target):
  """Starts the copy of source in shared memory to GMEM, uncommitted, if condition.

  A predicate rather than a branch: with dozens of branches around large arrays in registers LLVM does not finish. Pallas'
  interpreter knows branches only.
  """
  if interpreted():
    pl.when(condition)(lambda: plgpu.copy_smem_to_gmem(source, target, commit_group=False))
  else:
    plgpu.copy_smem_to_gmem(source, target, condition, commit_group=False)

"""Whether the tensors of a directory are those that its config.json says, before and beside loading them."""

import contextlib
import logging

import jax
import numpy as np

from mla_jax.checkpoint import block_fp8, published
from mla_jax.checkpoint.published import SCALE
from mla_jax.checkpoint.published_config import fp8_block
from mla_jax.checkpoint.tensor_files import DTYPES, NAMES, HFError, Reader, Stored, whole
from mla_jax.config import ConfigError, ModelConfig
from mla_jax.model.rope import inverse_frequencies

log = logging.getLogger(__name__)

PLAIN = ('BF16', 'F16', 'F32')  # what weights are stored in beside FP8
SCALES = ('F32', 'F8_E8M0')
COMPARED = 64 << 20  # bytes of a repeated tensor compared at a time
FREQUENCIES = '.self_attn.rotary_emb.inv_freq'  # in some Llama files: what follows from config.json


def check(directory, values: dict, stored: dict[str, Stored], expected: dict, repeats) -> tuple[int, int] | None:
  """Compares the files' tensors with those the model has, and returns the size of FP8's blocks. Raises HFError."""
  problems, block = [], fp8_block(values)

  def report(what, found):
    if found:
      more = f', and {len(found) - 3} more' if len(found) > 3 else ''
      problems.append(f'{what} {len(found)} ({", ".join(found[:3])}{more})')

  fp8 = {name: None for name in expected if name in stored and stored[name].dtype == 'F8_E4M3'}  # an ordered set
  scales = {name + SCALE: name for name in fp8}
  report('missing', [name for name in expected if name not in stored and name not in repeats])
  report('extra', [name for name in stored if not (name in expected or name in repeats or name in scales
                                                    or name.endswith(FREQUENCIES))])
  shapes = expected | {name: expected[of] for name, of in repeats.items()}
  report('misshapen', [f'{name} is {list(stored[name].shape)}, not {list(shape)}' for name, shape in shapes.items()
                       if name in stored and stored[name].shape != shape])
  if problems:
    raise HFError(f'{directory}: its tensors are not those of its config.json: {"; ".join(problems)}')

  if fp8 and block is None:
    raise HFError(f'{directory}: {next(iter(fp8))} is F8_E4M3, but config.json has no quantization_config; add it')
  if block is not None and not fp8:
    log.warning('%s: config.json has a quantization_config, but no tensor is FP8: read as they are', directory)
  for name in shapes.keys() & stored.keys():
    if stored[name].dtype not in PLAIN and name not in fp8:
      raise HFError(f'{stored[name].file}: {name} is {stored[name].dtype}; only {", ".join(PLAIN)} and F8_E4M3 can be '
                    'read')
  for name in fp8:
    scale = stored.get(name + SCALE)
    if len(expected[name]) != 2:
      raise HFError(f'{stored[name].file}: {name} is F8_E4M3 {list(expected[name])}; only matrices can be')
    if scale is None:
      raise HFError(f'{directory}: {name} is F8_E4M3, but {name + SCALE} is missing')
    if scale.dtype not in SCALES or scale.shape != block_fp8.scale_shape(expected[name], block):
      raise HFError(f'{scale.file}: {name + SCALE} is {scale.dtype} {list(scale.shape)}, not F32 or F8_E8M0 '
                    f'{list(block_fp8.scale_shape(expected[name], block))}, one a block of {list(block)}')
  return block


def weight_dtype(dtype) -> np.dtype | None:
  """A dtype that weights can have; None stays None. Raises ConfigError: what NumPy knows besides loses them."""
  if dtype is None:
    return None
  with contextlib.suppress(TypeError, ValueError):  # no dtype at all
    found = np.dtype(dtype)
    if NAMES.get(found) in PLAIN:
      return found
  known = ', '.join(repr(np.dtype(DTYPES[name]).name) for name in PLAIN)
  raise ConfigError(f'dtype={str(dtype)!r} is none that weights can have; use one of {known}')


def check_kept(directory, stored: dict[str, Stored], expected: dict):
  """Whether the matrices of attention and experts are FP8, all and they alone. Raises HFError."""
  if not any(tensor.dtype == 'F8_E4M3' for tensor in stored.values()):
    raise HFError(f'{directory} has no FP8 weights to keep; leave fp8=keep out')
  for name in expected.keys() & stored.keys():
    if (stored[name].dtype == 'F8_E4M3') != published.is_quantized(name):
      raise HFError(f'{stored[name].file}: {name} is {stored[name].dtype}, but fp8=keep needs F8_E4M3 in the matrices '
                    'of attention and experts, all and they alone; use fp8=dequantise')


def scale_dtype(stored: dict[str, Stored]) -> str:
  """Of a directory with FP8; F32 where it has both."""
  found = {tensor.dtype for name, tensor in stored.items() if name.endswith(SCALE)}
  return found.pop() if len(found) == 1 else 'F32'


def same(reader: Reader, name: str, of: str) -> bool:
  """Whether two tensors hold the same values. Processes share the work, each comparing some of the rows."""
  rows, *others = whole(reader.stored[of].shape)
  process, count = jax.process_index(), jax.process_count()
  begin, end = rows.stop * process // count, rows.stop * (process + 1) // count
  step = max(COMPARED // max(reader.stored[of].nbytes // rows.stop, 1), 1)
  boxes = ((slice(at, min(at + step, end)), *others) for at in range(begin, end, step))
  if reader.stored[name].dtype != reader.stored[of].dtype:
    return all(np.array_equal(reader.read(name, box), reader.read(of, box)) for box in boxes)
  return all(np.array_equal(*(reader.read(n, box).view(np.uint8) for n in (name, of))) for box in boxes)


def are_frequencies(stored: np.ndarray, config: ModelConfig) -> bool:
  width = config.qk_rope_head_dim if config.attention == 'mla' else config.qk_head_dim
  ours = inverse_frequencies(width, config.rope_theta, config.rope_scaling)
  return stored.shape == ours.shape and np.allclose(stored.astype(np.float64), ours, rtol=0.01)  # some are bfloat16

"""DeepSeek-V2 and -V3 directories in Hugging Face's layout, in and out: config.json and *.safetensors.

  python -m mla_jax.checkpoint.hugging_face export WORKDIR DIR [--dtype=bfloat16] [--fp8=float32|ue8m0]
  python -m mla_jax.checkpoint.hugging_face config DIR FILE.py     a config for train.py --init_from=DIR

`load` streams: a tensor, or the part of it that this process's devices hold, is read, taken out of FP8 (unless that is
kept), laid out our way and handed to its devices, then the next. `save` is the same backwards. Nothing is unpickled and
no code of a directory runs: JSON and safetensors are all that is read.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from absl import app, flags
from absl import logging as absl_logging

from mla_jax import axes
from mla_jax.checkpoint import agreement, block_fp8, carried, published, store, tensor_files
from mla_jax.checkpoint.placement import Target, fetch
from mla_jax.checkpoint.published import BIAS, SCALE, Place
from mla_jax.checkpoint.published_config import config_from_hf, config_to_hf, scale_format
from mla_jax.checkpoint.tensor_files import DTYPES, Entry, HFError, Reader, read_json, whole
from mla_jax.config import ConfigError, ModelConfig
from mla_jax.model.fp8 import FP8Weight, Layout, check_computes, is_fp8
from mla_jax.model.layers import FLOAT32_WEIGHTS
from mla_jax.model.transformer import abstract

log = logging.getLogger(__name__)

FP8_CHOICES = ('dequantise', 'keep')
AHEAD = min(os.cpu_count() or 1, 8)  # tensors that threads read and convert while others are placed
FILE_BYTES = 5 * 10**9

CONFIG_FILE = '''"""The model of {directory}, to go on training it.

Command:  python train.py --config={file} --init_from={directory} --workdir=runs/mine [--config.data.source=... ...]
"""

from mla_jax.config import Config, DataConfig, ModelConfig, RopeScaling


def get_config() -> Config:
  return Config(
      data=DataConfig(tokenizer={tokenizer!r}),
      model=ModelConfig(
          {fields}))
'''


class Job(NamedTuple):
  """A tensor to read: the region that this process needs, and what it becomes."""

  name: str
  box: tuple[slice, ...]
  scale_box: tuple[slice, ...] | None  # to take it out of FP8: the scales that region needs
  uses: list[tuple[Place, published.Part, np.dtype, object]]  # ..., dtype, shard
  nbytes: int


def load(directory, dtype=None, *, place=None, on_host: bool | None = None,
         fp8: str = 'dequantise') -> tuple[ModelConfig, dict, dict]:
  """(config, params, buffers) of a directory, in the structure of `transformer.split`.

  dtype: of the weights, float32, bfloat16 or float16; None = as stored, FP8 becoming bfloat16. Where one is given,
  norms and routers become float32; the routers' selection bias is float32 always.
  place: None for NumPy arrays; a Sharding for all of them; or a Mesh, over which they lie as `axes.TABLE` says. A
  process reads the bytes that its own devices need. on_host: see `placement.Target`.
  fp8: what becomes of weights in FP8. 'dequantise': arrays of `dtype`. 'keep': they are `model.fp8.FP8Weight`s, which
  compute the same bits, to decode in half the memory; they can not be trained.

  Raises HFError (ConfigError for values that no model can have), one line, where the directory lacks a file, a file is
  damaged, the model is of another kind, or a tensor is missing, extra, of another shape or of no readable dtype."""
  directory, dtype = Path(directory), agreement.weight_dtype(dtype)
  if fp8 not in FP8_CHOICES:
    raise HFError(f'fp8={fp8!r} is unknown; use one of {", ".join(map(repr, FP8_CHOICES))}')
  values = read_json(directory / 'config.json')
  config = config_from_hf(values)
  stored = tensor_files.scan(directory)
  config = _without_dropped_mtp(directory, config, stored)
  layers = config.num_hidden_layers + config.num_nextn_predict_layers
  if layers + config.num_routers * config.n_routed_experts > len(stored):  # before so many are listed
    raise HFError(f'{directory}: its tensors are not those of its config.json: {len(stored)} for {layers} layers with '
                  f'{config.n_routed_experts} experts')
  _, params, buffers = abstract(config)
  variables = dict(published.leaves(params)) | dict(published.leaves(buffers))
  shapes = {path: variable.shape for path, variable in variables.items()}
  repeats = published.repeats(config)
  expected = published.tensors(config, shapes)
  block = agreement.check(directory, values, stored, expected, repeats)
  places = published.places(config, shapes)
  kinds = _kinds(shapes, places, stored, dtype)
  plans = {path: (variable.shape, kinds[path], variable.axes) for path, variable in variables.items()}
  layouts = {}
  if fp8 == 'keep':
    agreement.check_kept(directory, stored, expected)
    check_computes(kinds[('embedding_WD',)] if dtype is None else dtype)
    form = dict(scale_fmt=scale_format(values), scale_dtype=agreement.scale_dtype(stored))
    for name in filter(published.is_quantized, list(places)):
      places[name + SCALE] = published.scale_places(places[name])
      for matrix, scales in zip(places[name], places[name + SCALE], strict=True):
        if matrix.path not in layouts:
          shape = shapes[matrix.path]
          layouts[matrix.path] = published.layout(matrix, shape, config, block, **form), scales.path
          plans[matrix.path] = shape, np.dtype(np.uint8), variables[matrix.path].axes
          plans[scales.path] = (published.scales_shape(matrix, shape, config, block), np.dtype(np.float32),
                                published.axis_letters(scales.row.ours))

  targets = {path: Target(shape, kind, _sharding(letters, shape, place), on_host)
             for path, (shape, kind, letters) in plans.items()}
  jobs = _jobs(config, places, targets, stored, block)
  with Reader(stored) as reader, _progress(sum(job.nbytes for job in jobs), 'loading') as done:
    for job, pieces in _ahead(lambda job: _pieces(reader, job, config, block), jobs):
      for (_, part, _, shard), piece in zip(job.uses, pieces, strict=True):
        shard.put(part.start, piece)
      done(job.nbytes)
    for name, of in repeats.items():
      if name in stored and not agreement.same(reader, name, of):
        raise HFError(f'{directory}: {name} differs from {of}, which the model shares; it would be lost')
    for name in stored:
      if name.endswith(agreement.FREQUENCIES) and not agreement.are_frequencies(reader.read(name), config):
        raise HFError(f"{directory}: {name} is not what config.json's rope settings give; it would be lost")
    log.debug('read %d bytes of %s', reader.bytes_read, directory)
  arrays = {path: targets.pop(path).finish() for path in list(targets)}
  for path, (layout, scales) in layouts.items():
    arrays[path] = FP8Weight(arrays[path], arrays.pop(scales), layout, kinds[path], kinds[path])
  return config, _nest(params, arrays), _nest(buffers, arrays)


def _without_dropped_mtp(directory, config: ModelConfig, stored) -> ModelConfig:
  depth, first = config.num_nextn_predict_layers, config.num_hidden_layers
  layers = (re.match(r'model\.layers\.(\d{1,18})\.', name) for name in stored)
  if not depth or any(layer and first <= int(layer[1]) < first + depth for layer in layers):
    return config
  log.warning('%s: config.json says num_nextn_predict_layers=%d, but the files hold no MTP layer (transformers '
              'drops them on saving): loaded without multi-token prediction', directory, depth)
  return dataclasses.replace(config, num_nextn_predict_layers=0)


def _kinds(shapes, places, stored, dtype) -> dict[tuple, np.dtype]:
  """The dtype of each of our arrays; as stored, where all tensors of one agree, else float32."""
  found, out = {path: set() for path in shapes}, {}
  for name, here in places.items():
    for place in here:
      found[place.path].add('BF16' if stored[name].dtype == 'F8_E4M3' else stored[name].dtype)
  for path, kinds in found.items():
    if path == (BIAS.ours,) or (dtype is not None and path[-1].startswith(FLOAT32_WEIGHTS)):
      out[path] = np.dtype(np.float32)
    elif dtype is not None:
      out[path] = dtype
    else:
      out[path] = np.dtype(DTYPES[kinds.pop()] if len(kinds) == 1 else np.float32)
  return out


def _sharding(letters: str, shape, place):
  if isinstance(place, jax.sharding.Mesh):
    return jax.sharding.NamedSharding(place, axes.spec(letters, shape, place))
  return place


def _jobs(config, places, targets, stored, block) -> list[Job]:
  """In the order of the files."""
  jobs = []
  for name in sorted(places, key=lambda name: (stored[name].file, stored[name].offset)):
    uses = []
    for place in places[name]:
      target = targets[place.path]
      parts = ((published.part(place, index, target.shape, config), shard) for index, shard, _ in target.shards)
      uses += [(place, part, target.dtype, shard) for part, shard in parts if part is not None]
    if not uses:
      continue
    box = tuple(slice(min(s.start for s in spans), max(s.stop for s in spans))
                for spans in zip(*(part.box for _, part, *_ in uses), strict=True))
    nbytes, scale_box = _elements(box) * stored[name].itemsize, None
    if stored[name].dtype == 'F8_E4M3' and name + SCALE not in places:
      scale_box = tuple(slice(s.start // width, -(-s.stop // width)) for s, width in zip(box, block, strict=True))
      nbytes += _elements(scale_box) * stored[name + SCALE].itemsize
    jobs.append(Job(name, box, scale_box, uses, nbytes))
  return jobs


def _elements(box) -> int:
  return math.prod(span.stop - span.start for span in box)


def _pieces(reader: Reader, job: Job, config: ModelConfig, block) -> list[np.ndarray]:
  """What each of the job's uses puts into its shard."""
  def finite(name, box):
    scales = reader.read(name, box)
    if not np.isfinite(scales.astype(np.float32)).all():
      raise HFError(f'{reader.stored[name].file}: {name} holds NaN or infinity')
    return scales

  tensor = (finite if job.name.endswith(SCALE) else reader.read)(job.name, job.box)
  if tensor.dtype == block_fp8.FP8 and job.scale_box is None:
    tensor = tensor.view(np.uint8)  # stays FP8
  if job.scale_box is not None:
    scales = finite(job.name + SCALE, job.scale_box)
    widest = max((dtype for _, _, dtype, _ in job.uses), key=lambda dtype: dtype.itemsize)
    tensor = block_fp8.dequantize(tensor, scales, *job.box, block, widest)
  out = []
  for place, part, dtype, _ in job.uses:
    inside = tuple(slice(s.start - whole.start, s.stop - whole.start)
                   for s, whole in zip(part.box, job.box, strict=True))
    out.append(published.arrange(tensor[inside], place, part, config).astype(dtype, copy=False))
  return out


def _ahead(function: Callable, items: list) -> Iterator[tuple]:
  """(item, function(item)) in order; threads work on the next few, so that reading and placing overlap."""
  pending = deque()
  with ThreadPoolExecutor(AHEAD) as pool:
    try:
      for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > AHEAD:
          done, future = pending.popleft()
          yield done, future.result()
      for done, future in pending:
        yield done, future.result()
    finally:
      pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _progress(nbytes: int, what: str) -> Iterator[Callable[[int], None]]:
  """A bar with bytes, rate and time left, on a terminal and for what takes a while."""
  hidden = True if jax.process_index() else None
  with tqdm.tqdm(total=nbytes, desc=what, unit='B', unit_scale=True, delay=0.5, disable=hidden) as bar:
    yield bar.update


def _nest(tree, arrays, path=()) -> dict:
  return {key: arrays[(*path, key)] if axes.is_variable(value) else _nest(value, arrays, (*path, key))
          for key, value in tree.items()}


def save(directory, config: ModelConfig, params, buffers, *, dtype=None, fp8: str | None = None,
         tokenizer: str | Path | None = None, file_bytes: int = FILE_BYTES):
  """Writes a directory that transformers, vLLM, SGLang and `load` read. It appears whole or not at all.

  dtype: of all weights but the routers' selection bias (float32 always); None = as held. fp8: 'float32' or 'ue8m0',
  the format of the scales: the matrices that the release has in FP8 become FP8. Weights kept in FP8 are written as they
  were read, where neither is given or fp8 is the format they have. tokenizer: a directory whose tokenizer files,
  and ids of the tokens that begin and end a text, are carried over. file_bytes: of tensors in a file, at most.

  Raises HFError, one line, where the directory holds something, or nobody else could read such a model."""
  directory, dtype = Path(directory).expanduser().absolute(), agreement.weight_dtype(dtype)
  if fp8 not in (None, *block_fp8.SCALE_FORMATS):
    raise HFError(f'fp8={fp8!r} is unknown; use one of {", ".join(map(repr, block_fp8.SCALE_FORMATS))}, or None')
  arrays = {path: array for tree in (params, buffers) for path, array in _flat(tree)}
  kept = {path: weight for path, weight in arrays.items() if is_fp8(weight)}
  dtypes = {path: np.dtype(array.dtype) for path, array in arrays.items()}
  arrays |= {path: weight.bits for path, weight in kept.items()}
  for path, array in arrays.items():
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      raise HFError(f'{"/".join(path)} lies on devices of several processes; save from one that holds the whole model, '
                    'e.g. after restoring the checkpoint there')
  kind = np.dtype(params['embedding_WD'].dtype) if dtype is None else dtype
  layout = next((weight.layout for weight in kept.values()), Layout('', '', '', ''))
  as_read = kept and (fp8 == layout.scale_fmt or fp8 is dtype is None)
  fp8 = layout.scale_fmt if as_read else fp8
  block, scale_dtype = (layout.block, layout.scale_dtype) if as_read else (block_fp8.BLOCK, 'F32')
  values = config_to_hf(config, str(kind), fp8, block)
  if tokenizer is not None:
    values |= carried.special_ids(Path(tokenizer))

  shapes = {path: array.shape for path, array in arrays.items()}
  places, repeats = published.places(config, shapes), published.repeats(config)
  for name in [name for name, found in places.items() if found[0].path in kept]:
    places[name + SCALE] = published.scale_places(places[name])
    arrays |= {scales.path: kept[matrix.path].scales
               for matrix, scales in zip(places[name], places[name + SCALE], strict=True)}
  held = {name: dtypes[places[repeats.get(name, name)][0].path] for name in published.tensors(config, shapes)}
  groups = []
  for name, shape in published.tensors(config, shapes).items():
    if fp8 and published.is_quantized(name):
      groups.append((Entry(name, block_fp8.FP8, shape),
                     Entry(name + SCALE, np.dtype(DTYPES[scale_dtype]), block_fp8.scale_shape(shape, block))))
    else:
      plain = dtype is None or name.endswith(BIAS.published)
      groups.append((Entry(name, held[name] if plain else dtype, shape),))

  def assemble(name, shape, dtype) -> np.ndarray:
    tensor = np.empty(shape, dtype)
    for place in places[repeats.get(name, name)]:
      for theirs, ours in published.views(tensor, fetch(arrays[place.path], place.index), place.row, config):
        theirs[...] = ours
    return tensor

  def make(group) -> tuple[np.ndarray, ...]:
    entry = group[0]
    kind = held[entry.name] if len(group) == 2 else entry.dtype
    if entry.name + SCALE in places:
      tensor = assemble(entry.name, entry.shape, np.uint8).view(block_fp8.FP8)
      scales = assemble(entry.name + SCALE, block_fp8.scale_shape(entry.shape, layout.block), np.float32)
      if as_read:
        return tensor, scales.astype(group[1].dtype)
      loaded_as = kept[places[entry.name][0].path].loaded_as
      tensor = block_fp8.dequantize(tensor, scales, *whole(entry.shape), layout.block, loaded_as).astype(kind)
    else:
      tensor = assemble(entry.name, entry.shape, kind)
    if len(group) == 1:
      return (tensor,)
    try:
      return block_fp8.quantize(tensor, fp8)
    except ValueError as error:
      raise HFError(f'{entry.name}: {error}, so it has no FP8 form') from error

  with tensor_files.appearing(directory) as partial:
    total = sum(entry.nbytes for group in groups for entry in group)
    with _progress(total, 'saving') as done:
      tensor_files.write(partial, groups, make, file_bytes, done)
    tensor_files.write_text(partial / 'config.json', json.dumps(values, indent=2))
    if tokenizer is not None:
      carried.copy(Path(tokenizer), partial)


def _flat(tree, path=()) -> Iterator[tuple]:
  for key, value in tree.items():
    yield from _flat(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def define_flags(flag_values: flags.FlagValues):
  """The command's flags: defined only when it runs, since other programs have some of the same names."""
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the weights; default: as the checkpoint has them',
                    flag_values=flag_values)
  flags.DEFINE_enum('fp8', None, block_fp8.SCALE_FORMATS, "Matrices in FP8, with scales of this format",
                    flag_values=flag_values)


def write_config(directory: Path, file: Path):
  """A file for train.py --config whose model is the directory's, to go on training it with --init_from."""
  stored, values = tensor_files.scan(directory), read_json(directory / 'config.json')
  config = _without_dropped_mtp(directory, config_from_hf(values), stored)
  if file.exists():
    raise HFError(f'{file} exists; name another file')
  tokenizer = str(directory.absolute()) if (directory / 'tokenizer.json').is_file() else 'byte'
  fields = ',\n          '.join(f'{key}={getattr(config, key)!r}' for key in ModelConfig.__dataclass_fields__)
  file.write_text(CONFIG_FILE.format(directory=directory, file=file, tokenizer=tokenizer, fields=fields))


def main(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> int:
  try:
    if len(argv) != 4 or argv[1] not in ('export', 'config'):
      raise HFError('usage: python -m mla_jax.checkpoint.hugging_face export WORKDIR DIR, or config DIR FILE.py')
    source, target = map(Path, argv[2:])
    if argv[1] == 'config':
      write_config(source, target)
    else:
      tensor_files.require_free(target)
      config, params, buffers = store.read_run(source)
      save(target, config.model, params, buffers, dtype=flag_values.dtype, fp8=flag_values.fp8,
           tokenizer=source / 'tokenizer')
  except (ConfigError, OSError) as error:
    print(f'hugging_face: error: {error}', file=sys.stderr)
    return 2
  print(f'{target}: written')
  return 0


if __name__ == '__main__':
  absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs there
  define_flags(flags.FLAGS)
  app.run(main)

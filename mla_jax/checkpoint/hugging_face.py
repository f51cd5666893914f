"""DeepSeek-V2 and -V3 directories in Hugging Face's layout: config.json and *.safetensors to our config and weights.

`TOP`, `LAYER`, `MODULE` and `BIAS` are one table: which published tensor lies where in our tree. `views` pairs a
published tensor with its place in ours; assigned one way it loads, assigned the other way it would export.
"""

import dataclasses
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mla_jax.axes import is_variable
from mla_jax.config import ConfigError, ModelConfig, RopeScaling
from mla_jax.model.layers import FLOAT32_WEIGHTS
from mla_jax.model.transformer import abstract

log = logging.getLogger(__name__)

STORED = {'BF16': ml_dtypes.bfloat16, 'F16': np.float16, 'F32': np.float32}


class HFError(ConfigError):
  """A Hugging Face directory that can't be read as a model; its message is one line that says why."""


class Row(NamedTuple):
  """One published tensor, or a part of one, and where it lies in our tree.

  axes: its axes in the file; letters written together are one dimension there (linear weights are [out, in]).
  ours: the path of our array, whose name ends in its letters. Those it has beyond `axes`: an expert, gate or up.
  gate_up: our index on the axis '2'.
  stacked: a dimension of the file that holds several of our arrays, one after the other.
  """

  published: str
  axes: str
  ours: str
  gate_up: int = 0
  stacked: str = ''


TOP = (
    Row('model.embed_tokens.weight', 'W D', 'embedding_WD'),
    Row('model.norm.weight', 'D', 'norm_D'),
    Row('lm_head.weight', 'W D', 'head_WD'),
)
# Below model.layers.<i>. A row counts where our tree has its array.
LAYER = (
    Row('input_layernorm.weight', 'D', 'norm_attention_D'),
    Row('self_attn.q_proj.weight', 'NH D', 'attention/wq_DNH'),
    Row('self_attn.q_a_proj.weight', 'Q D', 'attention/wdq_DQ'),
    Row('self_attn.q_a_layernorm.weight', 'Q', 'attention/norm_q_Q'),
    Row('self_attn.q_b_proj.weight', 'NH Q', 'attention/wuq_QNH'),
    Row('self_attn.kv_a_proj_with_mqa.weight', 'J D', 'attention/wdkv_DJ'),
    Row('self_attn.kv_a_layernorm.weight', 'C', 'attention/norm_kv_C'),
    Row('self_attn.kv_b_proj.weight', 'NK C', 'attention/wuk_CNK', stacked='KV'),
    Row('self_attn.kv_b_proj.weight', 'NV C', 'attention/wuv_CNV', stacked='KV'),
    Row('self_attn.o_proj.weight', 'D NV', 'attention/wo_NVD'),
    Row('post_attention_layernorm.weight', 'D', 'norm_ffn_D'),
    Row('mlp.gate_proj.weight', 'F D', 'ffn/wi_D2F', gate_up=0),
    Row('mlp.up_proj.weight', 'F D', 'ffn/wi_D2F', gate_up=1),
    Row('mlp.down_proj.weight', 'D F', 'ffn/wo_FD'),
    Row('mlp.gate.weight', 'E D', 'ffn/router_DE'),
    Row('mlp.experts.{expert}.gate_proj.weight', 'F D', 'ffn/wi_ED2F', gate_up=0),
    Row('mlp.experts.{expert}.up_proj.weight', 'F D', 'ffn/wi_ED2F', gate_up=1),
    Row('mlp.experts.{expert}.down_proj.weight', 'D F', 'ffn/wo_EFD'),
    Row('mlp.shared_experts.gate_proj.weight', 'F D', 'ffn/shared/wi_D2F', gate_up=0),
    Row('mlp.shared_experts.up_proj.weight', 'F D', 'ffn/shared/wi_D2F', gate_up=1),
    Row('mlp.shared_experts.down_proj.weight', 'D F', 'ffn/shared/wo_FD'),
)
BIAS = Row('mlp.gate.e_score_correction_bias', 'E', 'bias_LE')
# MTP modules are the layers after the last; they have these beside a layer's own.
MODULE = (
    Row('enorm.weight', 'D', 'norm_embedding_D'),
    Row('hnorm.weight', 'D', 'norm_hidden_D'),
    Row('eh_proj.weight', 'D Z', 'wjoin_ZD'),
    Row('shared_head.norm.weight', 'D', 'norm_D'),
)
# What an MTP layer may repeat of the main model.
REPEATED = {'embed_tokens.weight': 'model.embed_tokens.weight', 'shared_head.head.weight': 'lm_head.weight'}

# config.json. Read as they are; those of the second line only where there are experts.
REQUIRED = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings',
            'intermediate_size', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
REQUIRED_OF_EXPERTS = ('num_experts_per_tok', 'moe_intermediate_size', 'first_k_dense_replace')
# Absent or null in some files; what the field then means.
OPTIONAL = {'q_lora_rank': 0, 'n_routed_experts': 0, 'n_shared_experts': 0, 'n_group': 1, 'topk_group': 1,
            'routed_scaling_factor': 1.0, 'num_nextn_predict_layers': 0, 'tie_word_embeddings': False,
            'rms_norm_eps': 1e-6, 'initializer_range': 0.02, 'aux_loss_alpha': ModelConfig.aux_loss_alpha}
ROUTERS = {'deepseek_v2': {'topk_method': 'greedy', 'scoring_func': 'softmax', 'norm_topk_prob': False},
           'deepseek_v3': {'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'norm_topk_prob': True}}
# Variants that the model does not have.
ONLY = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'moe_layer_freq': 1, 'rope_interleave': True}


class Place(NamedTuple):
  """Where one row lies for one layer and expert: the path of our stacked array, and the index into it."""

  name: str
  row: Row
  path: tuple[str, ...]
  index: tuple


class Stored(NamedTuple):
  """A tensor in a file."""

  file: Path
  dtype: str
  shape: tuple[int, ...]


def load(directory, dtype=None) -> tuple[ModelConfig, dict, dict]:
  """(config, params, buffers) of a Hugging Face directory: NumPy arrays in the structure of `transformer.split`.

  dtype: of the weights; None = as stored. Where one is given, norms and routers become float32; the routers' selection
  bias is float32 always. Tensors are read one at a time, so that nothing is held twice.

  Raises HFError (ConfigError for values that no model can have), one line, where the directory lacks a file, a file is
  damaged, the model is of another kind or quantized, or a tensor is missing, extra or of another shape.
  """
  directory = Path(directory)
  values = _read_json(directory / 'config.json')
  config = config_from_hf(values)
  if values.get('quantization_config'):
    raise HFError(f'{directory} holds quantized weights (quantization_config in config.json); only bfloat16, float16 '
                  'and float32 can be read: convert them first')
  stored = _headers(directory)
  modules = [f'model.layers.{config.num_hidden_layers + d}.' for d in range(config.num_nextn_predict_layers)]
  if modules and not any(name.startswith(tuple(modules)) for name in stored):
    log.warning('%s: config.json says num_nextn_predict_layers=%d, but the files hold no MTP layer (transformers '
                 'drops them on saving): loaded without multi-token prediction', directory, len(modules))
    config, modules = dataclasses.replace(config, num_nextn_predict_layers=0), []

  _, params, buffers = abstract(config)
  shapes = dict(leaves(params)) | dict(leaves(buffers))
  wanted = defaultdict(list)
  for place in places(config, shapes):
    wanted[place.name].append(place)
  head = {'lm_head.weight': 'model.embed_tokens.weight'} if config.tie_word_embeddings else {}
  repeats = head | {module + name: head.get(of, of) for module in modules for name, of in REPEATED.items()}
  _check(directory, stored, wanted, repeats, shapes, config)

  arrays = _allocate(shapes, wanted, stored, dtype)
  for name, tensor in _read(stored, wanted):
    for place in wanted[name]:
      for theirs, ours in views(tensor, arrays[place.path][place.index], place.row, config):
        ours[...] = theirs
  for name, of in repeats.items():
    if name in stored and not np.array_equal(*(tensor for n in (name, of) for _, tensor in _read(stored, [n]))):
      raise HFError(f'{directory}: {name} differs from {of}, which the model shares; it would be lost')
  return config, _nest(params, arrays), _nest(buffers, arrays)


def config_from_hf(values: dict) -> ModelConfig:
  """The ModelConfig of a parsed config.json, in the spelling of old files (rope_scaling, rope_theta) or of transformers
  5 (rope_parameters). Raises HFError for another kind of model, ConfigError for values no model can have."""
  kind = values.get('model_type')
  if kind not in ROUTERS:
    raise HFError(f'config.json: model_type={kind!r} is unknown; use one of {", ".join(map(repr, ROUTERS))}')
  for key, only in ONLY.items():
    if values.get(key) not in (None, only):
      raise HFError(f'config.json: {key}={values[key]!r} is not supported; only {only!r} is')
  given = {key: value for key, value in values.items() if value is not None}
  fields = {key: given.get(key, default) for key, default in (OPTIONAL | ROUTERS[kind]).items()}
  required = REQUIRED + (REQUIRED_OF_EXPERTS if fields['n_routed_experts'] else ())
  absent = [key for key in required if key not in given]
  if absent:
    raise HFError(f'config.json lacks {", ".join(absent)}')
  fields |= {key: given[key] for key in required}
  theta, scaling = _rope(given)
  kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
  for key, value in (fields | {'rope_theta': theta}).items():
    if not isinstance(value, (float, int) if kinds[key] is float else kinds[key]):
      raise HFError(f'config.json: {key}={value!r} is no {kinds[key].__name__}')
  config = ModelConfig(attention='mla', rope_theta=theta, rope_scaling=scaling, **fields)
  config.validate()
  return config


def _rope(values: dict) -> tuple[float, RopeScaling]:
  rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
  theta = rope.get('rope_theta', values.get('rope_theta', 10000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return theta, RopeScaling()
  if kind != 'yarn' or rope.get('attention_factor') is not None or rope.get('truncate') is False:
    raise HFError(f"config.json: rope scaling {rope} is not supported; only type 'yarn' without attention_factor and "
                  'truncate=false is')
  if 'factor' not in rope:
    raise HFError(f'config.json: rope scaling {rope} lacks factor')
  # Without mscale_all_dim the softmax keeps its scale: m(0) = 1.
  fields = [field.name for field in dataclasses.fields(RopeScaling)]
  given = {key: rope[key] for key in fields if rope.get(key) is not None}
  defaults = {'mscale_all_dim': 0.0, 'original_max_position_embeddings': values['max_position_embeddings']}
  for key, value in given.items():
    if not isinstance(value, (float, int)):
      raise HFError(f'config.json: rope scaling {key}={value!r} is no number')
  return theta, RopeScaling(**defaults | given)


def places(config: ModelConfig, shapes: dict) -> Iterator[Place]:
  """Every row of the table for every layer and expert of a model. `shapes`: of our arrays, by path."""
  def parts(prefix, rows, parent, layer):
    for row in rows:
      path = (*parent, *row.ours.split('/'))
      if path not in shapes:
        continue
      letters = path[-1].rpartition('_')[2]
      for expert in range(config.n_routed_experts if '{expert}' in row.published else 1):
        fixed = {'2': row.gate_up} if '{expert}' not in row.published else {'2': row.gate_up, 'E': expert}
        yield Place(prefix + row.published.format(expert=expert), row, path,
                    (*layer, *(fixed.get(letter, slice(None)) for letter in letters)))

  yield from parts('', TOP, (), ())
  dense, layers = config.num_dense_layers, config.num_hidden_layers
  for i in range(layers + config.num_nextn_predict_layers):
    prefix = f'model.layers.{i}.'
    if i < dense:
      yield from parts(prefix, LAYER, ('dense_blocks',), (i,))
    elif i < layers:
      yield from parts(prefix, LAYER, ('moe_blocks',), (i - dense,))
    else:
      yield from parts(prefix, MODULE, ('mtp_modules',), (i - layers,))
      yield from parts(prefix, LAYER, ('mtp_modules', 'block'), (i - layers,))
    if i >= dense and config.uses_selection_bias:
      yield Place(prefix + BIAS.published, BIAS, (BIAS.ours,), (i - dense,))


def views(tensor, array, row: Row, config: ModelConfig) -> Iterator[tuple]:
  """Pairs (part of the published tensor, part of our array) that hold the same numbers in the same order, all of them
  views: assigning ours from theirs loads, theirs from ours exports."""
  letters, axes, sizes = _letters(row), row.axes.replace(' ', ''), _sizes(row, array.shape, config)
  tensor = tensor.reshape([_stored_size(row, letter, sizes) for letter in axes])
  array = array.transpose([letters.index(letter) for letter in axes])
  cuts, axis = [(slice(None), slice(None))], 0
  for i, letter in enumerate(axes):
    if letter in row.stacked:
      start, axis = sum(sizes[part] for part in row.stacked[:row.stacked.index(letter)]), i
      cuts = [(slice(start, start + sizes[letter]), slice(None))]
    elif letter in 'HJ':  # both end in the rope width
      # Published pairs are (2i, 2i + 1), ours (i, i + R/2).
      start, half, axis = sizes[letter] - config.qk_rope_head_dim, config.qk_rope_head_dim // 2, i
      cuts = [(slice(start), slice(start)),
              (slice(start, None, 2), slice(start, start + half)),
              (slice(start + 1, None, 2), slice(start + half, None))]
  for theirs, ours in cuts:
    yield tensor[(slice(None),) * axis + (theirs,)], array[(slice(None),) * axis + (ours,)]


def _letters(row: Row) -> str:
  """The axes of our array that a row fills, in our order."""
  return ''.join(letter for letter in row.ours.rpartition('_')[2] if letter in row.axes)


def _sizes(row: Row, shape, config: ModelConfig) -> dict[str, int]:
  return {'K': config.qk_nope_head_dim, 'V': config.v_head_dim} | dict(zip(_letters(row), shape, strict=True))


def _stored_size(row: Row, letter: str, sizes) -> int:
  return sum(sizes[part] for part in row.stacked) if letter in row.stacked else sizes[letter]


def _check(directory, stored, wanted, repeats, shapes, config):
  problems = []

  def report(names, what):
    if names:
      more = f', and {len(names) - 3} more' if len(names) > 3 else ''
      problems.append(f'{what} {len(names)} ({", ".join(names[:3])}{more})')

  report([name for name in wanted if name not in stored], 'missing')
  report([name for name in stored if name not in wanted and name not in repeats], 'extra')
  misshapen = []
  for name, (place, *_) in wanted.items():
    inner = np.broadcast_to(np.int8(0), shapes[place.path])[place.index].shape
    sizes = _sizes(place.row, inner, config)
    shape = tuple(math.prod(_stored_size(place.row, letter, sizes) for letter in group)
                  for group in place.row.axes.split())
    if name in stored and stored[name].shape != shape:
      misshapen.append(f'{name} is {list(stored[name].shape)}, not {list(shape)}')
  report(misshapen, 'misshapen')
  if problems:
    raise HFError(f'{directory}: its tensors are not those of its config.json: {"; ".join(problems)}')


def _allocate(shapes, wanted, stored, dtype) -> dict[tuple, np.ndarray]:
  kinds = defaultdict(set)
  for name, places_ in wanted.items():
    for place in places_:
      kinds[place.path].add(stored[name].dtype)
  arrays = {}
  for path, shape in shapes.items():
    if path == (BIAS.ours,):
      arrays[path] = np.zeros(shape, np.float32)
      continue
    if dtype is None:
      kind = STORED[kinds[path].pop()] if len(kinds[path]) == 1 else np.float32
    else:
      kind = np.float32 if path[-1].startswith(FLOAT32_WEIGHTS) else dtype
    arrays[path] = np.empty(shape, kind)
  return arrays


def _read_json(path: Path) -> dict:
  if not path.is_file():
    raise HFError(f'{path} does not exist; a Hugging Face directory has config.json and *.safetensors')
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError) as error:
    raise HFError(f'{path} can not be read as JSON ({error})') from error
  if not isinstance(values, dict):
    raise HFError(f'{path} is no JSON object')
  return values


def _headers(directory: Path) -> dict[str, Stored]:
  """Every tensor of every *.safetensors file, and that those which the index names are there."""
  index = directory / 'model.safetensors.index.json'
  named = _read_json(index).get('weight_map', {}) if index.exists() else {}
  files = sorted(directory.glob('*.safetensors'))
  lost = sorted(set(named.values()) - {file.name for file in files})
  if lost:
    raise HFError(f'{directory}: {len(lost)} of the files that {index.name} names do not exist ({", ".join(lost[:3])})')
  if not files:
    raise HFError(f'{directory} has no *.safetensors file')
  stored = {}
  for file in files:
    with _open(file) as handle:
      for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
        tensor = handle.get_slice(name)
        if name in stored:
          raise HFError(f'{directory}: {name} is in {stored[name].file.name} and in {file.name}; remove one of them')
        if tensor.get_dtype() not in STORED:
          raise HFError(f'{file}: {name} is {tensor.get_dtype()}; only {", ".join(STORED)} can be read')
        stored[name] = Stored(file, tensor.get_dtype(), tuple(tensor.get_shape()))
  return stored


def _read(stored: dict[str, Stored], names) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor), file by file."""
  by_file = defaultdict(list)
  for name in names:
    by_file[stored[name].file].append(name)
  for file, inside in by_file.items():
    with _open(file) as handle:
      for name in inside:
        yield name, handle.get_tensor(name)


def _open(file: Path):
  try:
    return safe_open(file, framework='numpy')
  except (SafetensorError, OSError) as error:
    raise HFError(f'{file} can not be read ({error}); it may be cut short: fetch it again') from error


def leaves(tree, path=()) -> Iterator[tuple[tuple, tuple]]:
  """(path, shape) of abstract Variables."""
  for key, value in tree.items():
    if is_variable(value):
      yield (*path, key), value.shape
    else:
      yield from leaves(value, (*path, key))


def _nest(tree, arrays, path=()) -> dict:
  return {key: arrays[(*path, key)] if is_variable(value) else _nest(value, arrays, (*path, key))
          for key, value in tree.items()}

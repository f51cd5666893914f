"""The published tensors of DeepSeek-V2 and -V3, and of the grouped-query models beside them (Llama, Qwen2, Mistral),
and where each lies in our tree.

`TOP`, `LAYER`, `MODULE` and `BIAS` are one table. `views` pairs a published tensor with its place in ours; assigned one
way it loads, assigned the other way it exports. `part` says which region of a tensor a shard of our array needs.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mla_jax.axes import is_variable
from mla_jax.checkpoint.block_fp8 import scale_shape
from mla_jax.config import ModelConfig
from mla_jax.model.fp8 import Layout
from mla_jax.model.transformer import abstract


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
    Row('self_attn.q_proj.bias', 'NH', 'attention/bq_NH'),
    Row('self_attn.k_proj.weight', 'GH D', 'attention/wk_DGH'),
    Row('self_attn.k_proj.bias', 'GH', 'attention/bk_GH'),
    Row('self_attn.v_proj.weight', 'GV D', 'attention/wv_DGV'),
    Row('self_attn.v_proj.bias', 'GV', 'attention/bv_GV'),
    Row('self_attn.q_a_proj.weight', 'Q D', 'attention/wdq_DQ'),
    Row('self_attn.q_a_layernorm.weight', 'Q', 'attention/norm_q_Q'),
    Row('self_attn.q_b_proj.weight', 'NH Q', 'attention/wuq_QNH'),
    Row('self_attn.kv_a_proj_with_mqa.weight', 'J D', 'attention/wdkv_DJ'),
    Row('self_attn.kv_a_proj_with_mqa.bias', 'J', 'attention/bdkv_J'),
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
SCALE = '_scale_inv'  # what the name of an FP8 weight's scales adds to its own


class Place(NamedTuple):
  """Where one row lies for one layer and expert: the path of our stacked array, and the index into it."""

  name: str
  row: Row
  path: tuple[str, ...]
  index: tuple


class Part(NamedTuple):
  """What a shard of our array takes from a published tensor.

  box: the region of the tensor to read. sizes: of our letters, as that region gives them. cut: which of that is
  wanted. start: where it goes in the shard."""

  box: tuple[slice, ...]
  sizes: tuple[int, ...]
  cut: tuple[slice, ...]
  start: tuple[int, ...]


def shapes(config: ModelConfig) -> dict[tuple, tuple]:
  """Of our arrays, by path."""
  _, params, buffers = abstract(config)
  return {path: variable.shape for tree in (params, buffers) for path, variable in leaves(tree)}


def leaves(tree, path=()) -> Iterator[tuple]:
  """(path, abstract Variable) of a tree of them."""
  for key, value in tree.items():
    if is_variable(value):
      yield (*path, key), value
    else:
      yield from leaves(value, (*path, key))


def places(config: ModelConfig, shapes: dict) -> dict[str, list[Place]]:
  """Every row of the table for every layer and expert of a model, by the tensor's name, in the order of layers."""
  out = defaultdict(list)

  def add(prefix, rows, parent, layer):
    for row in rows:
      path = (*parent, *row.ours.split('/'))
      if path not in shapes:
        continue
      letters = axis_letters(path[-1])
      for expert in range(config.n_routed_experts if '{expert}' in row.published else 1):
        fixed = {'2': row.gate_up} if '{expert}' not in row.published else {'2': row.gate_up, 'E': expert}
        name = prefix + row.published.format(expert=expert)
        out[name].append(Place(name, row, path, (*layer, *(fixed.get(letter, slice(None)) for letter in letters))))

  add('', TOP, (), ())
  dense, layers = config.num_dense_layers, config.num_hidden_layers
  for i in range(layers + config.num_nextn_predict_layers):
    prefix = f'model.layers.{i}.'
    if i < dense:
      add(prefix, LAYER, ('dense_blocks',), (i,))
    elif i < layers:
      add(prefix, LAYER, ('moe_blocks',), (i - dense,))
    else:
      add(prefix, MODULE, ('mtp_modules',), (i - layers,))
      add(prefix, LAYER, ('mtp_modules', 'block'), (i - layers,))
    if i >= dense and config.uses_selection_bias:
      name = prefix + BIAS.published
      out[name].append(Place(name, BIAS, (BIAS.ours,), (i - dense, slice(None))))
  return dict(out)


def scale_places(found: list[Place]) -> list[Place]:
  """Where the scales of a matrix lie that stays FP8: below its own paths, numbered as it is, and otherwise as
  published, rows of blocks r and columns c."""
  out = []
  for place in found:
    row = Row(place.row.published + SCALE, 'r c', f'scales_{_numbering(place.row)}rc')
    numbers = (i for i in place.index if isinstance(i, int))
    out.append(Place(place.name + SCALE, row, (*place.path, row.ours), (*numbers, slice(None), slice(None))))
  return out


def scales_shape(place: Place, shape: tuple[int, ...], config: ModelConfig, block) -> tuple[int, ...]:
  """Of the array of all scales at the path of `scale_places`; `shape` is that of the array they belong to."""
  numbered = (size for size, i in zip(shape, place.index, strict=True) if isinstance(i, int))
  return (*numbered, *scale_shape(published_shape(place, shape, config), block))


def layout(place: Place, shape: tuple[int, ...], config: ModelConfig, block, **stored) -> Layout:
  """How the blocks of a matrix that stays FP8 lie in our array of `shape`. stored: see `Layout`."""
  sizes, groups, numbers = _sizes(place.row, _free(place, shape), config), place.row.axes.split(), []
  for group, count, width in zip(groups, published_shape(place, shape, config), block, strict=True):
    letters = [letter for letter in _letters(place.row) if letter in group]
    # The block of each row (or column) of the file, arranged as the loader arranges rows.
    array = np.empty([sizes[letter] for letter in letters], np.int32)
    row = place.row._replace(axes=group, ours=f'_{"".join(letters)}')
    for theirs, ours in views(np.arange(count, dtype=np.int32) // width, array, row, config):
      ours[...] = theirs
    array = array.transpose([letters.index(letter) for letter in group]).reshape(-1)
    regular = len(group) == 1 and np.array_equal(array, np.arange(count) // width)
    numbers.append(None if regular else array.tobytes())
  return Layout(axis_letters(place.path[-1]), _numbering(place.row), *groups, tuple(block), *numbers, **stored)


def axis_letters(name: str) -> str:
  """Of one of our arrays, by its name."""
  return name.rpartition('_')[2]


def repeats(config: ModelConfig) -> dict[str, str]:
  """Tensors that a directory may hold besides, and which one each repeats."""
  head = {'lm_head.weight': 'model.embed_tokens.weight'} if config.tie_word_embeddings else {}
  modules = [config.num_hidden_layers + d for d in range(config.num_nextn_predict_layers)]
  return head | {f'model.layers.{i}.{name}': head.get(of, of) for i in modules for name, of in REPEATED.items()}


def published_shape(place: Place, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
  """Of the tensor in the file; `shape` is our whole array's."""
  sizes = _sizes(place.row, _free(place, shape), config)
  return tuple(math.prod(_stored_size(place.row, letter, sizes) for letter in group)
               for group in place.row.axes.split())


def is_quantized(name: str) -> bool:
  """Whether the release has it in FP8: the matrices of attention and experts."""
  return '_proj' in name and name.endswith('.weight') and 'eh_proj' not in name


def tensors(config: ModelConfig, shapes: dict, *, fp8: bool = False) -> dict[str, tuple[int, ...]]:
  """Names and shapes of all tensors that a directory with this model holds, repeats and FP8 scales included."""
  out = {name: published_shape(found[0], shapes[found[0].path], config)
         for name, found in places(config, shapes).items()}
  out |= {name: out[source] for name, source in repeats(config).items() if name != 'lm_head.weight'}
  if fp8:
    out |= {name + SCALE: scale_shape(shape) for name, shape in out.items() if is_quantized(name)}
  return out


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
    elif letter in 'HJ' and config.attention == 'mla':  # both end in the rope width
      # Published pairs are (2i, 2i + 1), ours (i, i + R/2).
      start, half, axis = sizes[letter] - config.qk_rope_head_dim, config.qk_rope_head_dim // 2, i
      cuts = [(slice(start), slice(start)),
              (slice(start, None, 2), slice(start, start + half)),
              (slice(start + 1, None, 2), slice(start + half, None))]
  for theirs, ours in cuts:
    yield tensor[(slice(None),) * axis + (theirs,)], array[(slice(None),) * axis + (ours,)]


def part(place: Place, shard: tuple[slice, ...], shape: tuple[int, ...], config: ModelConfig) -> Part | None:
  """What the shard (an index into our whole array of `shape`) takes from a tensor; None: nothing.

  A dimension of the file is read in part where the first of its letters is what is split; else it is read whole."""
  row, start, wanted = place.row, [], []
  for fixed, span, size in zip(place.index, shard, shape, strict=True):
    low, high, _ = span.indices(size)
    if not isinstance(fixed, int):
      start.append(0)
      wanted.append(slice(low, high))
    elif low <= fixed < high:
      start.append(fixed - low)
    else:
      return None
  letters, sizes = _letters(row), _sizes(row, _free(place, shape), config)
  spans = dict(zip(letters, wanted, strict=True))
  read, box = {letter: slice(0, sizes[letter]) for letter in letters}, []
  for group in row.axes.split():
    first = group[0]
    inner = math.prod(_stored_size(row, letter, sizes) for letter in group[1:])
    if first in row.stacked or first in 'HJ':
      box.append(slice(0, _stored_size(row, first, sizes) * inner))
    else:
      read[first] = spans[first]
      box.append(slice(spans[first].start * inner, spans[first].stop * inner))
  return Part(tuple(box), tuple(read[letter].stop - read[letter].start for letter in letters),
              tuple(slice(spans[l].start - read[l].start, spans[l].stop - read[l].start) for l in letters),
              tuple(start))


def arrange(tensor: np.ndarray, place: Place, taken: Part, config: ModelConfig) -> np.ndarray:
  """The region `taken.box` of a published tensor as it lies in the shard, with an axis of 1 for a layer, an expert, and
  gate or up."""
  piece = np.empty(taken.sizes, tensor.dtype)
  for theirs, ours in views(tensor, piece, place.row, config):
    ours[...] = theirs
  return piece[taken.cut][tuple(None if isinstance(i, int) else slice(None) for i in place.index)]


def _free(place: Place, shape) -> tuple[int, ...]:
  return tuple(size for size, fixed in zip(shape, place.index, strict=True) if not isinstance(fixed, int))


def _letters(row: Row) -> str:
  """The axes of our array that a row fills, in our order."""
  return ''.join(letter for letter in axis_letters(row.ours) if letter in row.axes)


def _numbering(row: Row) -> str:
  """The axes of our array that number a row's matrices."""
  return ''.join(letter for letter in axis_letters(row.ours) if letter not in row.axes)


def _sizes(row: Row, shape, config: ModelConfig) -> dict[str, int]:
  return {'K': config.qk_nope_head_dim, 'V': config.v_head_dim} | dict(zip(_letters(row), shape, strict=True))


def _stored_size(row: Row, letter: str, sizes) -> int:
  return sum(sizes[part] for part in row.stacked) if letter in row.stacked else sizes[letter]

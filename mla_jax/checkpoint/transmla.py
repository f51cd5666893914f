"""TransMLA (arXiv 2502.07864): a grouped-query checkpoint becomes one with latent attention.

  python -m mla_jax.checkpoint.transmla LLAMA_QWEN2_OR_MISTRAL_DIR OUT_DIR --kv_lora_rank=512 --rope_width=64
    [--calibration=FILE] [--latent_norm]

A head's width d holds d/2 pairs, each turned by its own frequency. For one frequency, take its pair in all G key heads
as G complex numbers. A real orthogonal matrix that mixes these G commutes with the rotation, so mixing keys and queries
alike changes no score:
  merge     the key heads are one latent; a query head has zeros where other heads' keys are.
  RoRoPE    the mixing is the principal components of the keys, so that the first of each frequency hold most.
  FreqFold  neighbouring frequencies count as one frequency, and are mixed together.
  drop      the first components, as many as the rope width holds, keep their rotation; the others lose it.
  balance   these and the values differ in size: the keys are divided by |K| / |V|, and multiplied in the up-projection.
  compress  the principal components of [keys without rotation ; values] are the latent.
With room for all components (rope width G d, rank G d) nothing is lost; what the rope width loses depends on how alike
the key heads are, what the rank loses on the spectrum. Both are measured, a JSON line a stage, and mended by
fine-tuning, which is part of the method.

Two outputs: without a norm on the latent (model_type 'mla_jax', which this project trains and decodes), or with
--latent_norm, a deepseek_v3 directory for transformers and vLLM; the norm changes the function.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import app, flags
from absl import logging as absl_logging
from flax import nnx

from mla_jax.checkpoint import hugging_face
from mla_jax.checkpoint.published_config import config_from_hf
from mla_jax.checkpoint.tensor_files import read_json, require_free
from mla_jax.config import ConfigError, ModelConfig
from mla_jax.model.attention import context
from mla_jax.model.block import take
from mla_jax.model.cache import bytes_per_token
from mla_jax.model.layers import rms_norm
from mla_jax.model.transformer import abstract

ROWS = 8  # sequences a forward pass


class Plan(NamedTuple):
  """How the rope width is shared out. `collapse`: frequencies a slot stands for; `repeats`: slots a frequency has."""

  rank: int
  rope_width: int
  fold: int
  collapse: int
  repeats: int

  @property
  def kept(self) -> int:
    """Components that keep their rotation, of each fold's."""
    return self.fold * self.repeats // self.collapse


def plan(config: ModelConfig, rank: int, rope_width: int, fold: int = 0) -> Plan:
  """Checks the sizes. fold 0: no more than the rope width asks for."""
  width, groups = config.qk_head_dim, config.kv_heads
  if config.attention == 'mla' or config.n_routed_experts:
    raise ConfigError('the model has latent attention or experts; give a Llama, Qwen2 or Mistral directory')
  if rope_width < 2 or rope_width % 2 or (width % rope_width and rope_width % width) or rope_width > groups * width:
    raise ConfigError(f'rope_width={rope_width} does not fit heads of width {width}, of which there are {groups}; use '
                      f'an even divisor of {width}, or a multiple of it up to {groups * width}')
  collapse, repeats = max(width // rope_width, 1), max(rope_width // width, 1)
  fold = fold or collapse
  if fold < 1 or fold % collapse or (width // 2) % fold:
    raise ConfigError(f'fold={fold} is not a multiple of head width / rope_width = {collapse} that divides the '
                      f'{width // 2} frequencies; use {collapse}')
  most = 2 * groups * width - rope_width
  if not 1 <= rank <= most:
    raise ConfigError(f'kv_lora_rank={rank} is outside 1 to {most}, all that the keys and values have; use at most '
                      f'{most}')
  return Plan(rank, rope_width, fold, collapse, repeats)


def second_moments(config: ModelConfig, params, buffers, tokens_BT) -> np.ndarray:
  """[L, D + 1, D + 1], float64: the sum over tokens of what each layer's attention reads, times itself. The number
  after the last is 1, so that biases count."""
  stack = abstract(config).graph

  @functools.partial(jax.jit, donate_argnums=2)
  def layer(params, buffers, x_BTD, index):
    model = nnx.merge(stack, params, buffers)
    block = take(model.dense_blocks, index)
    h_BTD = rms_norm(x_BTD, block.norm_attention_D[...], config.rms_norm_eps).astype(jnp.float32)
    h_MY = jnp.pad(h_BTD, ((0, 0), (0, 0), (0, 1)), constant_values=1).reshape(-1, config.hidden_size + 1)
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    x_BTD, _, _ = block(x_BTD, None, None, context(config, positions_BT))
    return x_BTD, jnp.einsum('MY,MZ->YZ', h_MY, h_MY, precision=jax.lax.Precision.HIGHEST)

  size = config.hidden_size + 1
  out_LYZ = np.zeros((config.num_hidden_layers, size, size))
  embedding_WD = jnp.asarray(params['embedding_WD'])
  for rows in range(0, len(tokens_BT), ROWS):
    x_BTD = embedding_WD[tokens_BT[rows:rows + ROWS]]
    for index in range(config.num_hidden_layers):
      x_BTD, moment_YZ = layer(params, buffers, x_BTD, index)
      out_LYZ[index] += np.asarray(moment_YZ, np.float64)
  return out_LYZ


def principal(moment) -> np.ndarray:
  """Orthonormal columns, the largest first."""
  return np.linalg.eigh(moment)[1][..., ::-1]


def convert_layer(w: dict, moment_YZ: np.ndarray, p: Plan, scale: float) -> dict[str, np.ndarray]:
  """A layer's grouped-query weights to latent ones, float64. `scale` is for queries: the softmax divides by the root of
  a larger head width."""
  queries_YNH, keys_YGH, values_YGV = (
      np.concatenate([w[f'w{x}'], w[f'b{x}'][None]]).astype(np.float64) for x in 'qkv')
  (_, heads, width), groups = queries_YNH.shape, keys_YGH.shape[1]
  folds, fold, kept = width // 2 // p.fold, p.fold, p.kept
  group_of_N = np.arange(heads) // (heads // groups)

  # J: folds of frequencies; A = (G, f): what is mixed within one. A pair's two numbers are 2.
  def pairs(x):  # [..., heads, H] -> [..., 2, heads, J, f]
    return np.moveaxis(x.reshape(*x.shape[:-1], 2, folds, fold), -3, -4)

  keys_Y2JA = np.moveaxis(pairs(keys_YGH), 2, 3).reshape(len(keys_YGH), 2, folds, groups * fold)
  mix_JAB = principal(np.einsum('YpJA,YZ,ZpJB->JAB', keys_Y2JA, moment_YZ, keys_Y2JA, optimize=True))
  first_JAB, rest_JAB = mix_JAB[..., :kept], mix_JAB[..., kept:]
  first_JAB = _by_frequency(first_JAB, groups, fold)
  mixed_Y2JB = np.einsum('YpJA,JAB->YpJB', keys_Y2JA, first_JAB)
  rope_key_YR = _to_slots(mixed_Y2JB, p)
  # A query head's share of each component: its own key head's rows of the mixing.
  shares_NJfB = np.moveaxis(first_JAB.reshape(folds, groups, fold, kept), 1, 0)[group_of_N]
  rope_query_YNR = _to_slots(np.einsum('YpNJf,NJfB->YNpJB', pairs(queries_YNH), shares_NJfB), p)

  # Keys that lose their rotation, as rows of [2, J, B], and how each key head is made of them.
  rest_YS = np.einsum('YpJA,JAB->YpJB', keys_Y2JA, rest_JAB).reshape(len(keys_YGH), -1)
  of_head = np.moveaxis(rest_JAB.reshape(folds, groups, fold, -1), 1, 0)  # [G, J, f, B]
  up_SGH = np.einsum('GJfB,pP,JI->pIBGPJf', of_head, np.eye(2), np.eye(folds), optimize=True).reshape(
      rest_YS.shape[1], groups, width)
  values_YV = values_YGV.reshape(len(values_YGV), -1)
  size = [np.einsum('YS,YZ,ZS->', x, moment_YZ, x, optimize=True) for x in (rest_YS, values_YV)]
  balance = np.sqrt(size[0] / size[1]) if min(size) > 0 else 1.0
  both_YS = np.concatenate([rest_YS / balance, values_YV], axis=1)
  basis_SC = principal(np.einsum('YS,YZ,ZU->SU', both_YS, moment_YZ, both_YS, optimize=True))[:, :p.rank]
  of_keys_SC, of_values_SC = np.split(basis_SC, [rest_YS.shape[1]])
  up_keys_CGH = balance * np.einsum('SC,SGH->CGH', of_keys_SC, up_SGH, optimize=True)
  up_values_CGV = of_values_SC.T.reshape(p.rank, groups, width)

  down_YJ = np.concatenate([both_YS @ basis_SC, rope_key_YR], axis=1)
  queries_YNH = scale * np.concatenate([queries_YNH, rope_query_YNR], axis=-1)
  return dict(wq_DNH=queries_YNH[:-1], bq_NH=queries_YNH[-1], wdkv_DJ=down_YJ[:-1], bdkv_J=down_YJ[-1],
              wuk_CNK=up_keys_CGH[:, group_of_N], wuv_CNV=up_values_CGV[:, group_of_N], wo_NVD=w['wo'])


def _by_frequency(first_JAB, groups: int, fold: int) -> np.ndarray:
  """A fold's components in the order of the frequencies they are made of: so they are given its slots."""
  share_JfB = (first_JAB**2).reshape(len(first_JAB), groups, fold, -1).sum(1)
  mean_JB = np.einsum('JfB,f->JB', share_JfB, np.arange(fold))
  return np.take_along_axis(first_JAB, np.argsort(mean_JB, axis=1, kind='stable')[:, None], axis=2)


def _to_slots(mixed, p: Plan) -> np.ndarray:
  """[..., 2, J, B] -> [..., R]: all first halves of pairs, all second. A fold's components are (slot, repeat); in the
  rope width all frequencies come once, then all again."""
  shape = mixed.shape[:-1]
  slots = mixed.reshape(*shape, p.fold // p.collapse, p.repeats)
  return np.moveaxis(slots, -1, -3).reshape(*shape[:-2], p.rope_width)


def convert(config: ModelConfig, params: dict, moments_LYZ: np.ndarray, p: Plan) -> tuple[ModelConfig, dict]:
  """The model with latent attention and no norm on the latent; its weights in the dtypes they were in."""
  width = config.qk_head_dim
  made = dataclasses.replace(
      config, attention='mla', kv_lora_rank=p.rank, qk_nope_head_dim=width, qk_rope_head_dim=p.rope_width,
      v_head_dim=width, num_key_value_heads=0, head_dim=0, latent_norm=False, rope_repeats=p.repeats)
  made.validate()
  stack = params['dense_blocks']['attention']
  layers = []
  for index, moment_YZ in enumerate(moments_LYZ):
    w = _layer_weights(stack, index)
    converted = convert_layer(w, moment_YZ, p, scale=((width + p.rope_width) / width) ** 0.5)
    layers.append({name: array.astype(w['dtype']) for name, array in converted.items()
                   if config.attention_bias or not name.startswith('b')})
  attention = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
  return made, params | dict(dense_blocks=params['dense_blocks'] | dict(attention=attention))


def _layer_weights(stack: dict, index: int) -> dict:
  out = {'dtype': stack['wq_DNH'].dtype, 'wo': np.asarray(stack['wo_NVD'][index])}
  for x, weight, bias in (('q', 'wq_DNH', 'bq_NH'), ('k', 'wk_DGH', 'bk_GH'), ('v', 'wv_DGV', 'bv_GV')):
    out[f'w{x}'] = np.asarray(stack[weight][index])
    out[f'b{x}'] = np.asarray(stack[bias][index]) if bias in stack else np.zeros_like(out[f'w{x}'][0])
  return out


def add_latent_norm(config: ModelConfig, params: dict, moments_LYZ: np.ndarray) -> tuple[ModelConfig, dict]:
  """With a norm on the latent, whose weight is the latent's root mean square over the calibration text, so that an
  average token keeps its size; others do not."""
  attention = params['dense_blocks']['attention']
  down_LDC = np.asarray(attention['wdkv_DJ'][..., :config.kv_lora_rank], np.float64)
  total_L = np.einsum('LYC,LYZ,LZC->L', down_LDC, moments_LYZ[:, :-1, :-1], down_LDC, optimize=True)
  rms_L = np.sqrt(total_L / moments_LYZ[:, -1, -1] / config.kv_lora_rank)
  norm_LC = np.repeat(rms_L[:, None], config.kv_lora_rank, axis=1).astype(attention['wdkv_DJ'].dtype)
  blocks = params['dense_blocks'] | dict(attention=attention | dict(norm_kv_C=norm_LC))
  return dataclasses.replace(config, latent_norm=True), params | dict(dense_blocks=blocks)


def perplexity(config: ModelConfig, params, buffers, tokens_BT) -> float:
  """Of each token after the first of its sequence."""
  graph = abstract(config).graph

  @jax.jit
  def nats(params, tokens_BT):
    logits_BTW, _ = nnx.merge(graph, params, buffers)(tokens_BT[:, :-1])
    logprob_BTW = jax.nn.log_softmax(logits_BTW)
    return -jnp.take_along_axis(logprob_BTW, tokens_BT[:, 1:, None], axis=-1).sum()

  total = sum(float(nats(params, tokens_BT[i:i + ROWS])) for i in range(0, len(tokens_BT), ROWS))
  return float(np.exp(total / (tokens_BT.shape[0] * (tokens_BT.shape[1] - 1))))


def read_calibration(directory: Path, file: str, sequences: int, length: int) -> np.ndarray:
  """[sequences, length] token ids, in the integers of a .npy file, or of a text through the directory's tokenizer; ''
  is the source of Python's standard library. Fewer sequences where there is less. Raises ConfigError, one line."""
  for name, value, least in (('sequences', sequences, 1), ('length', length, 2)):  # a first token is not predicted
    if value < least:
      raise ConfigError(f'--{name}={value} is below {least}; use at least {least}')
  if file.endswith('.npy'):
    try:
      tokens = np.asarray(np.load(file, allow_pickle=False)).reshape(-1)
    except (OSError, ValueError, EOFError) as error:
      raise ConfigError(f'--calibration={file} can not be read ({error}); give token ids or a text') from error
    if not np.issubdtype(tokens.dtype, np.integer):
      raise ConfigError(f'--calibration={file} holds {tokens.dtype}, not token ids; save integers')
  else:
    tokenizer = directory / 'tokenizer.json'
    if not tokenizer.is_file():
      raise ConfigError(f'{tokenizer} does not exist, so text can not be read; give a .npy of ids as --calibration')
    try:
      if file:
        text = Path(file).read_text(encoding='utf-8')
      else:
        files = sorted(Path(os.__file__).parent.glob('*.py'))
        text = ''.join(path.read_text(encoding='utf-8', errors='replace') for path in files)
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'--calibration={file} can not be read ({error}); name another file') from error
    try:
      library = tokenizers.Tokenizer.from_file(str(tokenizer))
      # A token has seldom more than 8 characters; the rest of a long text need not be cut into tokens.
      tokens = np.array(library.encode(text[:16 * sequences * length], add_special_tokens=False).ids, np.int64)
    except Exception as error:  # the library raises plain Exception
      raise ConfigError(f'{tokenizer} can not cut the calibration text into tokens ({error}); save it again, or give a '
                        '.npy of ids as --calibration') from None
  rows = min(sequences, len(tokens) // length)
  if not rows:
    raise ConfigError(f'the calibration text has {len(tokens)} tokens, fewer than one sequence of {length}; give a '
                      'longer one, or a smaller --length')
  return tokens[:rows * length].reshape(rows, length)


def run(source: Path, target: Path, tokens_BT, *, rank: int, rope_width: int, fold: int = 0, latent_norm: bool = False,
        dtype=None) -> list[dict]:
  """Converts a directory, and returns and prints a line a stage: perplexity on the calibration text, bytes a token in
  the cache. Raises ConfigError, one line."""
  config = config_from_hf(read_json(source / 'config.json'))
  p, full = plan(config, rank, rope_width, fold), 2 * config.kv_heads * config.qk_head_dim - rope_width
  wrong = tokens_BT[(tokens_BT < 0) | (tokens_BT >= config.vocab_size)]
  if wrong.size:
    raise ConfigError(f'the calibration text has token id {wrong[0]}, but the vocabulary has 0 to '
                      f'{config.vocab_size - 1}; use the tokenizer of {source}')
  if tokens_BT.shape[1] > config.max_position_embeddings:
    raise ConfigError(f"the calibration's sequences have {tokens_BT.shape[1]} tokens, above the model's "
                      f'max_position_embeddings={config.max_position_embeddings}; use a smaller --length')
  if latent_norm and (config.attention_bias or p.repeats > 1):
    what = 'attention biases' if config.attention_bias else f'rope_width={rope_width} beyond a head'
    raise ConfigError(f'--latent_norm writes a deepseek_v3 directory, which has no {what}; convert without it, or '
                      'use a model without biases and a rope_width of at most the head width')
  _, params, buffers = hugging_face.load(
      source, dtype, place=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  tokens_BT, lines = tokens_BT.astype(np.int32), []

  def report(stage, config, params):
    kind = params['embedding_WD'].dtype
    lines.append(dict(stage=stage, perplexity=perplexity(config, params, buffers, tokens_BT),
                      cache_bytes_per_token=bytes_per_token(config, kind, mtp=False), kv_lora_rank=config.kv_lora_rank
                      if config.attention == 'mla' else None))
    print(json.dumps(lines[-1]), flush=True)

  report('original', config, params)
  moments_LYZ = second_moments(config, params, buffers, tokens_BT)
  if rank < full:
    report('rotated, rope dropped outside the rope width', *convert(config, params, moments_LYZ, p._replace(rank=full)))
  made = convert(config, params, moments_LYZ, p)
  report('compressed', *made)
  if latent_norm:
    made = add_latent_norm(*made, moments_LYZ)
    report('normalised', *made)
  hugging_face.save(target, *made, buffers, tokenizer=source)
  return lines


def define_flags(flag_values: flags.FlagValues):
  """The command's flags: defined only when it runs."""
  flags.DEFINE_integer('kv_lora_rank', 512, 'Width of the latent', flag_values=flag_values)
  flags.DEFINE_integer('rope_width', 64, 'Width of the shared key that keeps its rotation', flag_values=flag_values)
  flags.DEFINE_integer('fold', 0, 'Neighbouring frequencies mixed together; 0: head width / rope_width',
                       flag_values=flag_values)
  flags.DEFINE_string('calibration', '', 'A text, or a .npy of token ids; default: Python\'s standard library',
                      flag_values=flag_values)
  flags.DEFINE_integer('sequences', 128, 'Of the calibration text, at most', flag_values=flag_values)
  flags.DEFINE_integer('length', 256, 'Of a sequence, in tokens', flag_values=flag_values)
  flags.DEFINE_bool('latent_norm', False, 'Write a deepseek_v3 directory, with a norm on the latent',
                    flag_values=flag_values)
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the weights; default: as stored',
                    flag_values=flag_values)


def main(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> int:
  f = flag_values
  try:
    if len(argv) != 3:
      raise ConfigError('usage: python -m mla_jax.checkpoint.transmla SOURCE_DIR OUT_DIR [--kv_lora_rank=512 ...]')
    source, target = map(Path, argv[1:])
    require_free(target)
    tokens_BT = read_calibration(source, f.calibration, f.sequences, f.length)
    run(source, target, tokens_BT, rank=f.kv_lora_rank, rope_width=f.rope_width, fold=f.fold,
        latent_norm=f.latent_norm, dtype=f.dtype)
  except (ConfigError, OSError) as error:
    print(f'transmla: error: {error}', file=sys.stderr)
    return 2
  print(f'{target}: written')
  return 0


if __name__ == '__main__':
  absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs there
  define_flags(flags.FLAGS)
  app.run(main)

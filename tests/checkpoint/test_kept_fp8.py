"""Weights that stay FP8 in memory: the same numbers to the bit as taken out of FP8 on loading, in half the memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest

from mla_jax.axes import make_mesh
from mla_jax.checkpoint import hugging_face, tensor_files
from mla_jax.config import Config, ConfigError, MeshConfig, ModelConfig, to_dict
from mla_jax.language_model import LanguageModel
from mla_jax.model.fp8 import chosen, is_fp8
from mla_jax.training.state import initial_state
from mla_jax.training.step import Controls, train_step
from tests.checkpoint.small import GOLDEN, assert_same_bits, random_model, stored_tensors
from tests.training import small

MLA = dict(
    vocab_size=40, hidden_size=136, num_hidden_layers=3, max_position_embeddings=96, num_attention_heads=2,
    intermediate_size=150, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=129)
# Blocks that heads cut: 192 rows a query head, 256 of keys and values, and rope rows on both sides of a block's end.
FAMILIES = {
    'v2_lite': ModelConfig(**MLA, q_lora_rank=0, kv_lora_rank=100, topk_method='greedy', scoring_func='softmax',
                           norm_topk_prob=False),
    'v2': ModelConfig(**MLA, q_lora_rank=140, kv_lora_rank=128, qk_nope_head_dim=40, qk_rope_head_dim=28, v_head_dim=66,
                      topk_method='group_limited_greedy', scoring_func='softmax', norm_topk_prob=False, n_group=4,
                      topk_group=2),
    'v3': ModelConfig(**MLA, q_lora_rank=140, kv_lora_rank=128, qk_nope_head_dim=40, qk_rope_head_dim=28, v_head_dim=66,
                      n_group=4, topk_group=2, num_nextn_predict_layers=2),
    'llama': ModelConfig(attention='gqa', num_key_value_heads=2, num_attention_heads=4, qk_nope_head_dim=20,
                         qk_rope_head_dim=28, vocab_size=40, hidden_size=136, num_hidden_layers=2,
                         intermediate_size=150, n_routed_experts=0, num_nextn_predict_layers=0,
                         max_position_embeddings=96),
}

LONG = pytest.mark.long


def write(folder, config: ModelConfig, scale_format='float32'):
  params, buffers = random_model(config)
  params = jax.tree.map(lambda w: (0.1 * w).astype(ml_dtypes.bfloat16), params)
  hugging_face.save(folder, config, params, buffers, fp8=scale_format)
  return folder


@pytest.fixture(scope='module', params=[*FAMILIES, pytest.param('random bytes', marks=LONG)])
def folder(request, tmp_path_factory):
  if request.param == 'random bytes':
    return request.getfixturevalue('fp8_folder')
  return write(tmp_path_factory.mktemp('fp8') / 'hf', FAMILIES[request.param])


def out_of_fp8(params):
  def one(w):
    for _ in range(w.bits.ndim - len(w.layout.letters) if is_fp8(w) else 0):
      return np.stack([one(w[i]) for i in range(len(w.bits))])
    return np.asarray(w.dequantise() if is_fp8(w) else w)

  return jax.tree.map(one, params, is_leaf=is_fp8)


def nbytes(tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def check_bits(folder, dtype):
  config, params, buffers = hugging_face.load(folder, dtype)
  kept = hugging_face.load(folder, dtype, fp8='keep')
  assert kept[0] == config
  matrices = [w for w in jax.tree.leaves(kept[1], is_leaf=is_fp8) if is_fp8(w)]
  published_fp8 = [t for t in tensor_files.scan(folder).values() if t.dtype == 'F8_E4M3']
  assert sum(w.bits.nbytes for w in matrices) == sum(t.nbytes for t in published_fp8)
  assert_same_bits(out_of_fp8(kept[1]), params)
  assert_same_bits(kept[2], buffers)

  models = LanguageModel(config, params, buffers), LanguageModel(*kept)
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
  assert_same_bits(*(lm.logits(tokens_BT) for lm in models))
  if config.num_nextn_predict_layers:
    assert_same_bits(*(lm.mtp_logits(tokens_BT) for lm in models))


def test_it_holds_and_computes_the_same_bits(folder):
  check_bits(folder, None)


def test_in_float32(fp8_folder):
  check_bits(fp8_folder, 'float32')


@pytest.mark.parametrize('options', [{}, pytest.param(dict(attention='expanded'), marks=LONG),
                                     pytest.param(dict(speculative='off'), marks=LONG)])
def test_it_decodes_the_same(fp8_folder, options):
  """Drafting with the MTP module, from the latents and expanded; one row has fewer rows than there are experts."""
  prompts = [[1, 2, 3], [4]]
  models = [LanguageModel.load(fp8_folder, fp8=fp8) for fp8 in ('dequantise', 'keep')]
  one, other = (lm.generate(prompts, max_new_tokens=24, **options) for lm in models)
  assert [c.tokens for c in other] == [c.tokens for c in one]
  assert [c.logprobs for c in other] == [c.logprobs for c in one]
  assert other.stats.acceptance_rate == one.stats.acceptance_rate
  assert len(one.stats.acceptance_rate) == (options.get('speculative') != 'off')


@LONG
def test_it_drafts_with_several_modules(tmp_path):
  source = write(tmp_path / 'hf', dataclasses.replace(FAMILIES['v3'], num_hidden_layers=1, first_k_dense_replace=0))
  models = [LanguageModel.load(source, fp8=fp8) for fp8 in ('dequantise', 'keep')]
  one, other = (lm.generate([[7, 8]], max_new_tokens=24, draft_tokens=3) for lm in models)
  assert (other[0].tokens, other[0].logprobs) == (one[0].tokens, one[0].logprobs)
  assert other.stats.acceptance_rate == one.stats.acceptance_rate


@pytest.mark.parametrize('sizes', [[0, 3, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 4], [0] * 9,
                                   [1, 1, 1, 1, 0, 0, 0, 0, 0]])
def test_only_experts_that_have_rows_leave_fp8(tmp_path, sizes):
  config = dataclasses.replace(FAMILIES['v3'], n_routed_experts=9, n_group=1, topk_group=1, num_nextn_predict_layers=0)
  params = hugging_face.load(write(tmp_path / 'hf', config), fp8='keep')[1]
  w = params['moe_blocks']['ffn']['wo_EFD'][0]
  some, (few, same) = jax.jit(chosen, static_argnums=1)(np.array(sizes, np.int32), 4, w, np.arange(9))
  assert few.shape == (4, *w.shape[1:])
  there = np.flatnonzero(sizes)
  assert some.tolist() == [sizes[e] for e in there] + [0] * (4 - len(there))
  assert same[:len(there)].tolist() == there.tolist()
  assert_same_bits(few[:len(there)], out_of_fp8({'w': w})['w'][there])


@pytest.mark.long
@pytest.mark.parametrize('rows', [1, 12])
def test_memory(tmp_path, rows):
  """Weights take half. While decoding, one layer of them at a time is out of FP8 (with 12 rows all its experts, with
  one row a few), and what is the same in every round, so that XLA does it once: the only dense layer, and the MTP
  module but for its experts."""
  config = ModelConfig(
      vocab_size=40, hidden_size=256, num_hidden_layers=6, max_position_embeddings=96, num_attention_heads=2,
      q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=256,
      first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=256,
      num_nextn_predict_layers=1)
  write(tmp_path / 'hf', config)
  held, besides = {}, {}
  for fp8 in ('dequantise', 'keep'):
    lm = LanguageModel.load(tmp_path / 'hf', fp8=fp8)
    held[fp8] = nbytes(lm.decoder.params)
    run = LanguageModel.load(tmp_path / 'hf', 'float32', fp8).decoder.start([[1, 2]] * rows, max_new_tokens=2)
    besides[fp8] = run._rounds.memory_analysis().temp_size_in_bytes
  assert 0.5 < held['keep'] / held['dequantise'] < 0.51
  params = hugging_face.load(tmp_path / 'hf', 'float32')[1]
  experts = [params['mtp_modules']['block']['ffn'].pop(name) for name in ('wi_ED2F', 'wo_EFD')]
  once = nbytes(params['dense_blocks']) + nbytes(params['mtp_modules'])
  layer = nbytes(params['moe_blocks']) / 5 - (nbytes(experts) / 2 if rows == 1 else 0)
  assert besides['keep'] < besides['dequantise'] + layer + once


def test_in_out_in_is_the_same_to_the_bit(folder, tmp_path):
  lm = LanguageModel.load(folder, fp8='keep')
  lm.save_hf(tmp_path / 'out')
  theirs, ours = stored_tensors(folder), stored_tensors(tmp_path / 'out')
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    assert_same_bits(ours[name], tensor)
  assert_same_bits(hugging_face.load(tmp_path / 'out', fp8='keep')[1:], hugging_face.load(folder, fp8='keep')[1:])


def test_other_forms_of_kept_weights(fp8_folder, tmp_path):
  """Out of FP8, or with other scales: what it would be if it had been taken out of FP8 on loading."""
  kept, plain = (LanguageModel.load(fp8_folder, fp8=fp8) for fp8 in ('keep', 'dequantise'))
  for name, options in dict(bf16=dict(dtype='bfloat16'), f32=dict(dtype='float32'), ue8m0=dict(fp8='ue8m0')).items():
    kept.save_hf(tmp_path / name, **options)
    plain.save_hf(tmp_path / f'{name}_plain', **options)
    ours, theirs = (stored_tensors(tmp_path / folder) for folder in (name, f'{name}_plain'))
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
      assert_same_bits(ours[tensor], value)
    configs = [json.loads((tmp_path / folder / 'config.json').read_text()) for folder in (name, f'{name}_plain')]
    assert configs[0] == configs[1]


@pytest.mark.parametrize('block', [[128, 128], [64, 32]])
@pytest.mark.parametrize('scale_dtype', [np.float32, ml_dtypes.float8_e8m0fnu])
def test_scales_are_written_as_they_were(tmp_path, block, scale_dtype):
  """Powers of two in either dtype; and blocks of another size, as other tools make."""
  config = FAMILIES['v3']
  tensors = stored_tensors(write(tmp_path / 'made', config, 'ue8m0'))
  for name in [n for n in tensors if n.endswith('_scale_inv')]:
    shape = tensors[name.removesuffix('_scale_inv')].shape
    for axis in (0, 1):
      count = -(-shape[axis] // block[axis])
      tensors[name] = np.repeat(tensors[name], 128 // block[axis], axis).take(range(count), axis)
    tensors[name] = tensors[name].astype(scale_dtype)
  (tmp_path / 'hf').mkdir()
  groups = [(tensor_files.Entry(n, t.dtype, t.shape),) for n, t in tensors.items()]
  tensor_files.write(tmp_path / 'hf', groups, lambda group: (tensors[group[0].name],), 10**9, lambda _: None)
  values = json.loads((tmp_path / 'made/config.json').read_text())
  values['quantization_config']['weight_block_size'] = block
  (tmp_path / 'hf/config.json').write_text(json.dumps(values))

  kept = hugging_face.load(tmp_path / 'hf', fp8='keep')
  assert_same_bits(out_of_fp8(kept[1]), hugging_face.load(tmp_path / 'made')[1])
  hugging_face.save(tmp_path / 'out', *kept)
  for name, tensor in stored_tensors(tmp_path / 'out').items():
    assert_same_bits(tensor, tensors[name])
  written = json.loads((tmp_path / 'out/config.json').read_text())
  assert written['quantization_config'] == values['quantization_config']


@LONG
def test_eight_devices():
  """Split like the arrays they stand for, scales with their experts; forward pass and saving from there."""
  environment = os.environ | dict(
      XLA_FLAGS=os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=8',
      PYTHONPATH=str(Path(__file__).parents[2]))
  run = subprocess.run([sys.executable, '-m', 'tests.checkpoint.kept_on_devices'], env=environment, capture_output=True,
                       text=True, timeout=600, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{')]
  assert [(line['mesh'], line['few']) for line in lines] == [
      ([2, 2, 2], [False]), ([1, 8, 1], [False]), ([8, 1, 1], [True]), ([2, 4, 1], [True]), ([4, 1, 2], [True])]
  for line in lines:
    assert line['same_logits'], line
    assert line['same_files'], line
    _, fsdp, expert = line['mesh']
    assert line['wi_ED2F'] == [2, 16 // expert, 136 // fsdp, 2, 129]
    assert line['scales'] == [2, 16 // expert, 2, 2, 2]


def line_of(error, function, *args, **options) -> str:
  with pytest.raises(error) as caught:
    function(*args, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_what_can_not_be_kept_is_one_clear_line(tmp_path, fp8_folder):
  def line(folder, fp8='keep'):
    return line_of(ConfigError, LanguageModel.load, folder, fp8=fp8)

  assert line(GOLDEN / 'v3').endswith('golden/v3 has no FP8 weights to keep; leave fp8=keep out')
  assert "fp8='int4' is unknown; use one of 'dequantise', 'keep'" in line(GOLDEN / 'v3', 'int4')
  tensors = stored_tensors(fp8_folder)

  def changed(**changes):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    (folder / 'config.json').write_text((fp8_folder / 'config.json').read_text())
    new = {name: t for name, t in (tensors | changes).items() if t is not None}
    groups = [(tensor_files.Entry(n, t.dtype, t.shape),) for n, t in new.items()]
    tensor_files.write(folder, groups, lambda group: (new[group[0].name],), 10**9, lambda _: None)
    return folder

  name = 'model.layers.1.self_attn.o_proj.weight'
  mixed = changed(**{name: tensors[name].astype(ml_dtypes.bfloat16), name + '_scale_inv': None})
  assert f'{name} is BF16, but fp8=keep needs F8_E4M3 in the matrices of attention and experts' in line(mixed)
  LanguageModel.load(mixed)
  scales = tensors[name + '_scale_inv'].copy()
  scales[0, 0] = np.nan
  assert f'{name}_scale_inv holds NaN or infinity' in line(changed(**{name + '_scale_inv': scales}))
  embedding = tensors['model.embed_tokens.weight']
  extra = changed(**{'model.embed_tokens.weight': embedding.astype(ml_dtypes.float8_e4m3fn),
                     'model.embed_tokens.weight_scale_inv': np.ones((1, 2), np.float32)})
  assert 'model.embed_tokens.weight is F8_E4M3, but fp8=keep needs' in line(extra)
  half = changed(**{name: tensor.astype(np.float16) for name, tensor in tensors.items()
                    if name.endswith(('embed_tokens.weight', 'head.weight'))})
  said = [line_of(ConfigError, LanguageModel.load, half, dtype, fp8='keep') for dtype in (None, 'float16')]
  said.append(line_of(ConfigError, LanguageModel, *hugging_face.load(half, 'bfloat16', fp8='keep'), dtype='float16'))
  assert set(said) == {'fp8=keep computes in bfloat16 or float32, not float16; give one as dtype, or fp8=dequantise'}
  assert LanguageModel.load(half, 'bfloat16', fp8='keep').decoder.dtype == ml_dtypes.bfloat16
  (tmp_path / 'config.json').write_text(json.dumps(to_dict(Config())))
  assert 'is a workdir of train.py, which has no FP8 weights; leave it out' in line(tmp_path)


def test_training_refuses_them(fp8_folder):
  model, params, _ = hugging_face.load(fp8_folder, fp8='keep')
  config, optimizer = dataclasses.replace(small.config(batch_size=1), model=model), optax.identity()
  state = initial_state(model, optimizer, 0, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  line = line_of(ConfigError, train_step(config, optimizer), dataclasses.replace(state, params=params),
                 small.batch(1, 24), Controls(*map(np.float32, (1.0, 0.3, 1e-3))))
  assert line == "weights that are kept in FP8 have no gradients; to train them, load with fp8='dequantise'"

"""Reading Hugging Face directories: what is in them arrives, and what is wrong with them is said in one line."""

import copy
import dataclasses
import importlib
import itertools
import json
import logging
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mla_jax.axes import is_variable
from mla_jax.checkpoint import agreement, hugging_face, published
from mla_jax.checkpoint.published_config import config_from_hf
from mla_jax.checkpoint.tensor_files import HFError, Stored
from mla_jax.config import ConfigError, RopeScaling
from mla_jax.model import transformer

GOLDEN = Path(__file__).parents[1] / 'golden'
CASES = ('v2_lite', 'v2', 'v3', 'v3_plain', 'v3_dense')

# The published config.json files, without what says nothing about the network.
YARN = dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096, type='yarn')
V2_LITE = dict(
    model_type='deepseek_v2', architectures=['DeepseekV2ForCausalLM'], attention_bias=False, hidden_act='silu',
    aux_loss_alpha=0.001, first_k_dense_replace=1, hidden_size=2048, initializer_range=0.02, intermediate_size=10944,
    kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1,
    n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6,
    num_hidden_layers=27, num_key_value_heads=16, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
    rms_norm_eps=1e-6, rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707), rope_theta=10000,
    routed_scaling_factor=1.0, scoring_func='softmax', tie_word_embeddings=False, topk_group=1, topk_method='greedy',
    torch_dtype='bfloat16', v_head_dim=128, vocab_size=102400)
V2 = V2_LITE | dict(
    hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, n_group=8, n_routed_experts=160,
    num_attention_heads=128, num_hidden_layers=60, num_key_value_heads=128, q_lora_rank=1536,
    routed_scaling_factor=16.0, topk_group=3, topk_method='group_limited_greedy')
V3 = V2 | dict(
    model_type='deepseek_v3', architectures=['DeepseekV3ForCausalLM'], first_k_dense_replace=3, hidden_size=7168,
    intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_experts_per_tok=8, num_hidden_layers=61, num_nextn_predict_layers=1,
    rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0), routed_scaling_factor=2.5, scoring_func='sigmoid',
    topk_group=4, topk_method='noaux_tc', vocab_size=129280)
FP8 = dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic', weight_block_size=[128, 128])
PUBLISHED = {'deepseek_v2_lite': V2_LITE, 'deepseek_v2': V2, 'deepseek_v3': V3}


def stored_tensors(folder) -> dict[str, np.ndarray]:
  return {name: tensor for file in sorted(folder.glob('*.safetensors')) for name, tensor in load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
  """A copy of the V3 case (two shards, an index, MTP layers in a third file) to damage."""
  shutil.copytree(GOLDEN / 'v3', tmp_path / 'hf')
  return tmp_path / 'hf'


def rewrite(folder, change):
  """Applies `change` to all tensors and stores them in one file without an index."""
  tensors = stored_tensors(folder)
  change(tensors)
  for file in [*folder.glob('*.safetensors'), folder / 'model.safetensors.index.json']:
    file.unlink(missing_ok=True)
  save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / 'model.safetensors')


def rewrite_config(folder, **changes):
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(values | changes))


def assert_equal(trees, others):
  for ours, theirs in zip(trees, others, strict=True):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize('name', CASES)
def test_structure_is_the_models(name):
  config, params, buffers = hugging_face.load(GOLDEN / name)
  stored = np.float32 if name == 'v3_plain' else ml_dtypes.bfloat16
  for tree, abstract in zip((params, buffers), transformer.abstract(config)[1:], strict=True):
    shapes = jax.tree.map(lambda v: v.shape, abstract, is_leaf=is_variable)
    assert jax.tree.map(lambda a: a.shape, tree) == shapes
  assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(stored)}
  assert {a.dtype for a in jax.tree.leaves(buffers)} <= {np.dtype(np.float32)}


@pytest.mark.parametrize('name', CASES)
def test_the_table_reads_both_ways(name):
  """Every published tensor can be rebuilt, bit by bit, from our arrays through the same views."""
  config, params, buffers = hugging_face.load(GOLDEN / name)
  arrays = {tuple(k.key for k in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params | buffers)}
  stored = stored_tensors(GOLDEN / name)
  rebuilt, covered = {}, dict.fromkeys(arrays, 0)
  for place in itertools.chain(*published.places(config, {path: a.shape for path, a in arrays.items()}).values()):
    tensor = rebuilt.setdefault(place.name, np.zeros_like(stored[place.name]))
    for theirs, ours in published.views(tensor, arrays[place.path][place.index], place.row, config):
      theirs[...] = ours
      covered[place.path] += ours.size
  assert covered == {path: a.size if config.uses_selection_bias or path != ('bias_LE',) else 0
                     for path, a in arrays.items()}
  repeats = {n for n in stored if n.endswith(('.embed_tokens.weight', 'shared_head.head.weight')) and 'layers' in n}
  assert rebuilt.keys() == stored.keys() - repeats
  for tensor_name, tensor in rebuilt.items():
    np.testing.assert_array_equal(tensor, stored[tensor_name])


def test_some_tensors_lie_where_they_should():
  _, params, buffers = hugging_face.load(GOLDEN / 'v3')
  stored = stored_tensors(GOLDEN / 'v3')
  layer = stored['model.layers.2.self_attn.q_b_proj.weight']  # the second MoE layer; [heads x (12 + 8), 24]
  wuq_QNH = params['moe_blocks']['attention']['wuq_QNH'][1]
  np.testing.assert_array_equal(wuq_QNH[:, 3, :12], layer[60:72].T)
  np.testing.assert_array_equal(wuq_QNH[:, 3, 12:], layer[[72, 74, 76, 78, 73, 75, 77, 79]].T)
  kv_b = stored['model.layers.0.self_attn.kv_b_proj.weight']  # a head: 12 rows of keys, 10 of values
  np.testing.assert_array_equal(params['dense_blocks']['attention']['wuk_CNK'][0, :, 1], kv_b[22:34].T)
  np.testing.assert_array_equal(params['dense_blocks']['attention']['wuv_CNV'][0, :, 1], kv_b[34:44].T)
  up = stored['model.layers.4.mlp.experts.5.up_proj.weight']  # the second MTP module
  np.testing.assert_array_equal(params['mtp_modules']['block']['ffn']['wi_ED2F'][1, 5, :, 1], up.T)
  np.testing.assert_array_equal(buffers['bias_LE'][3], stored['model.layers.4.mlp.gate.e_score_correction_bias'])


def released_v3() -> dict[str, tuple[int, ...]]:
  """Names and shapes of all tensors of DeepSeek-V3, R1 and V3.1, written down from the release's own dimensions."""
  out = {'model.embed_tokens.weight': (129280, 7168), 'model.norm.weight': (7168,), 'lm_head.weight': (129280, 7168)}

  def matrix(name, *shape):
    out[name] = shape
    out[f'{name}_scale_inv'] = tuple((size + 127) // 128 for size in shape)

  def mlp(prefix, width):
    matrix(f'{prefix}gate_proj.weight', width, 7168)
    matrix(f'{prefix}up_proj.weight', width, 7168)
    matrix(f'{prefix}down_proj.weight', 7168, width)

  for layer in range(62):
    prefix = f'model.layers.{layer}.'
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      out[f'{prefix}{norm}.weight'] = (7168,)
    matrix(f'{prefix}self_attn.q_a_proj.weight', 1536, 7168)
    out[f'{prefix}self_attn.q_a_layernorm.weight'] = (1536,)
    matrix(f'{prefix}self_attn.q_b_proj.weight', 24576, 1536)
    matrix(f'{prefix}self_attn.kv_a_proj_with_mqa.weight', 576, 7168)
    out[f'{prefix}self_attn.kv_a_layernorm.weight'] = (512,)
    matrix(f'{prefix}self_attn.kv_b_proj.weight', 32768, 512)
    matrix(f'{prefix}self_attn.o_proj.weight', 7168, 16384)
    if layer < 3:
      mlp(f'{prefix}mlp.', 18432)
      continue
    out[f'{prefix}mlp.gate.weight'], out[f'{prefix}mlp.gate.e_score_correction_bias'] = (256, 7168), (256,)
    mlp(f'{prefix}mlp.shared_experts.', 2048)
    for expert in range(256):
      mlp(f'{prefix}mlp.experts.{expert}.', 2048)
  prefix = 'model.layers.61.'
  out |= {f'{prefix}enorm.weight': (7168,), f'{prefix}hnorm.weight': (7168,), f'{prefix}eh_proj.weight': (7168, 14336),
          f'{prefix}embed_tokens.weight': (129280, 7168), f'{prefix}shared_head.norm.weight': (7168,),
          f'{prefix}shared_head.head.weight': (129280, 7168)}
  return out


def test_all_tensors_of_the_released_v3():
  expected = released_v3()
  assert len(expected) == 91_991
  config = config_from_hf(V3)
  shapes = published.shapes(config)
  assert published.tensors(config, shapes, fp8=True) == expected
  # What the loader itself asks of a directory with these headers.
  def header(name, shape):
    fp8 = f'{name}_scale_inv' in expected
    return Stored(Path('file'), 'F8_E4M3' if fp8 else 'F32' if 'inv' in name or 'bias' in name else 'BF16', shape, 0)

  stored = {name: header(name, shape) for name, shape in expected.items()}
  values = V3 | dict(quantization_config=FP8)
  found, repeats = published.tensors(config, shapes), published.repeats(config)
  assert agreement.check('R1', values, stored, found, repeats) == (128, 128)
  lost = 'model.layers.61.mlp.experts.255.down_proj.weight_scale_inv'
  with pytest.raises(HFError, match=f'{lost} is missing'):
    agreement.check('R1', values, {name: s for name, s in stored.items() if name != lost}, found, repeats)


def test_a_dtype_leaves_norms_and_routers_in_float32():
  _, params, buffers = hugging_face.load(GOLDEN / 'v3', dtype=np.float16)
  kinds = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  assert {name for name, kind in kinds.items() if kind == np.float32} == {n for n in kinds if n[:4] in ('norm', 'rout')}
  assert set(kinds.values()) == {np.dtype(np.float16), np.dtype(np.float32)}
  assert {a.dtype for a in jax.tree.leaves(buffers)} <= {np.dtype(np.float32)}


def test_how_a_directory_is_cut_and_stored_does_not_matter(folder):
  expected = hugging_face.load(folder, dtype=np.float32)[1:]
  (folder / 'model.safetensors.index.json').unlink()
  assert_equal(hugging_face.load(folder, dtype=np.float32)[1:], expected)  # several files, no index
  # One file; some tensors float32, which widens the arrays they share with others, and none of the repeats.
  def change(tensors):
    name = 'model.layers.2.mlp.experts.0.up_proj.weight'
    tensors[name] = tensors[name].astype(np.float32)
    del tensors['model.layers.3.embed_tokens.weight'], tensors['model.layers.3.shared_head.head.weight']
  rewrite(folder, change)
  params, buffers = hugging_face.load(folder)[1:]
  assert_equal((params, buffers), expected)
  assert params['moe_blocks']['ffn']['wi_ED2F'].dtype == np.float32
  assert params['moe_blocks']['ffn']['wo_EFD'].dtype == ml_dtypes.bfloat16


def test_float16_and_names_of_dtypes(folder):
  expected = hugging_face.load(folder, dtype='float16')[1:]
  rewrite(folder, lambda tensors: tensors.update({n: t.astype(np.float16) for n, t in tensors.items()}))
  params, buffers = hugging_face.load(folder)[1:]
  assert {w.dtype for w in jax.tree.leaves(params)} == {np.dtype(np.float16)}
  assert {a.dtype for a in jax.tree.leaves(buffers)} <= {np.dtype(np.float32)}
  assert_equal([params], expected[:1])
  assert jax.tree.leaves(hugging_face.load(folder, dtype='bfloat16')[1]['embedding_WD'])[0].dtype == ml_dtypes.bfloat16


def test_mtp_layers_that_were_dropped_are_said(folder, caplog):
  expected = hugging_face.load(folder)[1]
  rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(('model.layers.3.',
                                                                                           'model.layers.4.'))])
  with caplog.at_level(logging.WARNING):
    config, params, buffers = hugging_face.load(folder)
  assert config.num_nextn_predict_layers == 0
  assert 'num_nextn_predict_layers=2, but the files hold no MTP layer' in caplog.text
  del expected['mtp_modules']
  assert_equal([params], [expected])
  assert buffers['bias_LE'].shape == (2, 8)


def test_tied_head_may_be_repeated(tmp_path):
  shutil.copytree(GOLDEN / 'v3_plain', tmp_path / 'hf')
  expected = hugging_face.load(tmp_path / 'hf')
  assert expected[0].tie_word_embeddings
  assert 'head_WD' not in expected[1]
  rewrite(tmp_path / 'hf', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight']}))
  assert_equal(hugging_face.load(tmp_path / 'hf')[1:], expected[1:])
  rewrite(tmp_path / 'hf', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] * 2}))
  with pytest.raises(HFError, match=r'lm_head.weight differs from model.embed_tokens.weight'):
    hugging_face.load(tmp_path / 'hf')


def scale(tensors, name):
  tensors[name] = (tensors[name].astype(np.float32) * 2).astype(tensors[name].dtype)


BAD_TENSORS = {
    'missing': (lambda t: t.pop('model.layers.1.mlp.experts.7.down_proj.weight'),
                'missing 1 (model.layers.1.mlp.experts.7.down_proj.weight)'),
    'missing bias': (lambda t: t.pop('model.layers.3.mlp.gate.e_score_correction_bias'),
                     'missing 1 (model.layers.3.mlp.gate.e_score_correction_bias)'),
    'missing norm': (lambda t: t.pop('model.layers.4.shared_head.norm.weight'),
                     'missing 1 (model.layers.4.shared_head.norm.weight)'),
    'half of MTP': (lambda t: [t.pop(n) for n in list(t) if n.startswith('model.layers.4.')],
                    'missing 42 (model.layers.4.enorm.weight, '),
    'extra': (lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': np.zeros(3, np.float32)}),
              'extra 1 (model.layers.0.self_attn.q_proj.bias)'),
    'a layer too many': (lambda t: t.update({'model.layers.5.input_layernorm.weight': np.zeros(48, np.float32)}),
                         'extra 1 (model.layers.5.input_layernorm.weight)'),
    'transposed': (lambda t: t.update({'model.layers.0.self_attn.o_proj.weight':
                                       t['model.layers.0.self_attn.o_proj.weight'].T}),
                   'misshapen 1 (model.layers.0.self_attn.o_proj.weight is [40, 48], not [48, 40])'),
    'renamed': (lambda t: t.update({'lm_head': t.pop('lm_head.weight')}),
                'missing 1 (lm_head.weight); extra 1 (lm_head)'),
    'another embedding': (lambda t: scale(t, 'model.layers.3.embed_tokens.weight'),
                          'model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight'),
    'another head': (lambda t: scale(t, 'model.layers.3.shared_head.head.weight'),
                     'model.layers.3.shared_head.head.weight differs from lm_head.weight'),
    'FP8': (lambda t: t.update({'lm_head.weight': np.zeros((60, 48), ml_dtypes.float8_e4m3fn)}),
            'lm_head.weight is F8_E4M3, but config.json has no quantization_config'),
    'integers': (lambda t: t.update({'model.norm.weight': np.zeros(48, np.int64)}), 'model.norm.weight is I64'),
}


@pytest.mark.parametrize('name', BAD_TENSORS)
def test_bad_tensors_are_named(folder, name):
  change, line = BAD_TENSORS[name]
  rewrite(folder, change)
  with pytest.raises(HFError) as error:
    hugging_face.load(folder)
  assert line in str(error.value)
  assert '\n' not in str(error.value)


def cut_short(folder):
  file = folder / 'mtp.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


BAD_FILES = {
    'no directory': (shutil.rmtree, 'config.json does not exist'),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config.json does not exist'),
    'broken config': (lambda f: (f / 'config.json').write_text('{"model_type": '), 'can not be read as JSON'),
    'a list': (lambda f: (f / 'config.json').write_text('[]'), 'config.json is no JSON object'),
    'a lost shard': (lambda f: (f / 'mtp.safetensors').unlink(),
                     '1 of the files that model.safetensors.index.json names do not exist (mtp.safetensors)'),
    'no weights': (lambda f: [p.unlink() for p in f.glob('model*')] + [(f / 'mtp.safetensors').unlink()],
                   'has no *.safetensors file'),
    'cut short': (cut_short, 'mtp.safetensors can not be read'),
    'empty file': (lambda f: (f / 'mtp.safetensors').write_bytes(b''), 'mtp.safetensors can not be read'),
    'twice': (lambda f: shutil.copy(f / 'mtp.safetensors', f / 'more.safetensors'),
              'is in more.safetensors and in mtp.safetensors; remove one'),
    'AWQ': (lambda f: rewrite_config(f, quantization_config={'quant_method': 'awq', 'bits': 4}),
            "'awq', 'bits': 4} is not supported; only quant_method 'fp8'"),
    'other sizes': (lambda f: rewrite_config(f, kv_lora_rank=24), 'misshapen 15 ('),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files_are_one_clear_line(folder, name):
  change, line = BAD_FILES[name]
  change(folder)
  with pytest.raises(HFError) as error:
    hugging_face.load(folder)
  assert line in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configs(name):
  """Old spelling, transformers 5's, and our own config file say the same."""
  values = PUBLISHED[name]
  expected = dataclasses.replace(importlib.import_module(f'configs.{name}').model(), initializer_range=0.02,
                                 aux_loss_alpha=0.001)
  assert config_from_hf(values) == expected
  newer = copy.deepcopy(values)
  rope = newer.pop('rope_scaling')
  newer['rope_parameters'] = rope | dict(rope_type=rope.pop('type'), rope_theta=newer.pop('rope_theta'))
  del newer['scoring_func'], newer['moe_layer_freq'], newer['hidden_act']  # transformers 5 leaves them to the type
  if name == 'deepseek_v3':
    del newer['topk_method']
  assert config_from_hf(newer) == expected


GROUPED = dict(hidden_act='silu', hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
               num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5,
               tie_word_embeddings=False, torch_dtype='bfloat16', vocab_size=32000)


@pytest.mark.parametrize(('values', 'expected'), [
    # Llama-2-7B leaves some to defaults; Mistral-7B-v0.1; Qwen2.5-0.5B.
    (dict(model_type='llama', attention_bias=False, mlp_bias=False, num_key_value_heads=None, rope_scaling=None,
          pretraining_tp=1), dict(kv_heads=32, qk_head_dim=128, rope_theta=10000.0, attention_bias=False)),
    (dict(model_type='mistral', sliding_window=4096, rope_theta=10000.0, head_dim=None),
     dict(kv_heads=8, qk_head_dim=128, attention_bias=False)),
    (dict(model_type='qwen2', hidden_size=896, num_attention_heads=14, num_key_value_heads=2, rope_theta=1000000.0,
          sliding_window=32768, use_sliding_window=False, max_window_layers=21, tie_word_embeddings=True),
     dict(kv_heads=2, qk_head_dim=64, attention_bias=True, rope_theta=1000000.0, tie_word_embeddings=True)),
])
def test_grouped_query_configs(values, expected, caplog):
  config = config_from_hf(GROUPED | values)
  assert config.attention == 'gqa'
  assert {key: getattr(config, key) for key in expected} == expected
  assert ('sliding_window=4096 is not kept' in caplog.text) == (values['model_type'] == 'mistral')
  with pytest.raises(ConfigError, match="only type 'yarn'"):
    config_from_hf(GROUPED | values | dict(rope_scaling=dict(rope_type='llama3', factor=8.0)))
  with pytest.raises(ConfigError, match='mla'):
    config_from_hf(GROUPED | values | dict(rope_scaling=YARN))


def test_what_null_means():
  values = V2_LITE | dict(n_group=None, topk_group=None, n_shared_experts=None, rope_scaling=None, num_nextn=None)
  made = config_from_hf(values)
  assert (made.q_lora_rank, made.n_group, made.topk_group, made.n_shared_experts) == (0, 1, 1, 0)
  assert made.rope_scaling == RopeScaling()
  assert config_from_hf(values | dict(n_routed_experts=None, num_experts_per_tok=None)).num_moe_layers == 0


def test_yarn_without_mscale_all_dim_keeps_the_softmax_scale():
  made = config_from_hf(V3 | dict(rope_scaling=YARN))
  assert made.softmax_scale == pytest.approx(192**-0.5)
  assert made.rope_scaling.attention_factor(made.rope_scaling.mscale) > 1


@pytest.mark.parametrize(('changes', 'line'), [
    (dict(model_type='gpt2'), "model_type='gpt2' is unknown; use one of 'deepseek_v2', 'deepseek_v3'"),
    (dict(model_type=None), 'model_type=None is unknown'),
    (dict(kv_lora_rank=None, v_head_dim=None), 'config.json lacks kv_lora_rank, v_head_dim'),
    (dict(moe_intermediate_size=None), 'config.json lacks moe_intermediate_size'),
    (dict(hidden_size='wide'), "hidden_size='wide' is no int"),
    (dict(norm_topk_prob='yes'), "norm_topk_prob='yes' is no bool"),
    (dict(hidden_act='gelu'), "hidden_act='gelu' is not supported; only 'silu' is"),
    (dict(attention_bias=True), 'attention_bias=True is not supported'),
    (dict(moe_layer_freq=2), 'moe_layer_freq=2 is not supported; only 1 is'),
    (dict(rope_interleave=False), 'rope_interleave=False is not supported'),
    (dict(rope_scaling=dict(type='linear', factor=2)), "only type 'yarn'"),
    (dict(rope_scaling=YARN | dict(attention_factor=1.2)), 'attention_factor'),
    (dict(rope_scaling=dict(type='yarn')), 'lacks factor'),
    (dict(rope_scaling=YARN | dict(mscale='big')), "mscale='big' is no number"),
    (dict(topk_method='group_limited'), "topk_method='group_limited' is unknown"),
    (dict(n_group=7), 'n_routed_experts=256 is not divisible by n_group=7'),
    (dict(qk_rope_head_dim=63), 'qk_rope_head_dim=63 is odd'),
])
def test_bad_configs_are_one_clear_line(changes, line):
  with pytest.raises(ConfigError) as error:
    config_from_hf(V3 | changes)
  assert line in str(error.value)
  assert '\n' not in str(error.value)

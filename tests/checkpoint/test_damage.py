"""Damaged and hostile directories: each is one clear line, and nothing of it runs."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mla_jax.checkpoint import hugging_face, tensor_files
from mla_jax.checkpoint.published_config import config_from_hf, config_to_hf, fp8_block
from mla_jax.checkpoint.tensor_files import HFError
from mla_jax.config import ConfigError, RopeScaling
from tests.checkpoint.small import GOLDEN, WIDE, assert_same_bits, random_model, stored_tensors


def test_what_is_derived_is_checked_and_code_is_not_run(tmp_path, caplog):
  """Frequencies beside the weights (Llama 2), the same model in another layout (Mistral), pickles, modelling code."""
  config = dataclasses.replace(WIDE, attention='gqa', num_key_value_heads=1, head_dim=8, n_routed_experts=0,
                               num_nextn_predict_layers=0)
  params, _ = random_model(config)
  hugging_face.save(tmp_path / 'hf', config, params, {})
  values = json.loads((tmp_path / 'hf/config.json').read_text())
  (tmp_path / 'hf/config.json').write_text(json.dumps(values | dict(auto_map=dict(AutoModel='mine.Model'))))
  (tmp_path / 'hf/mine.py').write_text('raise SystemExit')
  (tmp_path / 'hf/pytorch_model.bin').write_bytes(b'cos\nsystem\n.')
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  save_file({name: 10000 ** -(np.arange(4, dtype=np.float32) / 4)}, tmp_path / 'hf/more.safetensors')
  save_file({'tok_embeddings.weight': np.ones(3)}, tmp_path / 'hf/consolidated.safetensors')
  assert_same_bits(hugging_face.load(tmp_path / 'hf')[1], params)
  assert 'consolidated*.safetensors is left out' in caplog.text
  save_file({name: np.ones(4, np.float32)}, tmp_path / 'hf/more.safetensors')
  with pytest.raises(HFError, match=r"inv_freq is not what config\.json's rope settings give"):
    hugging_face.load(tmp_path / 'hf')
  for file in (tmp_path / 'hf').glob('*.safetensors'):
    file.unlink()
  with pytest.raises(HFError, match=r'no \*\.safetensors file; pytorch_model\.bin is a pickle, which can run code'):
    hugging_face.load(tmp_path / 'hf')


def spoil_scale(tensors, value):
  name = next(n for n in tensors if n.endswith('_scale_inv'))
  tensors[name] = tensors[name].copy()
  tensors[name].flat[-1] = value


BAD_FP8 = {
    'NaN scale': (lambda t: spoil_scale(t, np.nan), 'weight_scale_inv holds NaN or infinity'),
    'no scale': (lambda t: t.pop('model.layers.0.mlp.up_proj.weight_scale_inv'),
                 'up_proj.weight is F8_E4M3, but model.layers.0.mlp.up_proj.weight_scale_inv is missing'),
    'short scale': (lambda t: t.update({'model.layers.0.mlp.up_proj.weight_scale_inv': np.ones((2, 1), np.float32)}),
                    'weight_scale_inv is F32 [2, 1], not F32 or F8_E8M0 [2, 2], one a block of [128, 128]'),
    'scale of nothing': (lambda t: t.update({'model.norm.weight_scale_inv': np.ones(2, np.float32)}),
                         'extra 1 (model.norm.weight_scale_inv)'),
    'E5M2': (lambda t: t.update({'lm_head.weight': np.zeros((40, 136), ml_dtypes.float8_e5m2)}),
             'lm_head.weight is F8_E5M2; only BF16, F16, F32 and F8_E4M3 can be read'),
    'FP8 norm': (lambda t: t.update({'model.norm.weight': np.zeros(136, ml_dtypes.float8_e4m3fn)}),
                 'model.norm.weight is F8_E4M3 [136]; only matrices can be'),
}


@pytest.mark.parametrize('name', BAD_FP8)
def test_bad_fp8_is_named(fp8_folder, tmp_path, name):
  change, line = BAD_FP8[name]
  tensors = stored_tensors(fp8_folder)
  change(tensors)
  shutil.copy(fp8_folder / 'config.json', tmp_path)
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(HFError) as error:
    hugging_face.load(tmp_path)
  assert line in str(error.value)
  assert '\n' not in str(error.value)


def test_a_config_without_fp8_contradicts_fp8_tensors(fp8_folder, tmp_path):
  shutil.copytree(fp8_folder, tmp_path / 'hf')
  values = json.loads((tmp_path / 'hf/config.json').read_text())
  said = values.pop('quantization_config')
  (tmp_path / 'hf/config.json').write_text(json.dumps(values))
  with pytest.raises(HFError, match=r'is F8_E4M3, but config\.json has no quantization_config'):
    hugging_face.load(tmp_path / 'hf')
  values['quantization_config'] = said | dict(weight_block_size=[64, 64])
  (tmp_path / 'hf/config.json').write_text(json.dumps(values))
  with pytest.raises(HFError, match=r'one a block of \[64, 64\]'):
    hugging_face.load(tmp_path / 'hf')


def header(text: bytes, data: bytes = b'') -> bytes:
  return len(text).to_bytes(8, 'little') + text + data


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


BAD_BYTES = {
    'a header longer than the file': (b'\xff' * 8 + b'{}', 'its header would be'),
    'no JSON': (header(b'{"a":'), 'its header is no JSON'),
    'a list': (header(b'[]'), 'its header is no JSON object'),
    'not UTF-8': (header(b'{"\xff":1}'), 'its header is no JSON'),
    'a name twice': (header(ONE[:-1] + b',' + ONE[1:], bytes(8)), 'a name is there twice'),
    'cut short': (header(ONE, bytes(7)), 'its tensors end at byte'),
    'too long': (header(ONE, bytes(9)), 'its tensors end at byte'),
    'a gap': (header(ONE.replace(b'[0,8]', b'[4,12]'), bytes(12)), 'leave a gap or overlap at byte 0'),
    'offsets and shape differ': (header(ONE.replace(b'[2]', b'[3]'), bytes(8)), 'a is F32 [3] at bytes 0 to 8'),
    'a negative size': (header(ONE.replace(b'[2]', b'[-2]'), bytes(8)), 'a is F32 [-2]'),
    'a size that is no number': (header(ONE.replace(b'[2]', b'["2"]'), bytes(8)), "a is F32 ['2']"),
    'no dtype': (header(b'{"a":{"shape":[2]}}'), 'a has no dtype, shape and data_offsets'),
    'unknown dtype': (header(ONE.replace(b'F32', b'F12'), bytes(8)), "a has the unknown dtype 'F12'"),
}


@pytest.mark.parametrize('name', BAD_BYTES)
def test_bad_files_are_one_clear_line(tmp_path, name):
  content, line = BAD_BYTES[name]
  (tmp_path / 'model.safetensors').write_bytes(content)
  with pytest.raises(HFError) as error:
    tensor_files.scan(tmp_path)
  assert line in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('weight_map', 'line'), [
    ({'a': '../model.safetensors'}, "says that a is in '../model.safetensors', which is no name of a file"),
    ({'a': '/etc/passwd'}, 'which is no name of a file'),
    ({'a': 'model.safetensors', 'b': 'model.safetensors'}, 'says that b is in model.safetensors, which does not hold'),
    ({}, 'lacks 1 of the tensors in the files (a)'),
    ({'a': 3}, 'has no weight_map'),
    (None, 'has no weight_map'),
])
def test_a_wrong_index_is_one_clear_line(tmp_path, weight_map, line):
  (tmp_path / 'model.safetensors').write_bytes(header(ONE, bytes(8)))
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=weight_map)))
  with pytest.raises(HFError) as error:
    tensor_files.scan(tmp_path)
  assert line in str(error.value)


def complaint(call) -> str:
  try:
    call()
  except ConfigError as error:
    return str(error)
  return ''


@given(st.binary(max_size=80), st.integers(0, 2**64 - 1), st.booleans(), st.integers(0, 54))
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_header_is_one_clear_line(tmp_path_factory, noise, length, valid_length, at):
  file = tmp_path_factory.mktemp('noise') / 'model.safetensors'
  text = ONE[:at] + noise + ONE[at + len(noise):]
  size = len(text) if valid_length else length
  file.write_bytes(size.to_bytes(8, 'little') + text + bytes(8))
  assert '\n' not in complaint(lambda: tensor_files.scan(file.parent))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=3),
                   st.just([]), st.just({}), st.just({'factor': 'x'}))


@given(st.sampled_from(['deepseek_v2', 'deepseek_v3', 'mla_jax', 'llama', 'qwen2', 'mistral']), st.data())
@settings(max_examples=100, deadline=None)
def test_any_value_in_config_json_is_read_or_one_clear_line(kind, data):
  values = config_to_hf(dataclasses.replace(WIDE, rope_scaling=RopeScaling(factor=2.0)), 'float32', 'ue8m0')
  values['model_type'] = kind
  for key in data.draw(st.lists(st.sampled_from([*values, 'head_dim']), min_size=1, max_size=3)):
    values[key] = data.draw(VALUES)
  assert '\n' not in complaint(lambda: (config_from_hf(values), fp8_block(values)))


@pytest.mark.parametrize(('key', 'layers'), [('num_hidden_layers', 2**40), ('num_nextn_predict_layers', 2**40 + 3)])
def test_more_layers_than_tensors_is_said_at_once(tmp_path, key, layers):
  shutil.copytree(GOLDEN / 'v3', tmp_path / 'hf')
  values = json.loads((tmp_path / 'hf/config.json').read_text())
  (tmp_path / 'hf/config.json').write_text(json.dumps(values | {key: 2**40}))
  with pytest.raises(HFError, match=f'for {layers} layers with 8 experts'):
    hugging_face.load(tmp_path / 'hf')

"""Writing Hugging Face directories, FP8, and reading into arrays that lie on devices."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mla_jax.axes import is_variable
from mla_jax.checkpoint import block_fp8, hugging_face, published, tensor_files
from mla_jax.checkpoint.published_config import REQUIRED_OF_EXPERTS, config_from_hf, config_to_hf, fp8_block
from mla_jax.checkpoint.tensor_files import HFError
from mla_jax.config import ConfigError, ModelConfig, RopeScaling
from mla_jax.model import transformer

GOLDEN = Path(__file__).parents[1] / 'golden'
CASES = ('v2_lite', 'v2', 'v3', 'v3_plain', 'v3_dense')
# Wider than a block, and not by whole blocks; the smallest model with every kind of layer.
WIDE = ModelConfig(
    vocab_size=40, hidden_size=136, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=130, kv_lora_rank=132,
    qk_nope_head_dim=40, qk_rope_head_dim=28, v_head_dim=66, intermediate_size=150, first_k_dense_replace=1,
    n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, moe_intermediate_size=129,
    num_nextn_predict_layers=1)


def stored_tensors(folder) -> dict[str, np.ndarray]:
  stored = tensor_files.scan(folder)  # safetensors' own reader for NumPy has no FP8
  with tensor_files.Reader(stored) as reader:
    return {name: reader.read(name) for name in stored}


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def random_model(config: ModelConfig, dtype=np.float32, seed: int = 0):
  random = np.random.default_rng(seed)
  _, params, buffers = transformer.abstract(config)
  return tuple(jax.tree.map(lambda v: random.standard_normal(v.shape).astype(dtype), tree, is_leaf=is_variable)
               for tree in (params, buffers))


@pytest.fixture(scope='module')
def fp8_folder(tmp_path_factory):
  """FP8 as the releases have it, made without our quantiser: random bytes and random scales, some of them in another
  file than their weight."""
  folder = tmp_path_factory.mktemp('fp8')
  params, buffers = random_model(WIDE, ml_dtypes.bfloat16)
  buffers = jax.tree.map(lambda b: b.astype(np.float32), buffers)
  hugging_face.save(folder / 'hf', WIDE, params, buffers, fp8='float32')
  tensors, random = stored_tensors(folder / 'hf'), np.random.default_rng(1)
  for name in [n for n in tensors if n.endswith('_scale_inv')]:
    q = random.integers(0, 255, tensors[name.removesuffix('_scale_inv')].shape).astype(np.uint8)
    q = np.where(q % 128 == 127, 126, q).astype(np.uint8)  # no NaN
    q[0::128, 0::128] = 126  # 448: the release scales a block's largest to it
    tensors[name.removesuffix('_scale_inv')] = q.view(ml_dtypes.float8_e4m3fn)
    tensors[name] = np.exp(random.uniform(-9, -6, tensors[name].shape)).astype(np.float32)
  (folder / 'hf/model.safetensors').unlink()
  late = {n: tensors.pop(n) for n in list(tensors) if n.endswith('v_b_proj.weight_scale_inv')}
  save_file(tensors, folder / 'hf/a.safetensors')
  save_file(late, folder / 'hf/b.safetensors')
  return folder / 'hf'


def slow_dequantize(q, scale, width=128):
  out = np.empty(q.shape, np.float32)
  for i in range(q.shape[0]):
    for j in range(q.shape[1]):
      out[i, j] = np.float32(q[i, j]) * scale[i // width, j // width]
  return out


@pytest.mark.parametrize('name', CASES)
def test_in_out_in_is_the_same_to_the_bit(name, tmp_path):
  config, params, buffers = hugging_face.load(GOLDEN / name)
  hugging_face.save(tmp_path / 'out', config, params, buffers, file_bytes=60_000)
  assert list((tmp_path / 'out').glob('model-00002-of-*.safetensors'))
  again = hugging_face.load(tmp_path / 'out')
  assert dataclasses.replace(again[0], aux_loss_alpha=config.aux_loss_alpha) == config
  assert_same_bits(again[1:], (params, buffers))
  # And the files say what those said that transformers wrote; repeats may be more, one for each MTP layer.
  theirs, ours = stored_tensors(GOLDEN / name), stored_tensors(tmp_path / 'out')
  assert theirs.keys() <= ours.keys()
  assert all(n.endswith(tuple(published.REPEATED)) for n in ours.keys() - theirs.keys())
  for tensor_name, tensor in theirs.items():
    assert_same_bits(ours[tensor_name], tensor)
  index = json.loads((tmp_path / 'out/model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == ours.keys()
  assert index['metadata']['total_size'] == sum(t.nbytes for t in ours.values())


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_fp8_in_out_in_is_the_same_to_the_bit(fp8_folder, tmp_path, dtype):
  config, params, buffers = hugging_face.load(fp8_folder, dtype)
  assert config.num_nextn_predict_layers == 1
  stored = stored_tensors(fp8_folder)
  name = 'model.layers.1.self_attn.kv_a_proj_with_mqa.weight'  # 160 x 136: ragged both ways
  expected = slow_dequantize(stored[name], stored[f'{name}_scale_inv'])
  wdkv_DJ = params['moe_blocks']['attention']['wdkv_DJ'][0]
  np.testing.assert_array_equal(wdkv_DJ[:, :132], expected[:132].T.astype(wdkv_DJ.dtype))
  assert wdkv_DJ.dtype == (ml_dtypes.bfloat16 if dtype is None else np.float32)

  hugging_face.save(tmp_path / 'out', config, params, buffers, fp8='float32')
  assert_same_bits(hugging_face.load(tmp_path / 'out', dtype)[1:], (params, buffers))
  out = stored_tensors(tmp_path / 'out')
  for tensor_name, tensor in stored.items():
    if tensor.dtype == ml_dtypes.float8_e4m3fn:
      assert_same_bits(out[tensor_name], tensor)
  values = json.loads((tmp_path / 'out/config.json').read_text())
  assert values['quantization_config'] == dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic',
                                               weight_block_size=[128, 128])


def test_ue8m0_scales_of_either_dtype(fp8_folder, tmp_path):
  """Powers of two, as float32 (V3.1) or as float8_e8m0."""
  config, params, buffers = hugging_face.load(fp8_folder)
  hugging_face.save(tmp_path / 'out', config, params, buffers, fp8='ue8m0')
  expected = hugging_face.load(tmp_path / 'out')
  tensors = stored_tensors(tmp_path / 'out')
  scales = {n: t for n, t in tensors.items() if n.endswith('_scale_inv')}
  assert all((np.frexp(s)[0] == 0.5).all() for s in scales.values())
  hugging_face.save(tmp_path / 'again', *expected, fp8='ue8m0')
  assert_same_bits(hugging_face.load(tmp_path / 'again')[1:], expected[1:])
  # The library that writes safetensors for NumPy knows no e8m0, our own writer does.
  narrow = {n: t.astype(ml_dtypes.float8_e8m0fnu) if n in scales else t for n, t in tensors.items()}
  (tmp_path / 'out/model.safetensors').unlink()
  groups = [(tensor_files.Entry(n, t.dtype, t.shape),) for n, t in narrow.items()]
  tensor_files.write(tmp_path / 'out', groups, lambda group: (narrow[group[0].name],), 10**9, lambda _: None)
  assert_same_bits(hugging_face.load(tmp_path / 'out')[1:], expected[1:])


@given(st.integers(0, 2**32), st.sampled_from(['float32', 'bfloat16', 'float16']),
       st.sampled_from(block_fp8.SCALE_FORMATS), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_quantizing_is_close_and_the_second_time_exact(seed, dtype, scale_format, rows, columns):
  random, block = np.random.default_rng(seed), (8, 6)
  w = (random.standard_normal((rows, columns)) * 10 ** random.uniform(-2, 2)).astype(dtype)
  w *= random.integers(0, 3, w.shape) > 0

  def back(q, scales):
    return block_fp8.dequantize(q, scales, slice(0, rows), slice(0, columns), block, w.dtype)

  once = back(*block_fp8.quantize(w, scale_format, block))
  for i in range(0, rows, 8):
    for j in range(0, columns, 6):
      part, near = (x[i:i + 8, j:j + 6].astype(np.float64) for x in (w, once))
      # Half a step of the largest: 2^-4 of it, up to twice that where the scale was rounded up to a power of two.
      assert np.abs(part - near).max() <= np.abs(part).max() * (0.125 if scale_format == 'ue8m0' else 0.0626)
  assert_same_bits(back(*block_fp8.quantize(once, scale_format, block)), once)


def test_what_is_written_is_what_others_read(tmp_path):
  """safetensors' own reader, which checks offsets and alignment."""
  config = dataclasses.replace(WIDE, vocab_size=41)  # odd sizes: alignment of what follows
  params, buffers = random_model(config, ml_dtypes.bfloat16)
  buffers = jax.tree.map(lambda b: b.astype(np.float32), buffers)
  hugging_face.save(tmp_path / 'out', config, params, buffers, fp8='float32')
  with safe_open(tmp_path / 'out/model.safetensors', 'np') as file:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert file.metadata() == {'format': 'pt'}
  assert shapes == published.tensors(config, published.shapes(config), fp8=True)
  for tensor in tensor_files.scan(tmp_path / 'out').values():
    assert tensor.offset % tensor.itemsize == 0


def test_dtype_and_tokenizer_files(tmp_path):
  config, params, buffers = hugging_face.load(GOLDEN / 'v3')
  tokenizer = tmp_path / 'tokenizer'
  tokenizer.mkdir()
  (tokenizer / 'tokenizer.json').write_text(json.dumps(dict(added_tokens=[dict(id=7, content='<end>')])))
  (tokenizer / 'tokenizer_config.json').write_text(json.dumps(dict(eos_token=dict(content='<end>'), bos_token=None)))
  (tokenizer / 'modeling_mine.py').write_text('raise SystemExit')
  hugging_face.save(tmp_path / 'out', config, params, buffers, dtype='float32', tokenizer=tokenizer)
  assert {t.dtype for t in stored_tensors(tmp_path / 'out').values()} == {np.dtype(np.float32)}
  values = json.loads((tmp_path / 'out/config.json').read_text())
  assert values['dtype'] == values['torch_dtype'] == 'float32'
  assert values['eos_token_id'] == 7
  assert 'bos_token_id' not in values
  assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == [
      'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']


def test_it_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  config, params, buffers = hugging_face.load(GOLDEN / 'v3_dense')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full/file').touch()
  with pytest.raises(HFError, match='full exists and is not empty; name another directory'):
    hugging_face.save(tmp_path / 'full', config, params, buffers)
  (tmp_path / 'empty').mkdir()
  hugging_face.save(tmp_path / 'empty', config, params, buffers)
  assert (tmp_path / 'empty/model.safetensors').is_file()
  before = sorted(tmp_path.iterdir())

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(tensor_files.os, 'fsync', fail)
  with pytest.raises(HFError, match=r'half can not be written \(\[Errno 28\] No space left on device\)'):
    hugging_face.save(tmp_path / 'half', config, params, buffers)
  assert sorted(tmp_path.iterdir()) == before


def test_what_nobody_could_read_is_not_written(tmp_path):
  def line(**changes):
    with pytest.raises(HFError) as error:
      config_to_hf(dataclasses.replace(WIDE, **changes), 'float32')
    return str(error.value)

  assert 'with experts or MTP modules is no published model' in line(attention='mha')
  assert "scoring_func='softmax' with topk_method='noaux_tc'" in line(scoring_func='softmax')
  assert 'no MTP layers' in line(topk_method='greedy')
  assert "norm_topk_prob=True with topk_method='greedy'" in line(
      topk_method='greedy', num_nextn_predict_layers=0, scoring_func='softmax')
  assert 'different things to different readers' in line(rope_scaling=RopeScaling(factor=4.0, mscale_all_dim=0.0,
                                                                                  mscale=0.7))
  params, buffers = random_model(WIDE)
  params['moe_blocks']['ffn']['wo_EFD'][0, 1, 3, 3] = np.inf
  with pytest.raises(HFError, match=r'1\.mlp\.experts\.1\.down_proj\.weight: weights are not finite'):
    hugging_face.save(tmp_path / 'out', WIDE, params, buffers, fp8='float32')
  with pytest.raises(HFError, match="fp8='int4' is unknown"):
    hugging_face.save(tmp_path / 'out', WIDE, params, buffers, fp8='int4')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('changes', [
    {}, dict(n_routed_experts=0, num_nextn_predict_layers=0), dict(q_lora_rank=0, tie_word_embeddings=True),
    dict(rope_scaling=RopeScaling(factor=8.0, mscale=0.7, mscale_all_dim=0.7)),
    dict(rope_scaling=RopeScaling(factor=8.0, mscale=1.0, mscale_all_dim=0.0)),
    dict(topk_method='greedy', scoring_func='softmax', norm_topk_prob=False, num_nextn_predict_layers=0)])
def test_either_spelling_of_config_json_says_the_same(changes):
  config = dataclasses.replace(WIDE, **changes)
  values = config_to_hf(config, 'bfloat16')
  assert json.loads(json.dumps(values)) == values
  if not config.n_routed_experts:  # what is of experts alone is not read
    config = dataclasses.replace(config, **{k: getattr(ModelConfig(), k) for k in REQUIRED_OF_EXPERTS})
  old = {k: v for k, v in values.items() if k not in ('rope_parameters', 'dtype')}
  new = {k: v for k, v in values.items() if k not in ('rope_scaling', 'rope_theta', 'torch_dtype')}
  assert config_from_hf(values) == config_from_hf(old) == config_from_hf(new) == config


def test_commands(tmp_path):
  """A config file for a directory, as train.py reads it."""
  (tmp_path / 'hf').mkdir()
  shutil.copytree(GOLDEN / 'v3', tmp_path / 'hf', dirs_exist_ok=True)
  file = tmp_path / 'mine.py'
  hugging_face.write_config(tmp_path / 'hf', file)
  made = {}
  exec(compile(file.read_text(), file, 'exec'), made)
  assert made['get_config']().model == hugging_face.load(GOLDEN / 'v3')[0]
  assert made['get_config']().data.tokenizer == 'byte'
  with pytest.raises(HFError, match=r'mine\.py exists'):
    hugging_face.write_config(tmp_path / 'hf', file)


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


@pytest.mark.parametrize(('arguments', 'line'), [
    (['export', 'nowhere', 'out'], 'nowhere/config.json does not exist'),
    (['config', 'nowhere', 'out.py'], 'nowhere has no *.safetensors file'),
    (['export', 'nowhere'], 'usage: '), (['import', 'a', 'b'], 'usage: ')])
def test_a_wrong_command_is_one_clear_line(arguments, line, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  values = flags.FlagValues()
  hugging_face.define_flags(values)
  values(['hugging_face'])
  assert hugging_face.main(['hugging_face', *arguments], values) == 2
  error = capsys.readouterr().err
  assert error.startswith('hugging_face: error: ')
  assert line in error
  assert error.count('\n') == 1


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


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_box_of_a_tensor(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('box')
  shape = (*data.draw(st.lists(st.integers(1, 9), max_size=3)), data.draw(st.sampled_from([1, 3, 5000])))
  tensor = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
  save_file({'before': np.ones(3, np.float32), 'x': tensor}, folder / 'model.safetensors')
  box = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
  with tensor_files.Reader(tensor_files.scan(folder)) as reader:
    np.testing.assert_array_equal(reader.read('x', box), tensor[box])
    np.testing.assert_array_equal(reader.read('x'), tensor)


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


def test_more_layers_than_tensors_is_said_at_once(tmp_path):
  shutil.copytree(GOLDEN / 'v3', tmp_path / 'hf')
  values = json.loads((tmp_path / 'hf/config.json').read_text())
  (tmp_path / 'hf/config.json').write_text(json.dumps(values | dict(num_hidden_layers=2**40)))
  with pytest.raises(HFError, match='for 1099511627776 layers with 8 experts'):
    hugging_face.load(tmp_path / 'hf')


def test_pieces_written_on_a_device():
  """The accelerators' way, which host memory does without: pieces transferred and written in place."""
  expected = hugging_face.load(GOLDEN / 'v3_plain')
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for on_host in (True, False):
    found = hugging_face.load(GOLDEN / 'v3_plain', place=place, on_host=on_host)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found[1:]))
    assert_same_bits(found[1:], expected[1:])


@pytest.mark.long
@pytest.mark.parametrize('fp8', [[], ['--fp8']])
def test_loading_holds_few_tensors_beside_the_model(fp8):
  """450 MB in tensors of at most 8.4 MB (tests/checkpoint/measure_memory.py --megabytes=4000 is the 4.5 GB case)."""
  script = Path(__file__).with_name('measure_memory.py')
  out = subprocess.run([sys.executable, script, '--megabytes=400', *fp8], stdout=subprocess.PIPE, text=True, check=True,
                       env=os.environ | dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(Path(__file__).parents[2]))).stdout
  seen = json.loads(out.splitlines()[-1])
  assert seen['model'] > 400
  assert seen['over'] < 60


def on_devices(processes: int, fsdp: int, expert: int) -> list[dict]:
  """What load_on_devices.py prints in each of some processes of two devices."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  script = Path(__file__).with_name('load_on_devices.py')
  environment = os.environ | dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(Path(__file__).parents[2]))
  running = [subprocess.Popen([sys.executable, script, *map(str, (i, processes, port, fsdp, expert))], env=environment,
                              stdout=subprocess.PIPE, text=True) for i in range(processes)]
  out = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [0] * processes
  return [json.loads(text.splitlines()[-1]) for text in out]


@pytest.mark.parametrize(('processes', 'fsdp', 'expert'), [
    (1, 2, 1), (2, 1, 4), pytest.param(2, 2, 2, marks=pytest.mark.long)])
def test_each_process_reads_what_its_devices_hold(processes, fsdp, expert):
  """Of experts, or of tensors whose rows are D, its share; of others all, for each is on all devices of a process, or
  cut along rows that a disk reads whole; of what is repeated its share of the comparison."""
  for one in on_devices(processes, fsdp, expert):
    assert one['right']
    assert one['split'] > 5
    assert one['read'] == one['expected']
    assert processes == 1 or one['read'] < 0.85 * one['all']

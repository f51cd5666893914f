"""Writing Hugging Face directories, FP8, and what comes back."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mla_jax.checkpoint import block_fp8, carried, hugging_face, published, tensor_files
from mla_jax.checkpoint.published_config import REQUIRED_OF_EXPERTS, config_from_hf, config_to_hf
from mla_jax.checkpoint.tensor_files import HFError
from mla_jax.config import ModelConfig, RopeScaling
from tests.checkpoint.small import GOLDEN, WIDE, assert_same_bits, random_model, stored_tensors

CASES = ('v2_lite', 'v2', 'v3', 'v3_plain', 'v3_dense')


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
    names = file.keys()  # a safe_open is no mapping
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
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


END = dict(added_tokens=[dict(content='<end>', id=7)])


@pytest.mark.parametrize(('vocabulary', 'named', 'config', 'expected'), [
    (dict(added_tokens=None), dict(eos_token='<end>'), None, {}),
    (dict(added_tokens=[None, {}, dict(content=3, id=1), dict(content='<end>', id='7')]), dict(eos_token='<end>'),
     None, {}),
    (END, dict(eos_token={}, bos_token=['<end>']), None, {}),
    (END, dict(eos_token='<end>'), {}, dict(eos_token_id=7)),
    (END, dict(eos_token='<end>'), dict(eos_token_id=[7, 8], bos_token_id=-1), dict(eos_token_id=[7, 8])),
    (None, None, dict(eos_token_id='7', bos_token_id=None), {}),
    (None, None, dict(eos_token_id=2, bos_token_id=1), dict(bos_token_id=1, eos_token_id=2)),
])
def test_which_tokens_begin_and_end_a_text(tmp_path, vocabulary, named, config, expected):
  for name, values in dict(tokenizer=vocabulary, tokenizer_config=named, config=config).items():
    if values is not None:
      (tmp_path / f'{name}.json').write_text(json.dumps(values))
  assert carried.special_ids(tmp_path) == expected
  ends = expected.get('eos_token_id', [])
  assert carried.end_ids(tmp_path) == (ends if isinstance(ends, list) else [ends])


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

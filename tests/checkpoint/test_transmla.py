"""Grouped-query checkpoints to latent attention."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mla_jax.axes import is_variable
from mla_jax.checkpoint import hugging_face, store, transmla
from mla_jax.checkpoint.published_config import config_to_hf
from mla_jax.config import ConfigError, DataConfig, ModelConfig, from_dict, to_dict
from mla_jax.data import pipeline
from mla_jax.data.tokenizer import ByteTokenizer
from mla_jax.language_model import LanguageModel
from mla_jax.model import transformer

ROOT = Path(__file__).parents[2]
GQA = ModelConfig(vocab_size=30, hidden_size=24, num_hidden_layers=2, max_position_embeddings=64, attention='gqa',
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=20, rope_theta=100.0)
TOKENS = np.random.default_rng(5).integers(0, 30, (12, 40)).astype(np.int32)


def random_params(config: ModelConfig, seed: int = 0) -> dict:
  random = np.random.default_rng(seed)

  def fill(path, variable):
    values = random.standard_normal(variable.shape).astype(np.float32)
    return 1 + 0.2 * values if path[-1].key.startswith('norm') else 0.3 * values

  return jax.tree_util.tree_map_with_path(fill, transformer.abstract(config).params, is_leaf=is_variable)


def convert(config, params, rank, rope_width, fold=0):
  moments_LYZ = transmla.second_moments(config, params, {}, TOKENS)
  return transmla.convert(config, params, moments_LYZ, transmla.plan(config, rank, rope_width, fold))


@functools.cache
def forward(config_json: str):
  graph = transformer.abstract(from_dict(ModelConfig, json.loads(config_json))).graph
  return jax.jit(lambda params, tokens_BT: nnx.merge(graph, params, {})(tokens_BT)[0])


def logits(config, params, tokens_BT) -> np.ndarray:
  with jax.default_matmul_precision('highest'):
    return np.asarray(forward(json.dumps(to_dict(config)))(params, tokens_BT))


def error(config, params, made) -> float:
  """The largest difference of logits, in standard deviations, on a text the calibration did not see."""
  tokens_BT = np.random.default_rng(9).integers(0, 30, (2, 50))
  ours, theirs = logits(config, params, tokens_BT), logits(*made, tokens_BT)
  return np.abs(ours - theirs).max() / ours.std()


@pytest.mark.parametrize('changes', [
    dict(attention_bias=True), dict(num_key_value_heads=1), dict(num_key_value_heads=4)])
def test_with_room_for_everything_it_is_exact(changes):
  config = dataclasses.replace(GQA, **changes)
  params, full = random_params(config), 8 * config.kv_heads
  made = convert(config, params, full, full)
  assert error(config, params, made) < 1e-4
  assert made[0].rope_repeats == config.kv_heads


@pytest.mark.long
def test_it_decodes_the_same():
  """Over the cache, absorbed."""
  config = dataclasses.replace(GQA, attention_bias=True)
  params = random_params(config)
  ours, theirs = (LanguageModel(c, p, {}, dtype='float32').generate([[1, 2, 3]], max_new_tokens=20)[0]
                  for c, p in ((config, params), convert(config, params, 16, 16)))
  assert ours.tokens == theirs.tokens


def test_keys_that_are_alike_need_one_heads_width():
  """RoRoPE: all key heads multiples of one another, so that the first component of each frequency holds everything."""
  params = random_params(GQA)
  attention = params['dense_blocks']['attention']
  attention['wk_DGH'][:, :, 1] = -0.7 * attention['wk_DGH'][:, :, 0]
  assert error(GQA, params, convert(GQA, params, 24, 8)) < 1e-4
  unlike = random_params(GQA)
  assert error(GQA, unlike, convert(GQA, unlike, 24, 8)) > 1e-2


@pytest.mark.parametrize('fold', [2, 4])
def test_frequencies_that_are_equal_fold(fold):
  """FreqFold: with one frequency for all pairs, pairs that are multiples of their neighbours fold without loss."""
  config = dataclasses.replace(GQA, num_key_value_heads=1, rope_theta=1.0)
  params = random_params(config)
  keys = params['dense_blocks']['attention']['wk_DGH'].reshape(2, 24, 1, 2, 4)
  keys[..., 1], keys[..., 3] = 0.5 * keys[..., 0], -keys[..., 2]
  assert error(config, params, convert(config, params, 12, 4, fold)) < 1e-4


def test_loss_shrinks_with_rank_and_does_not_depend_on_the_size_of_values():
  config = dataclasses.replace(GQA, num_key_value_heads=4)
  params = random_params(config)
  errors = [error(config, params, convert(config, params, rank, 32)) for rank in (4, 20, 32)]
  assert errors == sorted(errors, reverse=True)
  assert errors[0] > 100 * errors[-1]

  def scaled(factor):  # the same function
    out = random_params(config)
    out['dense_blocks']['attention']['wv_DGV'] *= factor
    out['dense_blocks']['attention']['wo_NVD'] /= factor
    return out

  # Keys that lose their rotation share the latent with the values: without balance the larger would crowd them out.
  one, other = (logits(*convert(config, scaled(f), 30, 8), TOKENS) for f in (1.0, 64.0))
  np.testing.assert_allclose(one, other, atol=2e-3 * one.std())


@pytest.mark.parametrize('changes', [dict(attention_bias=True), dict(tie_word_embeddings=True)])
def test_a_directory_becomes_another(tmp_path, changes, capsys):
  """A Qwen2 without a norm on the latent, a Llama with one."""
  config = dataclasses.replace(GQA, **changes)
  norm = not config.attention_bias
  hugging_face.save(tmp_path / 'source', config, random_params(config), {})
  values = json.loads((tmp_path / 'source/config.json').read_text())
  assert values['model_type'] == ('llama' if norm else 'qwen2')
  np.save(tmp_path / 'tokens.npy', TOKENS)
  tokens_BT = transmla.read_calibration(tmp_path / 'source', str(tmp_path / 'tokens.npy'), 128, 40)
  np.testing.assert_array_equal(tokens_BT, TOKENS)
  arguments = dict(rank=12, rope_width=8)
  if not norm:
    with pytest.raises(ConfigError, match='writes a deepseek_v3 directory, which has no attention biases'):
      transmla.run(tmp_path / 'source', tmp_path / 'out', tokens_BT, latent_norm=True, **arguments)

  lines = transmla.run(tmp_path / 'source', tmp_path / 'out', tokens_BT, latent_norm=norm, **arguments)
  assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
  bytes_of = {line['stage'].partition(',')[0]: line['cache_bytes_per_token'] for line in lines}
  expected = dict(original=2 * (2 * 16) * 4, rotated=2 * (24 + 8) * 4, compressed=2 * (12 + 8) * 4)
  assert bytes_of == expected | (dict(normalised=expected['compressed']) if norm else {})
  made = hugging_face.load(tmp_path / 'out')
  assert json.loads((tmp_path / 'out/config.json').read_text())['model_type'] == ('deepseek_v3' if norm else 'mla_jax')
  assert transmla.perplexity(*made, TOKENS) == pytest.approx(lines[-1]['perplexity'])


@pytest.mark.parametrize(('arguments', 'line'), [
    (dict(rank=25, rope_width=8), 'kv_lora_rank=25 is outside 1 to 24'),
    (dict(rank=0, rope_width=8), 'kv_lora_rank=0 is outside 1 to 24'),
    (dict(rank=8, rope_width=6), 'rope_width=6 does not fit heads of width 8, of which there are 2'),
    (dict(rank=8, rope_width=32), 'rope_width=32 does not fit'),
    (dict(rank=8, rope_width=8, fold=-2), 'fold=-2 is not a multiple of head width / rope_width = 1'),
    (dict(rank=8, rope_width=4, fold=3), 'fold=3 is not a multiple of head width / rope_width = 2'),
])
def test_sizes_that_do_not_fit_are_one_clear_line(arguments, line):
  with pytest.raises(ConfigError) as caught:
    transmla.plan(GQA, **arguments)
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)


def test_what_can_not_be_converted_is_one_clear_line(tmp_path):
  with pytest.raises(ConfigError, match='has latent attention or experts; give a Llama'):
    transmla.plan(ModelConfig(), 8, 8)
  with pytest.raises(ConfigError, match=r'tokenizer\.json does not exist, so text can not be read'):
    transmla.read_calibration(tmp_path, '', 8, 8)
  np.save(tmp_path / 'short.npy', TOKENS[0, :7])
  with pytest.raises(ConfigError, match='has 7 tokens, fewer than one sequence of 8'):
    transmla.read_calibration(tmp_path, str(tmp_path / 'short.npy'), 8, 8)
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(ConfigError, match=r'tokenizer\.json can not cut the calibration text into tokens \('):
    transmla.read_calibration(tmp_path, '', 8, 8)


@pytest.mark.parametrize(('ids', 'options', 'line'), [
    (TOKENS, dict(length=0), '--length=0 is below 2'),
    (TOKENS, dict(length=-1), '--length=-1 is below 2'),
    (TOKENS, dict(length=1), '--length=1 is below 2'),
    (TOKENS, dict(sequences=0), '--sequences=0 is below 1'),
    (TOKENS, dict(length=65), "sequences have 65 tokens, above the model's max_position_embeddings=64"),
    (TOKENS + 1, {}, 'has token id 30, but the vocabulary has 0 to 29'),
    (TOKENS - 5, {}, 'has token id -'),
    (TOKENS.astype(np.int64) + 2**32, {}, 'has token id 42949'),
    (TOKENS.astype(np.uint64) + 2**63, {}, 'has token id 92233'),
    (TOKENS + 0.5, {}, 'holds float64, not token ids'),
    (None, {}, 'can not be read (No data left in file)'),
])
def test_wrong_calibration_is_one_clear_line(tmp_path, ids, options, line):
  """Before the weights are read: there are none."""
  (tmp_path / 'config.json').write_text(json.dumps(config_to_hf(GQA, 'float32')))
  file = tmp_path / 'ids.npy'
  file.touch() if ids is None else np.save(file, ids)

  def convert():
    tokens_BT = transmla.read_calibration(tmp_path, str(file), **dict(sequences=2, length=8) | options)
    transmla.run(tmp_path, tmp_path / 'out', tokens_BT, rank=8, rope_width=8)

  with pytest.raises(ConfigError) as caught:
    convert()
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)


def python(*command) -> str:
  done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                        env=os.environ | dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu'))
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.fixture(scope='module')
def small_llama(tmp_path_factory) -> Path:
  """A small grouped-query model that train.py trained on the standard library, as a Llama directory."""
  folder = tmp_path_factory.mktemp('small')
  (folder / 'gqa.py').write_text(SMALL_GQA)
  python('train.py', f'--config={folder / "gqa.py"}', f'--workdir={folder / "run"}')
  python('-m', 'mla_jax.checkpoint.hugging_face', 'export', folder / 'run', folder / 'llama')
  return folder / 'llama'


@pytest.mark.long
@pytest.mark.parametrize('norm', [False, True])
def test_a_short_fine_tune_recovers(small_llama, tmp_path, norm):
  """The cache falls to 22%. A fifth of the original steps brings more than half of the lost nats back, on files that
  neither training nor calibration saw."""
  out = python('-m', 'mla_jax.checkpoint.transmla', small_llama, tmp_path / 'mla', '--kv_lora_rank=12',
               '--rope_width=16', '--sequences=64', '--length=128', *(['--latent_norm'] if norm else []))
  stages = [json.loads(line) for line in out.splitlines() if line.startswith('{')]
  python('-m', 'mla_jax.checkpoint.hugging_face', 'config', tmp_path / 'mla', tmp_path / 'mla.py')
  python('train.py', f'--config={tmp_path / "mla.py"}', f'--init_from={tmp_path / "mla"}',
         f'--workdir={tmp_path / "tuned"}', '--config.training.steps=100', '--config.training.sequence_length=128',
         '--config.training.batch_size=8', '--config.training.compute_dtype=float32', '--config.data.piece_bytes=1024',
         '--config.optimizer.learning_rate=1e-3', '--config.optimizer.warmup_tokens=10240',
         '--config.optimizer.cosine_until_tokens=102400')

  batches = pipeline.held_out_batches(DataConfig(piece_bytes=1024), ByteTokenizer(), length=129, batch_size=8,
                                      num_batches=8)
  tokens_BT = np.concatenate([np.asarray(batch['tokens']) for batch in batches])
  config, params, buffers = store.read_run(tmp_path / 'tuned')
  original, converted, tuned = (np.log(transmla.perplexity(*model, tokens_BT)) for model in (
      hugging_face.load(small_llama), hugging_face.load(tmp_path / 'mla'), (config.model, params, buffers)))
  print(json.dumps(dict(stages=stages, held_out_nats=dict(original=original, converted=converted, tuned=tuned))))
  assert converted - original > 0.1
  assert tuned - original < 0.5 * (converted - original)
  assert stages[-1]['cache_bytes_per_token'] < 0.22 * stages[0]['cache_bytes_per_token']


SMALL_GQA = '''
from mla_jax.config import *


def get_config():
  return Config(
      model=ModelConfig(vocab_size=264, hidden_size=96, num_hidden_layers=3, max_position_embeddings=512,
                        attention='gqa', num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                        intermediate_size=256, initializer_range=0.06),
      training=TrainingConfig(steps=500, batch_size=8, sequence_length=128, eval_interval=500, checkpoint_interval=500,
                              compute_dtype='float32'),
      optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=20 * 1024, cosine_until_tokens=500 * 1024,
                                end_learning_rate=1e-4),
      data=DataConfig(source='stdlib', piece_bytes=1024))
'''

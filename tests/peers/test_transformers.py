"""Directories we write, read by transformers as it is installed: the same logits at all positions, the same tokens.

Needs the environment of `make peers`; PEER_PYTHON names another interpreter with torch and transformers.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mla_jax
from mla_jax.axes import is_variable
from mla_jax.checkpoint import transmla
from mla_jax.config import ModelConfig, RopeScaling
from mla_jax.data.tokenizer import ByteTokenizer
from mla_jax.model import transformer

ROOT = Path(__file__).parents[2]
PEER_PYTHON = os.environ.get('PEER_PYTHON', str(ROOT / '.venv-peers/bin/python'))
TOLERANCE = 2e-4  # of the logits' standard deviation, float32 both
TEXT = 'def main(argv):\n  return 0'
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=16)

V3 = ModelConfig(
    vocab_size=264, hidden_size=48, num_hidden_layers=3, max_position_embeddings=640, num_attention_heads=4,
    q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, intermediate_size=40,
    first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=14,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, num_nextn_predict_layers=1, rope_scaling=YARN)
V2 = dataclasses.replace(
    V3, topk_method='group_limited_greedy', scoring_func='softmax', norm_topk_prob=False, num_nextn_predict_layers=0,
    n_shared_experts=2, routed_scaling_factor=16.0,
    rope_scaling=dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707))
GQA = ModelConfig(
    vocab_size=264, hidden_size=48, num_hidden_layers=3, max_position_embeddings=640, attention='gqa',
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40, rope_theta=1000.0)
MODELS = {
    'v3': V3,
    'v2_lite': dataclasses.replace(V2, q_lora_rank=0, topk_method='greedy', routed_scaling_factor=1.0, n_group=1,
                                   topk_group=1),
    'v2': V2,
    'tied': dataclasses.replace(V3, tie_word_embeddings=True, num_nextn_predict_layers=0, rope_scaling=RopeScaling()),
    'dense': dataclasses.replace(V3, n_routed_experts=0, num_nextn_predict_layers=0),
    'one mscale': dataclasses.replace(V3, rope_scaling=dataclasses.replace(YARN, mscale_all_dim=0.0)),
    # transformers knows layer 61 alone as an MTP layer, so the oracle of its drafting has 61 layers before it.
    'mtp': dataclasses.replace(V3, num_hidden_layers=61, hidden_size=24, n_routed_experts=4, n_group=2, topk_group=1,
                               num_experts_per_tok=1, rope_scaling=RopeScaling()),
    # Several blocks, but no ragged ones, which transformers can't take out of FP8 on a CPU.
    'fp8': dataclasses.replace(V3, hidden_size=256, q_lora_rank=128),
    'llama': GQA,
    'qwen2': dataclasses.replace(GQA, attention_bias=True, tie_word_embeddings=True),
    'fp8 ue8m0': dataclasses.replace(V3, hidden_size=256, q_lora_rank=128),
}


def random_model(config: ModelConfig) -> mla_jax.LanguageModel:
  """Gains at which attention and routing are far from uniform."""
  random = np.random.default_rng(0)

  def fill(path, variable):
    name, values = path[-1].key, random.standard_normal(variable.shape)
    if name.startswith('norm'):
      return (1 + 0.2 * values).astype(np.float32)
    if name == 'bias_LE':
      return (-1.5 + 0.1 * values).astype(np.float32)
    gain = 2.5 if name.startswith(('wq', 'wuq', 'router')) else 1.0
    inputs = 1 if name == 'embedding_WD' else config.hidden_size
    return (gain * values / inputs**0.5).astype(np.float32)

  _, params, buffers = transformer.abstract(config)
  trees = (jax.tree_util.tree_map_with_path(fill, tree, is_leaf=is_variable) for tree in (params, buffers))
  return mla_jax.LanguageModel(config, *trees, ByteTokenizer(), 'float32')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('peers')


@pytest.fixture(scope='module')
def trained(folder) -> Path:
  """A model that train.py trained a little and the command exported."""
  text = folder / 'text'
  text.mkdir()
  for i in range(40):
    (text / f'{i}.txt').write_text(f'def f{i}(x):\n  return x + {i}\n' * 20)
  commands = [
      ['train.py', '--config=tests/training/small_run.py', f'--workdir={folder / "run"}', f'--config.data.path={text}'],
      ['-m', 'mla_jax.checkpoint.hugging_face', 'export', str(folder / 'run'), str(folder / 'trained')]]
  for command in commands:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | dict(PYTHONPATH=str(ROOT)))
  return folder / 'trained'


@pytest.fixture(scope='module')
def compared(folder, trained):
  """{case: (our model, the tokens, what transformers made of the directory)}."""
  models = {name: random_model(config) for name, config in MODELS.items()}
  for name, lm in models.items():
    lm.save_hf(folder / name, fp8={'fp8': 'float32', 'fp8 ue8m0': 'ue8m0'}.get(name))
    if name.startswith('fp8'):
      models[name] = mla_jax.LanguageModel.load(folder / name, 'float32')
  # A Llama with latent attention, in the deepseek_v3 layout that has a norm on the latent.
  calibration = np.random.default_rng(2).integers(0, 264, (8, 64)).astype(np.int32)
  transmla.run(folder / 'llama', folder / 'transmla', calibration, rank=24, rope_width=8, latent_norm=True)
  models['transmla'] = mla_jax.LanguageModel.load(folder / 'transmla')
  # Not from what was exported but from the run itself.
  models['trained'] = mla_jax.LanguageModel.load(folder / 'run', 'float32')
  random, cases, tokens = np.random.default_rng(1), [], {}
  for name, lm in models.items():
    tokens[name] = random.integers(0, lm.config.vocab_size, (2, 48))
    directory = trained if name == 'trained' else folder / name
    cases.append(dict(directory=str(directory), tokens=tokens[name].tolist(), text=TEXT,
                      prompt=tokens[name][0, :9].tolist() if name == 'mtp' else None, new=24))
  request = dict(cases=cases, output=str(folder / 'theirs.npz'))
  side = Path(__file__).with_name('transformers_side.py')
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  assert Path(PEER_PYTHON).exists(), f'{PEER_PYTHON} does not exist; run `make peers`, or set PEER_PYTHON'
  run = subprocess.run([PEER_PYTHON, str(side), json.dumps(request)], env=environment | dict(HF_HUB_OFFLINE='1'),
                       capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-4000:]
  theirs = np.load(folder / 'theirs.npz')
  return {name: (lm, tokens[name], {key.rpartition('_')[0]: theirs[key] for key in theirs.files
                                    if key.endswith(f'_{i}')}) for i, (name, lm) in enumerate(models.items())}


@pytest.mark.long
@pytest.mark.parametrize('name', [*MODELS, 'transmla', 'trained'])
def test_same_logits_at_all_positions(compared, name):
  lm, tokens_BT, theirs = compared[name]
  ours = np.asarray(lm.logits(tokens_BT))
  error = np.abs(ours - theirs['logits']).max() / theirs['logits'].std()
  assert error < TOLERANCE, f'{error:.1e} of a standard deviation'


@pytest.mark.long
def test_the_tokenizer_is_carried_over(compared):
  for lm, _, theirs in compared.values():
    assert theirs['ids'].tolist() == lm.tokenizer.encode(TEXT)


@pytest.mark.long
def test_drafting_gives_the_tokens_that_transformers_gives(compared):
  """transformers' generate(use_mtp=True), which loads the MTP layer that it otherwise drops, against ours."""
  lm, tokens_BT, theirs = compared['mtp']
  out = lm.generate([tokens_BT[0, :9].tolist()], max_new_tokens=24, speculative='on')
  assert out[0].tokens == theirs['tokens'].tolist()
  assert out.stats.acceptance_rate[0] is not None

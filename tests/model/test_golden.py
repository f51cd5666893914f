"""Our model against logits recorded from Hugging Face transformers, at all positions (tests/golden/record.py)."""

import json
from pathlib import Path

import jax
import mtp_oracle
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mla_jax.checkpoint import hugging_face
from mla_jax.model import transformer
from mla_jax.model.cache import empty_cache

GOLDEN = Path(__file__).parents[1] / 'golden'
CASES = ('v2_lite', 'v2', 'v3', 'v3_plain', 'v3_dense')
TOLERANCE = 2e-4  # of the logits' standard deviation, float32


@pytest.fixture(scope='module', params=CASES)
def case(request):
  folder = GOLDEN / request.param
  config, params, buffers = hugging_face.load(folder, dtype=np.float32)
  recorded = np.load(folder / 'golden.npz')
  return folder, config, params, buffers, {name: recorded[name] for name in recorded.files}


def assert_close(ours, golden, label):
  error = np.abs(np.asarray(ours) - golden).max() / golden.std()
  assert error < TOLERANCE, f'{label}: {error:.1e} of a standard deviation'


def module_logits(model, hidden_BTD, tokens_BT):
  """Logits of every MTP module, each shorter by one position than the one before."""
  out = []
  for depth in range(1, model.config.num_nextn_predict_layers + 1):
    shifted_BT = tokens_BT[:, depth:]
    positions_BT = jax.numpy.broadcast_to(jax.numpy.arange(shifted_BT.shape[1]), shifted_BT.shape)
    hidden_BTD, _ = model.mtp_hidden(depth, hidden_BTD[:, :shifted_BT.shape[1]], shifted_BT, positions_BT, None,
                                     jax.numpy.ones(shifted_BT.shape, bool))
    out.append(model.logits(hidden_BTD))
  return out


def test_whole_sequence(case):
  _, config, params, buffers, golden = case
  graph = transformer.abstract(config).graph

  @jax.jit
  def forward(params, buffers, tokens_BT):
    model = nnx.merge(graph, params, buffers)
    hidden_BTD, _ = model.hidden(tokens_BT)
    return model.logits(hidden_BTD), module_logits(model, hidden_BTD, tokens_BT)

  logits, deeper = forward(params, buffers, golden['tokens'])
  assert_close(logits, golden['logits'], 'main model')
  assert len(deeper) == config.num_nextn_predict_layers
  for depth, ours in enumerate(deeper, 1):
    assert_close(ours, golden[f'mtp_logits_{depth}'], f'MTP module {depth}')


def test_absorbed_chunks(case):
  """The same logits in absorbed form over the cache, a chunk at a time, MTP modules included."""
  _, config, params, buffers, golden = case
  graph = transformer.abstract(config).graph
  tokens_BT = golden['tokens']
  (batch, length), chunk = tokens_BT.shape, 12

  @jax.jit
  def step(params, buffers, cache, tokens_BT, following, lengths_B):
    """`following[d - 1]`: the tokens at the same positions + d."""
    model = nnx.merge(graph, params, buffers)
    hidden_BTD, cache = model.cached(tokens_BT, cache, lengths_B)
    out = [model.logits(hidden_BTD)]
    for depth, shifted_BT in enumerate(following, 1):
      hidden_BTD, cache = model.mtp_cached(depth, hidden_BTD, shifted_BT, cache, lengths_B)
      out.append(model.logits(hidden_BTD))
    return cache, out

  cache = empty_cache(config, batch, length, np.float32, page_size=16)
  depths = config.num_nextn_predict_layers
  padded_BT = np.pad(tokens_BT, ((0, 0), (0, depths)))
  pieces = []
  for start in range(0, length, chunk):
    stop = start + chunk
    following = [padded_BT[:, start + d:stop + d] for d in range(1, depths + 1)]
    cache, out = step(params, buffers, cache, tokens_BT[:, start:stop], following, np.full(batch, stop, np.int32))
    pieces.append(out)
  logits, *deeper = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
  assert_close(logits, golden['logits'], 'main model')
  for depth, ours in enumerate(deeper, 1):
    assert_close(ours[:, :length - depth], golden[f'mtp_logits_{depth}'], f'MTP module {depth}')


def test_oracle(case):
  """The NumPy oracle makes of the stored weights what transformers made of them."""
  folder, config, _, _, golden = case
  weights = {}
  for file in folder.glob('*.safetensors'):
    weights |= {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
  oracle = mtp_oracle.Oracle(json.loads((folder / 'config.json').read_text()), weights)
  sequence = golden['tokens'][0]
  hidden, logits = oracle.main(sequence)
  assert_close(logits, golden['logits'][0], 'main model')
  for depth in range(1, config.num_nextn_predict_layers + 1):
    hidden, logits = oracle.module(depth, hidden, sequence)
    assert_close(logits, golden[f'mtp_logits_{depth}'][0], f'MTP module {depth}')
  assert oracle.margin > 2e-5  # no route hangs on rounding


def test_cases_reach_what_they_are_for():
  """Positions past YaRN's original length; selection scores below zero; experts that differ from token to token."""
  for name in ('v2_lite', 'v2', 'v3', 'v3_dense'):
    config, _, _ = hugging_face.load(GOLDEN / name)
    length = np.load(GOLDEN / name / 'golden.npz')['tokens'].shape[1]
    assert config.rope_scaling.original_max_position_embeddings < length
  _, _, buffers = hugging_face.load(GOLDEN / 'v3')
  assert buffers['bias_LE'].shape == (4, 8)
  assert buffers['bias_LE'].max() < -0.5  # sigmoid + bias < 0 for most scores

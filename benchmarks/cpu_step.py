"""How fast are a training step and greedy decoding on a CPU, beside Hugging Face's DeepseekV3 on the same shape?

    python -m benchmarks.cpu_step [--peer [--peer_python=.venv-peers/bin/python]]

Both sides float32, two threads, the widths of configs/tiny.py without MTP (the peer trains none), AdamW with clipping.
Ours trains on all devices there are: two halves of the batch in the Makefile's `CPU` environment.
Ours and the peer's rounds alternate, and medians over the rounds are compared, so that a slow spell of the machine
meets both. The peer runs in a process of its own with each of its expert and attention implementations that runs on a
CPU, and its best counts. One JSON line for a training step, one for decoding.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

import jax
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import peer_hugging_face
from configs import tiny
from mla_jax import axes
from mla_jax.config import Config
from mla_jax.decoding.engine import Decoder
from mla_jax.model import transformer
from mla_jax.training.state import initial_state, make_optimizer
from mla_jax.training.step import Controls, train_step

PEER = flags.DEFINE_bool('peer', False, 'Time transformers too, in the same run')
PEER_PYTHON = flags.DEFINE_string('peer_python', '.venv-peers/bin/python', 'An interpreter with torch and transformers')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Times each side is measured')
THREADS, PROMPT, NEW = 2, 64, 65


def config() -> Config:
  out = tiny.get_config()
  out.model = dataclasses.replace(out.model, num_nextn_predict_layers=0, aux_loss_alpha=0.0)
  return out


def hugging_face_config(c) -> dict:
  same = ('vocab_size', 'hidden_size', 'intermediate_size', 'moe_intermediate_size', 'num_hidden_layers',
          'num_attention_heads', 'n_shared_experts', 'n_routed_experts', 'routed_scaling_factor', 'kv_lora_rank',
          'q_lora_rank', 'qk_rope_head_dim', 'v_head_dim', 'qk_nope_head_dim', 'n_group', 'topk_group',
          'num_experts_per_tok', 'first_k_dense_replace', 'norm_topk_prob', 'max_position_embeddings')
  return {name: getattr(c, name) for name in same} | dict(num_key_value_heads=c.num_attention_heads)


class Ours:

  def __init__(self, c: Config):
    self.mesh = axes.make_mesh(c.mesh)
    optimizer = make_optimizer(c.optimizer, axes.letters_of(transformer.abstract(c.model).params))
    self.state = initial_state(c.model, optimizer, 0, self.mesh)
    self.step = train_step(c, optimizer)
    rows, length = c.training.batch_size, c.training.sequence_length
    batch = dict(
        tokens=np.random.default_rng(0).integers(0, 256, (rows, length + 1)).astype(np.int32),
        segments=np.ones((rows, length + 1), np.int32),
        positions=np.tile(np.arange(length + 1, dtype=np.int32), (rows, 1)))
    self.prompt = batch['tokens'][0, :PROMPT].tolist()
    # Where the step wants it, as the peer's tokens are tensors before its step begins.
    self.batch = jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(axes.TABLE['B'])))
    self.decoder = Decoder(c.model, jax.device_get(self.state.params), jax.device_get(self.state.buffers), 'float32')

  def train(self) -> float:
    """Seconds a step."""
    controls = Controls(*map(np.float32, (1e-3, 0.3, 1e-3)))

    def step():
      with jax.set_mesh(self.mesh):
        self.state, metrics = self.step(self.state, self.batch, controls)
      jax.block_until_ready(metrics)

    return peer_hugging_face.training_seconds(step)

  def decode(self) -> float:
    """Seconds a token, prefill left out."""
    run = self.decoder.start([self.prompt], max_new_tokens=NEW, speculative='off')
    while not run.finished:
      run.advance()
    return run.decode_seconds / (NEW - 1)


def peer(shape: dict) -> dict:
  environment = os.environ | {'OMP_NUM_THREADS': str(THREADS), 'HF_HUB_OFFLINE': '1'}
  # -P: or our kernels.py would be what transformers finds as the package `kernels`.
  run = subprocess.run([PEER_PYTHON.value, '-P', peer_hugging_face.__file__, json.dumps(shape)], env=environment,
                       capture_output=True, text=True, check=False)
  if run.returncode:
    raise SystemExit(f'the peer failed with {PEER_PYTHON.value} (`make peers` makes that environment):\n'
                     f'{run.stderr[-2000:]}')
  return json.loads(run.stdout.splitlines()[-1])


def main(_):
  c = config()
  tokens = c.training.batch_size * c.training.sequence_length
  shape = dict(threads=THREADS, batch=c.training.batch_size, length=c.training.sequence_length, decode_batch=1,
               prompt=PROMPT, new=NEW, config=hugging_face_config(c.model))
  ours, rounds = Ours(c), []
  for _ in range(ROUNDS.value):
    rounds.append(dict(ours=dict(train=ours.train(), decode=ours.decode()), peer=peer(shape) if PEER.value else None))
  hardware = dict(cpu=_cpu_name(), cores=os.cpu_count(), devices=jax.device_count(), jax=jax.__version__,
                  python=sys.version.split()[0])
  for what, unit in (('train', tokens), ('decode', 1)):
    mine = unit / statistics.median(r['ours'][what] for r in rounds)
    line = dict(benchmark=f'cpu_{what}', dtype='float32', threads=THREADS, tokens_per_second=mine, **hardware)
    if PEER.value:
      best = {r: min(v[what] for v in rounds[r]['peer']['variants'].values()) for r in range(len(rounds))}
      theirs = unit / statistics.median(best.values())
      variants = rounds[-1]['peer']['variants']
      line |= dict(peer='transformers ' + rounds[-1]['peer']['transformers'], torch=rounds[-1]['peer']['torch'],
                   peer_tokens_per_second=theirs, ratio=mine / theirs,
                   peer_variants={name: unit / v[what] for name, v in variants.items()})
    print(json.dumps(line), flush=True)


def _cpu_name() -> str:
  """With family and model, for clouds call very different processors `AMD EPYC`, and whether it has AVX-512."""
  info = pathlib.Path('/proc/cpuinfo')
  first = info.read_text().partition('\n\n')[0] if info.exists() else ''
  facts = {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in first.splitlines())}
  if 'model name' not in facts:
    return 'unknown'
  avx512 = 'with' if 'avx512f' in facts.get('flags', '').split() else 'without'
  return f'{facts["model name"]} (family {facts.get("cpu family")} model {facts.get("model")}, {avx512} AVX-512)'


if __name__ == '__main__':
  app.run(main)

"""What loading a checkpoint costs in host memory beside the model itself. Prints a JSON line, in MB:  model, largest
tensor, peak over what was there before, and over = peak - model.

  python tests/checkpoint/measure_memory.py --megabytes=400 [--fp8]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from mla_jax.axes import is_variable
from mla_jax.checkpoint import hugging_face, tensor_files
from mla_jax.config import ModelConfig
from mla_jax.model import transformer

EXPERT_MB, EXPERTS = 6, 16  # three matrices of 1024 x 1024 in bfloat16


def config(megabytes: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=4096, hidden_size=1024, num_hidden_layers=max(megabytes // (EXPERT_MB * EXPERTS), 1),
      num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
      intermediate_size=1024, moe_intermediate_size=1024, first_k_dense_replace=0, n_routed_experts=EXPERTS,
      n_shared_experts=1)


def write(folder: Path, megabytes: int, fp8: bool):
  _, params, buffers = transformer.abstract(config(megabytes))
  ones = [jax.tree.map(lambda v, kind=kind: np.ones(v.shape, kind), tree, is_leaf=is_variable)
          for tree, kind in ((params, ml_dtypes.bfloat16), (buffers, np.float32))]
  hugging_face.save(folder, config(megabytes), *ones, fp8='float32' if fp8 else None, file_bytes=10**9)


def status(key: str) -> float:
  """MB."""
  return int(re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1e3


def measure(folder: Path) -> dict:
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  hugging_face.load(Path(__file__).parents[1] / 'golden/v3', place=place)  # imports, threads
  largest = max(tensor.nbytes for tensor in tensor_files.scan(folder).values())
  Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  before, began = status('VmRSS'), time.perf_counter()
  _, *trees = jax.block_until_ready(hugging_face.load(folder, place=place))
  seconds, peak = time.perf_counter() - began, status('VmHWM') - before
  model = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 1e6
  return dict(model=model, largest=largest / 1e6, peak=peak, over=peak - model, seconds=seconds)


def main(arguments):
  if arguments.folder:
    print(json.dumps(measure(Path(arguments.folder))))
    return
  with tempfile.TemporaryDirectory() as parent:
    write(Path(parent) / 'hf', arguments.megabytes, arguments.fp8)
    # A process of its own, which never held what was written.
    subprocess.run([sys.executable, __file__, f'--folder={parent}/hf'], check=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--megabytes', type=int, default=400)
  parser.add_argument('--fp8', action='store_true')
  parser.add_argument('--folder')
  main(parser.parse_args())

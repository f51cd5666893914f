"""What do weights cost that stay FP8 in memory, and what do they save?

    python -m benchmarks.kept_fp8 [--layers=2 --experts=8 --new=32 --dtype=float32 --rows=1]

Writes a Hugging Face directory of random FP8 weights with DeepSeek-V2-Lite's widths (a small vocabulary), or takes
--hf=DIR, and decodes from it greedily with --fp8=dequantise and --fp8=keep. Rounds of the two alternate; medians over
the rounds are compared. A JSON line a number of rows: bytes of the weights, bytes of the compiled decode
loop's temporaries, tokens a second; and whether both gave the same tokens and log-probabilities.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile

import jax
import numpy as np
from absl import app, flags

from configs import deepseek_v2_lite
from mla_jax.checkpoint import block_fp8, published, tensor_files
from mla_jax.checkpoint.published_config import config_to_hf
from mla_jax.config import ModelConfig
from mla_jax.language_model import LanguageModel

HF = flags.DEFINE_string('hf', None, 'A directory with FP8 weights, in place of random ones')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'To compute in')
LAYERS = flags.DEFINE_integer('layers', 3, 'The first is dense')
EXPERTS = flags.DEFINE_integer('experts', 16, 'Routed experts a layer')
ROWS = flags.DEFINE_multi_integer('rows', [1, 8], 'Texts decoded at once; may be given several times')
NEW = flags.DEFINE_integer('new', 64, 'Tokens each gets')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Times each side is measured')
SCALE = np.float32(0.02)


def write(folder: pathlib.Path, config: ModelConfig):
  """Bytes below 2 in magnitude, which no scale turns into NaN or a tail."""
  random, kinds = np.random.default_rng(0), {True: block_fp8.FP8, False: tensor_files.DTYPES['BF16']}
  groups = [(tensor_files.Entry(name, np.dtype(np.float32 if name.endswith(published.SCALE) else
                                               kinds[published.is_quantized(name)]), shape),)
            for name, shape in published.tensors(config, published.shapes(config), fp8=True).items()]

  def make(group):
    entry, = group
    if entry.dtype == block_fp8.FP8:
      return ((random.integers(0, 256, entry.shape, np.uint8) & 0b10111111).view(block_fp8.FP8),)
    if entry.dtype == np.float32 or 'norm' in entry.name:
      return (np.full(entry.shape, 1 if 'norm' in entry.name else SCALE, entry.dtype),)
    return ((SCALE * random.standard_normal(entry.shape, np.float32)).astype(entry.dtype),)

  folder.mkdir()
  tensor_files.write(folder, groups, make, 10**10, lambda _: None)
  (folder / 'config.json').write_text(json.dumps(config_to_hf(config, 'bfloat16', 'float32')))


def measure(folder: pathlib.Path):
  models = {fp8: LanguageModel.load(folder, DTYPE.value, fp8) for fp8 in ('dequantise', 'keep')}
  weights = {fp8: sum(w.nbytes for w in jax.tree.leaves(lm.decoder.params)) for fp8, lm in models.items()}
  for rows in ROWS.value:
    prompts = np.random.default_rng(1).integers(0, models['keep'].config.vocab_size, (rows, 16)).tolist()
    rates, outputs, temporaries = {fp8: [] for fp8 in models}, {}, {}
    for fp8, lm in models.items():
      program = lm.decoder.start(prompts, max_new_tokens=NEW.value)._rounds
      temporaries[fp8] = program.memory_analysis().temp_size_in_bytes
    for _ in range(ROUNDS.value):
      for fp8, lm in models.items():
        out = lm.generate(prompts, max_new_tokens=NEW.value)
        rates[fp8].append(out.stats.tokens_per_second)
        outputs[fp8] = [(completion.tokens, completion.logprobs) for completion in out]
    rate = {fp8: statistics.median(found) for fp8, found in rates.items()}
    print(json.dumps(dict(
        case='kept_fp8', hardware=jax.devices()[0].device_kind, dtype=DTYPE.value, rows=rows, weight_bytes=weights,
        weights_ratio=weights['keep'] / weights['dequantise'], temporary_bytes=temporaries, tokens_per_second=rate,
        speed_ratio=rate['keep'] / rate['dequantise'], same=outputs['keep'] == outputs['dequantise'])), flush=True)


def main(_):
  if HF.value:
    measure(pathlib.Path(HF.value))
    return
  config = dataclasses.replace(
      deepseek_v2_lite.get_config().model, num_hidden_layers=LAYERS.value, n_routed_experts=EXPERTS.value,
      vocab_size=4096, max_position_embeddings=4096)
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder) / 'hf', config)
    measure(pathlib.Path(folder) / 'hf')


if __name__ == '__main__':
  app.run(main)

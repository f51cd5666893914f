"""Records the golden files beside it: tiny random DeepSeek models in Hugging Face's layout and what transformers makes
of them. Run by hand, in an environment with requirements-peers.txt:  python tests/golden/record.py

Every <case>/ gets config.json and safetensors written by transformers itself (the MTP layers, which it does not save,
by us), and golden.npz: tokens [B, T], logits [B, T, W] at all positions, and mtp_logits_<d> [B, T - d, W] of MTP module
d. The NumPy oracle must agree before anything is written.
"""

import copy
import itertools
import json
import shutil
from pathlib import Path

import mtp_oracle
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
BATCH, LENGTH = 2, 48
TOLERANCE = 5e-5  # of the logits' standard deviation, oracle (float64) against transformers (float32)
MARGIN = 5e-5  # between a chosen and a rejected expert's score: rounding must not decide a route

BASE = dict(vocab_size=60, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
            intermediate_size=40, moe_intermediate_size=14, n_routed_experts=8, num_experts_per_tok=3,
            first_k_dense_replace=1, max_position_embeddings=640, attn_implementation='eager')
V2 = dict(n_shared_experts=2, norm_topk_prob=False)
V3 = dict(n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, num_mtp_layers=0)


def yarn(mscale, mscale_all_dim, **changes):
  return dict(rope_type='yarn', rope_theta=10000.0, factor=40.0, original_max_position_embeddings=16, beta_fast=32.0,
              beta_slow=1.0, mscale=mscale, mscale_all_dim=mscale_all_dim) | changes


CASES = {
    # V2-Lite: softmax, greedy, queries not compressed; YaRN three times past the original length.
    'v2_lite': (DeepseekV2ForCausalLM, 'bfloat16', DeepseekV2Config(
        **BASE | V2 | dict(q_lora_rank=None, topk_method='greedy', rope_parameters=yarn(0.707, 0.707)))),
    # V2: groups ranked by their best expert; a YaRN ramp that blends most pairs.
    'v2': (DeepseekV2ForCausalLM, 'bfloat16', DeepseekV2Config(
        **BASE | V2 | dict(topk_method='group_limited_greedy', n_group=4, topk_group=2, routed_scaling_factor=16.0,
                           max_position_embeddings=64,
                           rope_parameters=yarn(0.707, 0.707, rope_theta=100.0, factor=4.0, beta_fast=1.0,
                                                beta_slow=0.25)))),
    # V3: a selection bias that makes every score negative, groups ranked by their best two; two MTP modules.
    'v3': (DeepseekV3ForCausalLM, 'bfloat16', DeepseekV3Config(
        **BASE | V3 | dict(num_mtp_layers=2, rope_parameters=yarn(1.0, 1.0)))),
    # No YaRN, groups, query compression or dense layer; weights not normalised, embedding and head tied; float32.
    'v3_plain': (DeepseekV3ForCausalLM, 'float32', DeepseekV3Config(
        **BASE | V3 | dict(q_lora_rank=None, num_hidden_layers=2, first_k_dense_replace=0, n_group=1, topk_group=1,
                           norm_topk_prob=False, tie_word_embeddings=True))),
    # Both mscale factors, different, and dense layers alone.
    'v3_dense': (DeepseekV3ForCausalLM, 'bfloat16', DeepseekV3Config(
        **BASE | V3 | dict(num_hidden_layers=2, first_k_dense_replace=2, rope_parameters=yarn(1.2, 0.6)))),
}


def fill(name, shape, random):
  """Gains at which attention and routing are far from uniform; every value is a bfloat16."""
  if name.endswith('e_score_correction_bias'):
    return torch.tensor(-1.5 + 0.2 * random.standard_normal(shape), dtype=torch.float32)
  if 'norm' in name:
    values = 1 + 0.2 * random.standard_normal(shape)
  else:
    gain = 1.0 if 'embed' in name else (2.5 if 'q_' in name or 'mlp.gate.' in name else 1.0) / shape[-1] ** 0.5
    values = gain * random.standard_normal(shape)
  return torch.tensor(values).to(torch.bfloat16).float()


def mtp_tensors(model, config, random):
  """The published tensors of the MTP layers: a layer of the main model's kind and what joins it to the rest."""
  last = f'model.layers.{config.num_hidden_layers - 1}.'
  layer = {k.removeprefix(last): v for k, v in model.items() if k.startswith(last)}
  width, out = config.hidden_size, {}
  for depth in range(config.num_nextn_predict_layers):
    prefix = f'model.layers.{config.num_hidden_layers + depth}.'
    shapes = {k: v.shape for k, v in layer.items()} | {
        'enorm.weight': (width,), 'hnorm.weight': (width,), 'shared_head.norm.weight': (width,),
        'eh_proj.weight': (width, 2 * width)}
    for name, shape in sorted(shapes.items()):
      values = fill(name, shape, random)
      out[prefix + name] = values if name.endswith('bias') else values.to(torch.bfloat16)
    if depth == 0:  # the release repeats these; a file without them is as good
      out[prefix + 'embed_tokens.weight'] = model['model.embed_tokens.weight'].clone()
      out[prefix + 'shared_head.head.weight'] = model['lm_head.weight'].clone()
  return out


def write(folder, kind, dtype, config, random):
  """The model's directory, from transformers' own writer."""
  model = kind(copy.deepcopy(config)).float()
  with torch.no_grad():
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
      if 'rotary' not in name:
        tensor.copy_(fill(name, tensor.shape, random))
  bias = {name: b.clone() for name, b in model.named_buffers() if name.endswith('bias')}
  model = model.to(getattr(torch, dtype))
  for name, tensor in bias.items():  # the release keeps it in float32
    model.get_submodule(name.rpartition('.')[0]).e_score_correction_bias = torch.nn.Buffer(tensor)
  depth = getattr(config, 'num_nextn_predict_layers', 0)
  model.save_pretrained(folder, max_shard_size='100KB' if depth else '1GB')
  (folder / 'generation_config.json').unlink()
  if depth:
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    saved = {}
    for file in set(index['weight_map'].values()):
      saved |= load_file(folder / file)
    tensors = mtp_tensors(saved, config, random)
    save_file(tensors, folder / 'mtp.safetensors', metadata={'format': 'pt'})
    index['weight_map'] |= dict.fromkeys(sorted(tensors), 'mtp.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


def run(folder, kind, config, tokens):
  """What transformers makes of the directory, in float32."""
  depth = getattr(config, 'num_nextn_predict_layers', 0)
  if depth:  # transformers knows layer 61 alone as an MTP layer
    first = config.num_hidden_layers
    kind._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.[{first}-{first + depth - 1}]\..*']
  model, report = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager',
                                       experts_implementation='eager', output_loading_info=True)
  assert not any(report.values()), report
  model.eval()
  out = {}
  with torch.no_grad():
    seen = model(torch.tensor(tokens), output_hidden_states=True)
    out['logits'] = seen.logits
    if depth:
      modules = MtpModel.from_pretrained(model).eval()
      modules.config._attn_implementation = 'eager'
      cache, hidden = MtpCache(config=model.config.get_mtp_config()), seen.hidden_states[-1]
      for d in range(1, depth + 1):
        positions = torch.arange(d, tokens.shape[1])[None]
        hidden = modules.forward_layer(d - 1, hidden[:, :tokens.shape[1] - d], positions, cache,
                                       input_ids=torch.tensor(tokens[:, d:]))
        out[f'mtp_logits_{d}'] = model.lm_head(hidden)
  return {name: tensor.numpy() for name, tensor in out.items()}


def check(folder, tokens, golden):
  """Asserts that the oracle agrees; whether every route is clear of rounding."""
  weights = {}
  for file in folder.glob('*.safetensors'):
    weights |= {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
  oracle = mtp_oracle.Oracle(json.loads((folder / 'config.json').read_text()), weights)
  worst = 0.0
  for row, sequence in enumerate(tokens):
    hidden, logits = oracle.main(sequence)
    ours = {'logits': logits}
    for d in range(1, len(golden)):
      hidden, ours[f'mtp_logits_{d}'] = oracle.module(d, hidden, sequence)
    worst = max(worst, *(np.abs(ours[name] - golden[name][row]).max() / golden[name].std() for name in golden))
  print(f'{folder.name}: oracle against transformers {worst:.1e} of a standard deviation, '
        f'smallest router margin {oracle.margin:.1e}, largest logit {np.abs(golden["logits"]).max():.1f}')
  assert worst < TOLERANCE, worst
  return oracle.margin > MARGIN


def main():
  torch.manual_seed(0)
  for name, (kind, dtype, config) in CASES.items():
    folder = HERE / name
    for seed in itertools.count():
      random = np.random.default_rng(seed)
      shutil.rmtree(folder, ignore_errors=True)
      write(folder, kind, dtype, config, random)
      tokens = random.integers(0, config.vocab_size, (BATCH, LENGTH))
      golden = run(folder, kind, config, tokens)
      if check(folder, tokens, golden):
        break
    for file in folder.iterdir():
      file.chmod(0o644)
    np.savez_compressed(folder / 'golden.npz', tokens=tokens.astype(np.int32), **golden)


if __name__ == '__main__':
  main()

"""The peer's side of `benchmarks.cpu_step`: transformers' DeepseekV3 in torch, on the shape it is told, with each
implementation of experts and attention that runs on a CPU. Imports torch and transformers when run, and nothing
of ours; prints one JSON line."""

import itertools
import json
import statistics
import sys
import time

EXPERTS, ATTENTION = ('eager', 'grouped_mm', 'batched_mm'), ('sdpa', 'eager')


def median_seconds(run, least: int = 3, seconds: float = 0) -> float:
  """Of as many runs as begin within `seconds`, and at least so many."""
  times, begin = [], time.perf_counter()
  while len(times) < least or time.perf_counter() < begin + seconds:
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def training_seconds(step) -> float:
  """Of one step, for both sides: the median of two seconds, after one of warming up (torch's first few are slow)."""
  median_seconds(step, 1, 1)
  return median_seconds(step, 3, 2)


def measure(shape: dict, experts: str, attention: str) -> dict:
  """{'train': seconds a step, 'decode': seconds a token, prefill left out}."""
  import torch
  from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

  torch.manual_seed(0)
  torch.set_num_threads(shape['threads'])
  model = DeepseekV3ForCausalLM._from_config(
      DeepseekV3Config(**shape['config']), attn_implementation=attention, experts_implementation=experts)
  tokens = torch.randint(0, 256, (shape['batch'], shape['length']))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

  def step():
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  model.train()
  train = training_seconds(step)
  model.eval()
  prompt = tokens[:shape['decode_batch'], :shape['prompt']]

  def generate(new):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                          do_sample=False, use_cache=True, pad_token_id=0)

  with torch.no_grad():
    generate(2)
    first, whole = (median_seconds(lambda n=n: generate(n)) for n in (1, shape['new']))
  return dict(train=train, decode=(whole - first) / (shape['new'] - 1))


def main(shape: dict):
  import torch
  import transformers
  variants = {}
  for experts, attention in itertools.product(EXPERTS, ATTENTION):
    variants[f'{experts}/{attention}'] = measure(shape, experts, attention)
  print(json.dumps(dict(variants=variants, torch=torch.__version__, transformers=transformers.__version__)))


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))

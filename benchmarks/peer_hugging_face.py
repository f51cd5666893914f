"""The peer's side of `benchmarks.cpu_step`: transformers' DeepseekV3 in torch, on the shape it is told. Runs in an
environment of its own (requirements-peers.txt) and imports nothing of ours; prints one JSON line."""

import json
import statistics
import sys
import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def median_seconds(run, repeats: int) -> float:
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def main(shape: dict):
  torch.manual_seed(0)
  torch.set_num_threads(shape['threads'])
  torch.set_default_dtype(torch.float32)
  model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape['config']))
  tokens = torch.randint(0, 256, (shape['batch'], shape['length']))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

  def step():
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  model.train()
  step()
  train = median_seconds(step, shape['repeats'])

  model.eval()
  prompt = tokens[:shape['decode_batch'], :shape['prompt']]

  def generate(new):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                          do_sample=False, use_cache=True, pad_token_id=0)

  with torch.no_grad():
    generate(2)
    first, whole = (median_seconds(lambda n=n: generate(n), 3) for n in (1, shape['new']))
  print(json.dumps(dict(train_seconds=train, decode_seconds_per_token=(whole - first) / (shape['new'] - 1),
                        torch=torch.__version__, experts=model.config._experts_implementation,
                        attention=model.config._attn_implementation)))


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))

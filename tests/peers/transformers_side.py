"""What transformers makes of directories we wrote. Runs in the environment of `make peers`, imports nothing of ours.

Argument: a JSON object {"cases": [{"directory", "tokens", "prompt" or null, "text" or null}], "output"}. Writes, into
`output`, an npz of logits_<i> [B, T, W] in float32, tokens_<i> (greedy, speculative with the MTP layers where there is
a prompt) and ids_<i> (of the text). Any tensor missing, unexpected (but an MTP layer's) or of another shape fails.
"""

import json
import re
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(directory: str):
  model, report = AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation='eager', experts_implementation='eager',
      output_loading_info=True)
  mtp = re.compile(rf'model\.layers\.{model.config.num_hidden_layers}\.')
  wrong = {key: [n for n in names if not mtp.match(str(n))] for key, names in report.items()}
  assert not any(wrong.values()), wrong
  return model.eval()


def main(request: dict):
  out = {}
  for i, case in enumerate(request['cases']):
    model = load(case['directory'])
    with torch.no_grad():
      out[f'logits_{i}'] = model(torch.tensor(case['tokens'])).logits.numpy()
      if case.get('prompt'):
        prompt = torch.tensor([case['prompt']])
        out[f'tokens_{i}'] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case['new'], do_sample=False, use_mtp=True,
            eos_token_id=None, pad_token_id=0)[0, prompt.shape[1]:].numpy()
    if case.get('text'):
      out[f'ids_{i}'] = np.array(AutoTokenizer.from_pretrained(case['directory']).encode(case['text']))
  np.savez(request['output'], **out)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))

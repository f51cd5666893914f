"""Decodes from a trained model: python infer.py --workdir=runs/demo --prompt="def main(" [--temperature=0.7 ...]"""

import dataclasses
import json

from absl import flags

from mla_jax import command_line
from mla_jax.checkpoint.hugging_face import FP8_CHOICES
from mla_jax.config import ConfigError
from mla_jax.decoding.engine import SPECULATIVE as SPECULATIVE_MODES
from mla_jax.language_model import Completions, LanguageModel
from mla_jax.model.attention import FORMS

WORKDIR = flags.DEFINE_string('workdir', None, 'A run of train.py')
HF = flags.DEFINE_string('hf', None, 'A Hugging Face model directory, in place of --workdir')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'A text to continue; may be given several times')
PROMPTS_FILE = flags.DEFINE_string('prompts_file', None, 'JSON lines with "prompt" (a text) or "tokens" (ids)')
OUTPUT = flags.DEFINE_enum('output', 'text', ['text', 'jsonl'], 'Text, or one JSON object a prompt')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'To compute in; default: as stored')
FP8 = flags.DEFINE_enum('fp8', 'dequantise', FP8_CHOICES, 'What becomes of FP8 weights of --hf in memory')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens a prompt gets at most')
TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample from this many most probable tokens; 0: all')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample from the most probable tokens that hold this share')
MIN_P = flags.DEFINE_float('min_p', 0.0, 'Sample from tokens at least this many times as probable as the first')
SEED = flags.DEFINE_integer('seed', 0, 'Of the sampling, the same for every prompt')
STOP = flags.DEFINE_multi_string('stop', [], 'A text that ends a completion; may be given several times')
LOGPROBS = flags.DEFINE_integer('logprobs', None, 'Log-probabilities in jsonl output, with this many alternatives')
SPECULATIVE = flags.DEFINE_enum('speculative', 'auto', SPECULATIVE_MODES, "Draft with the model's MTP modules")
DRAFT_TOKENS = flags.DEFINE_integer('draft_tokens', None, 'Drafts a verification; default: the number of MTP modules')
ATTENTION = flags.DEFINE_enum('attention', 'absorbed', FORMS, 'Form of MLA while decoding')
DEBUG = flags.DEFINE_bool('debug', False, 'Show stack traces')


def read_prompts(path: str) -> list:
  """Texts and lists of token ids, one JSON object a line."""
  try:
    with open(path, encoding='utf-8') as file:
      lines = [(f'{path} line {n}', line) for n, line in enumerate(file, 1) if line.strip()]
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f'--prompts_file={path} can\'t be read ({e}); name another file') from e
  return [parse_prompt(place, line) for place, line in lines]


def parse_prompt(place: str, line: str):
  try:
    prompt = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    raise ConfigError(f'{place} is no JSON ({e}); write e.g. {{"prompt": "def main("}}') from e
  if isinstance(prompt, dict) and isinstance(prompt.get('prompt'), str):
    return prompt['prompt']
  if isinstance(prompt, dict) and isinstance(prompt.get('tokens'), list):
    return prompt['tokens']
  raise ConfigError(f'{place} has neither "prompt" (a text) nor "tokens" (a list of ids); add one')


def print_stream(lm: LanguageModel, prompt, options: dict) -> Completions:
  stream = lm.stream(prompt, **options)
  for piece in stream:
    print(piece, end='', flush=True)
  print()
  return stream.completions


def print_text(prompts: list, out: Completions):
  for prompt, completion in zip(prompts, out, strict=True):
    print(f'--- {prompt!r}\n{completion.tokens if completion.text is None else completion.text}')


def print_json(prompts: list, out: Completions):
  for prompt, completion in zip(prompts, out, strict=True):
    line = dict(prompt=prompt) | dataclasses.asdict(completion)
    if LOGPROBS.value is None:
      del line['logprobs'], line['alternatives']
    print(json.dumps(line, ensure_ascii=False))


def main(_):
  if bool(WORKDIR.value) == bool(HF.value):
    raise ConfigError('give a model as either --workdir=DIR (a run of train.py) or --hf=DIR (a Hugging Face directory)')
  prompts = [*PROMPT.value, *(read_prompts(PROMPTS_FILE.value) if PROMPTS_FILE.value else [])]
  if not prompts:
    raise ConfigError('there is no prompt; give --prompt=TEXT or --prompts_file=FILE.jsonl')
  lm = LanguageModel.load(WORKDIR.value or HF.value, DTYPE.value, FP8.value)
  options = dict(
      max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value,
      min_p=MIN_P.value, seed=SEED.value, stop=STOP.value, logprobs=LOGPROBS.value or 0, speculative=SPECULATIVE.value,
      draft_tokens=DRAFT_TOKENS.value, attention=ATTENTION.value)
  if OUTPUT.value == 'text' and len(prompts) == 1 and lm.tokenizer is not None:
    out = print_stream(lm, prompts[0], options)
  else:
    out = lm.generate(prompts, **options)
    (print_text if OUTPUT.value == 'text' else print_json)(prompts, out)
  print(json.dumps(dataclasses.asdict(out.stats)))


if __name__ == '__main__':
  command_line.run(main)

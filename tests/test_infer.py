"""infer.py as a program: one process runs all the command lines, since most of each would be imports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mla_jax
from mla_jax.data.tokenizer import ByteTokenizer
from tests.decoding import small
from tests.test_language_model import GOLDEN, write_run

ROOT = Path(__file__).parents[1]
# Reads {name: arguments} and writes {name: [exit code, stdout, stderr]}.
DRIVER = '''
import contextlib, io, json, sys
from absl import flags
from mla_jax import command_line
import infer
results = {}
for name, arguments in json.load(sys.stdin).items():
  flags.FLAGS.unparse_flags()
  sys.argv = ['infer.py', *arguments]
  out, err, code = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      command_line.run(infer.main)
    except SystemExit as end:
      code = end.code or 0
  results[name] = code, out.getvalue(), err.getvalue()
print(json.dumps(results))
'''
STATS = ['new_tokens', 'tokens_per_second', 'time_to_first_token', 'acceptance_rate', 'tokens_per_step',
         'cache_bytes_per_token', 'peak_memory']
# What each wrong command line must say, after `infer.py: error: `.
WRONG = {
    'no model': (['--prompt=a'], 'either --workdir=DIR .* or --hf=DIR'),
    'two models': (['--workdir=RUN', '--hf=GOLDEN', '--prompt=a'], 'either --workdir=DIR .* or --hf=DIR'),
    'no prompt': (['--workdir=RUN'], 'no prompt'),
    'empty prompt': (['--workdir=RUN', '--prompt='], 'prompt 0 is empty'),
    'too long': (['--workdir=RUN', '--prompt=' + 90 * 'a', '--max_new_tokens=6'], 'max_position_embeddings=96'),
    'temperature': (['--workdir=RUN', '--prompt=a', '--max_new_tokens=8', '--temperature=-1'], 'temperature=-1'),
    'top_p': (['--workdir=RUN', '--prompt=a', '--max_new_tokens=8', '--top_p=1.5'], 'top_p=1.5 is out of range'),
    'new tokens': (['--workdir=RUN', '--prompt=a', '--max_new_tokens=0'], 'max_new_tokens=0 is below 1'),
    'drafts': (['--workdir=RUN', '--prompt=a', '--max_new_tokens=8', '--draft_tokens=0'], 'draft_tokens=0 is below 1'),
    'speculative': (['--workdir=RUN', '--prompt=a', '--speculative=maybe'], 'speculative=maybe.*auto.on.off'),
    'number': (['--workdir=RUN', '--prompt=a', '--top_k=some'], 'top_k=some'),
    'flag': (['--workdir=RUN', '--promt=a'], 'promt'),
    'missing run': (['--workdir=RUN/none', '--prompt=a'], r'no readable config\.json'),
    'missing file': (['--workdir=RUN', '--prompts_file=RUN/none'], "none can't be read"),
    'bad json': (['--workdir=RUN', '--prompts_file=RUN/bad.jsonl'], r'bad\.jsonl line 2 is no JSON'),
    'deep json': (['--workdir=RUN', '--prompts_file=RUN/deep.jsonl'], r'deep\.jsonl line 1 is no JSON \(.*recursion'),
    'long number': (['--workdir=RUN', '--prompts_file=RUN/long.jsonl'], r'long\.jsonl line 1 is no JSON'),
    'bad line': (['--workdir=RUN', '--prompts_file=RUN/odd.jsonl'], 'line 1 has neither "prompt"'),
    'no text': (['--workdir=RUN', '--prompts_file=RUN/half.jsonl'], r'prompt 0 is no valid text \(character 1 is half'),
    'no tokenizer': (['--hf=GOLDEN', '--prompt=a'], r'no tokenizer\.json'),
    'fp8': (['--hf=GOLDEN', '--prompt=a', '--fp8=some'], 'fp8=some.*dequantise.keep'),
    'fp8 of a run': (['--workdir=RUN', '--prompt=a', '--fp8=keep'], 'fp8=keep is for Hugging Face directories'),
    'no fp8': (['--hf=GOLDEN', '--prompt=a', '--fp8=keep'], 'v3_plain has no FP8 weights to keep'),
    'vocabulary': (['--workdir=RUN', '--prompts_file=RUN/ids.jsonl'], 'prompt 0 has token id 999'),
}
RIGHT = {
    'text': ['--workdir=RUN', '--prompt=ab', '--max_new_tokens=20'],
    'stop': ['--workdir=RUN', '--prompt=ab', '--max_new_tokens=20', '--stop=nowhere', '--stop=STOP'],
    'jsonl': ['--workdir=RUN', '--prompts_file=RUN/two.jsonl', '--output=jsonl', '--max_new_tokens=20', '--logprobs=2'],
    'sampled': ['--workdir=RUN', '--prompt=ab', '--prompt=cd', '--output=jsonl', '--max_new_tokens=20',
                '--temperature=2', '--speculative=off', '--seed=3'],
    'fp8 dequantised': ['--hf=RUN/fp8', '--prompt=ab', '--output=jsonl', '--max_new_tokens=20', '--logprobs=0'],
    'fp8 kept': ['--hf=RUN/fp8', '--prompt=ab', '--output=jsonl', '--max_new_tokens=20', '--logprobs=0', '--fp8=keep'],
}


@pytest.fixture(scope='module')
def lm():
  c = small.config(1, vocab_size=264, num_hidden_layers=1, first_k_dense_replace=0)
  return mla_jax.LanguageModel(c, *small.weights(c, 0), ByteTokenizer())


@pytest.fixture(scope='module')
def expected(lm):
  return lm.generate('ab', max_new_tokens=20)[0]


@pytest.fixture(scope='module')
def results(lm, expected, tmp_path_factory):
  run = write_run(tmp_path_factory.mktemp('run'), lm)
  lm.save_hf(run / 'fp8', fp8='float32')
  (run / 'two.jsonl').write_text('{"prompt": "ab"}\n\n{"tokens": [256, 97, 98]}\n')
  (run / 'bad.jsonl').write_text('{"prompt": "ab"}\n{"prompt": \n')
  (run / 'deep.jsonl').write_text(100_000 * '[')
  (run / 'long.jsonl').write_text('{"tokens": [' + 5000 * '1' + ']}')
  (run / 'odd.jsonl').write_text('{"promt": "ab"}\n')
  (run / 'half.jsonl').write_text(r'{"prompt": "a\ud800"}')
  (run / 'ids.jsonl').write_text('{"tokens": [999]}\n')
  names = {'RUN': str(run), 'GOLDEN': str(GOLDEN / 'v3_plain'), 'STOP': expected.text[4:7]}
  lines = RIGHT | {name: arguments for name, (arguments, _) in WRONG.items()}
  lines = {name: [re.sub('|'.join(names), lambda m: names[m[0]], a) for a in arguments]
           for name, arguments in lines.items()}
  done = subprocess.run([sys.executable, '-c', DRIVER], input=json.dumps(lines), capture_output=True, text=True,
                        cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, check=False)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_text_is_streamed_and_the_last_line_is_json(results, expected):
  code, out, err = results['text']
  text, _, last = out.removesuffix('\n').rpartition('\n')
  assert (code, text, 'Traceback' in err) == (0, expected.text, False)
  stats = json.loads(last)
  assert set(STATS) <= set(stats)
  assert stats['new_tokens'] == 20
  assert stats['peak_memory'] is None
  assert 0 < stats['acceptance_rate'][0] < 1
  code, out, _ = results['stop']
  assert (code, out.rpartition('\n{')[0]) == (0, expected.text[:expected.text.index(expected.text[4:7])])


def test_jsonl_has_a_line_a_prompt(results, expected):
  code, out, _ = results['jsonl']
  first, second, stats = map(json.loads, out.splitlines())
  assert code == 0
  assert first['prompt'] == 'ab'
  assert second['prompt'] == [256, 97, 98]
  for line in (first, second):
    assert (line['text'], line['tokens'], line['finish_reason']) == (expected.text, expected.tokens, 'length')
    assert len(line['logprobs']) == 20
    # Greedy: the token itself is the likeliest of its two alternatives.
    for token, logprob, others in zip(line['tokens'], line['logprobs'], line['alternatives'], strict=True):
      assert len(others) == 2
      assert others[str(token)] == max(others.values()) == pytest.approx(logprob)
  assert stats['new_tokens'] == 40


def test_sampling_flags_reach_the_model(results, lm):
  code, out, _ = results['sampled']
  *lines, stats = map(json.loads, out.splitlines())
  again = lm.generate(['ab', 'cd'], max_new_tokens=20, temperature=2.0, seed=3, speculative='off')
  assert code == 0
  assert [line['tokens'] for line in lines] == [completion.tokens for completion in again]
  assert 'logprobs' not in lines[0]
  assert stats['acceptance_rate'] == []


def test_kept_fp8_weights_decode_as_dequantised_ones(results):
  (code, out, _), (_, other, _) = results['fp8 kept'], results['fp8 dequantised']
  assert code == 0
  assert out.splitlines()[0] == other.splitlines()[0]
  assert len(json.loads(out.splitlines()[0])['logprobs']) == 20


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_command_is_one_clear_line_and_exit_code_2(results, name):
  code, out, err = results[name]
  assert (code, out) == (2, '')
  lines = [line for line in err.splitlines() if line.strip()]
  assert len(lines) == 1, err
  assert re.match(f'infer.py: error: .*{WRONG[name][1]}', lines[0]), err

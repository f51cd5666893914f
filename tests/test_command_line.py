"""Commands as a person types them: each mistake is one clear line on stderr and a non-zero exit."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from mla_jax.checkpoint import hugging_face, transmla

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=configs/tiny.py'


def train(*arguments, **environment):
  return subprocess.run([sys.executable, 'train.py', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                        check=False, env=os.environ | environment)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((TINY, '--workdir={}', '--config.training.stepz=3'),
     '--config.training.stepz is no setting; did you mean --config.training.steps'),
    ((TINY, '--workdir={}', '--config.training.steps=many'), "invalid literal for int() with base 10: 'many'"),
    (('--config=configs/nothing.py', '--workdir={}'), 'configs/nothing.py does not exist; there is configs/'),
    (('--config=README.md', '--workdir={}'), 'the file of --config can not be run: SyntaxError'),
    ((TINY,), '--workdir is missing'),
    ((TINY, '--workdir='), '--workdir=: it is empty; name a folder'),
    ((TINY, '--workdir={}', '--stepz=3'), "Unknown command line flag 'stepz'"),
    ((TINY, '--workdir={}', '--config.model.n_group=3'), 'n_routed_experts=8 is not divisible by n_group=3'),
    ((TINY, '--workdir={}', '--config.mesh.expert=3'), 'n_routed_experts=8 is not divisible by mesh axis expert=3'),
])
def test_mistakes(tmp_path, arguments, message):
  run = train(*(argument.format(tmp_path / 'run') for argument in arguments))
  assert run.returncode == 2
  assert run.stderr.startswith('train.py: error: ')
  assert message in run.stderr
  assert run.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_the_systems_errors_are_one_line_and_a_tilde_is_home(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'tokenizer').write_text('in the way')
  run = train(TINY, '--workdir=~/run', HOME=str(tmp_path))
  assert (run.returncode, run.stderr) == (2, f"train.py: error: [Errno 17] File exists: '{tmp_path}/run/tokenizer'\n")


@pytest.mark.parametrize(('command', 'arguments'), [(hugging_face, ('export', 'x')), (transmla, ('x',))])
def test_the_systems_errors_are_one_line_in_commands_too(capsys, command, arguments):
  values = flags.FlagValues()
  command.define_flags(values)
  values(['', *arguments])
  assert command.main(['', *arguments, 300 * 'n'], values) == 2
  name = command.__name__.rpartition('.')[2]
  assert capsys.readouterr().err == f"{name}: error: [Errno 36] File name too long: '{300 * 'n'}'\n"

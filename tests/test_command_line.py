"""train.py as a person types it: each mistake is one clear line on stderr and a non-zero exit."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=configs/tiny.py'


def train(*arguments):
  return subprocess.run([sys.executable, 'train.py', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                        check=False)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((TINY, '--workdir={}', '--config.training.stepz=3'),
     '--config.training.stepz is no setting; did you mean --config.training.steps'),
    ((TINY, '--workdir={}', '--config.training.steps=many'), "invalid literal for int() with base 10: 'many'"),
    (('--config=configs/nothing.py', '--workdir={}'), 'configs/nothing.py does not exist; there is configs/'),
    ((TINY,), '--workdir is missing'),
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

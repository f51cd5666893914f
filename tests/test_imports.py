"""The house's import direction, read off the syntax tree: right may use left, never the other way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
KERNELS, CONFIG = {'pallas_kernels'}, {'mla_jax.config'}
BASE = CONFIG | KERNELS | {'mla_jax.axes'}
MODEL = BASE | {'mla_jax.model'}
CHECKPOINT = MODEL | {'mla_jax.checkpoint'}
DATA = CONFIG | {'mla_jax.data'}
TOP = CHECKPOINT | DATA | {'mla_jax.training', 'mla_jax.decoding', 'mla_jax.language_model', 'mla_jax.planning',
                           'mla_jax.report', 'mla_jax.command_line'}
ALLOWED = {  # the longest prefix counts
    'pallas_kernels': KERNELS,
    'mla_jax.config': set(),
    'mla_jax.axes': CONFIG,
    'mla_jax.model': MODEL,
    'mla_jax.checkpoint': CHECKPOINT,
    'mla_jax.data': DATA,
    'configs': CONFIG | {'configs'},
    'mla_jax.training': CHECKPOINT | DATA | {'mla_jax.training'},
    'mla_jax.decoding': CHECKPOINT | {'mla_jax.decoding'},
    'mla_jax.language_model': CHECKPOINT | DATA | {'mla_jax.decoding', 'mla_jax.language_model'},
    'mla_jax.report': CHECKPOINT,
    'mla_jax.planning': CHECKPOINT | {'mla_jax.training', 'mla_jax.planning'},
    'mla_jax.command_line': CONFIG,
    'mla_jax': {'mla_jax.language_model', 'mla_jax.config', 'mla_jax.model'},
    'train': TOP, 'infer': TOP,
}
OURS = ('mla_jax', 'pallas_kernels', 'configs', 'benchmarks', 'tests')


def module_name(file: pathlib.Path) -> str:
  parts = file.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def sources():
  files = [*ROOT.glob('mla_jax/**/*.py'), *ROOT.glob('pallas_kernels/**/*.py'), *ROOT.glob('configs/*.py'),
           ROOT / 'train.py', ROOT / 'infer.py']
  return {module_name(f): f for f in files}


def imports(tree, inside_function=False):
  """(module, line, whether within a function) of every import."""
  for node in ast.iter_child_nodes(tree):
    inside = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno, inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'relative import, line {node.lineno}'
      # `from mla_jax.model import moe` names the module mla_jax.model.moe.
      yield from ((f'{node.module}.{alias.name}', node.lineno, inside) for alias in node.names)
    yield from imports(node, inside)


def is_in(module: str, package: str) -> bool:
  return module == package or module.startswith(package + '.')


def violations(name: str, text: str) -> list[str]:
  allowed = ALLOWED[max((key for key in ALLOWED if is_in(name, key)), key=len)]
  out = []
  for module, line, inside in imports(ast.parse(text)):
    if not module.startswith(OURS):
      continue
    if not any(is_in(module, package) or package == module for package in allowed):
      out.append(f'{name}:{line} imports {module}')
    if inside and name != 'mla_jax':  # the public face loads its rooms when they are asked for
      out.append(f'{name}:{line} imports {module} inside a function')
  return out


@pytest.mark.parametrize('name', sources())
def test_import_direction(name):
  assert violations(name, sources()[name].read_text()) == []


@pytest.mark.parametrize(('name', 'text'), [
    ('mla_jax.model.moe', 'from mla_jax.training import loss'),
    ('mla_jax.decoding.engine', 'import mla_jax.training.step'),
    ('mla_jax.data.pipeline', 'from mla_jax.model import cache'),
    ('pallas_kernels.mla_decode.xla', 'from mla_jax.config import Config'),
    ('mla_jax.training.step', 'def f():\n  from mla_jax.model import moe'),
])
def test_the_check_can_fail(name, text):
  assert len(violations(name, text)) == 1

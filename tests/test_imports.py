"""The house's import direction, read off the syntax tree: right may use left, never the other way."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
KERNELS, CONFIG, FILES = {'pallas_kernels'}, {'mla_jax.config'}, {'mla_jax.files'}
BASE = CONFIG | KERNELS | {'mla_jax.axes'}
MODEL = BASE | {'mla_jax.model'}
CHECKPOINT = MODEL | FILES | {'mla_jax.checkpoint'}
DATA = CONFIG | FILES | {'mla_jax.data'}
TOP = CHECKPOINT | DATA | {'mla_jax.training', 'mla_jax.decoding', 'mla_jax.language_model', 'mla_jax.planning',
                           'mla_jax.report', 'mla_jax.command_line'}
ALLOWED = {  # the longest prefix counts
    'pallas_kernels': KERNELS,
    'mla_jax.config': set(),
    'mla_jax.files': set(),
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
    if not any(is_in(module, package) for package in allowed):
      out.append(f'{name}:{line} imports {module}')
    if inside and name != 'mla_jax':  # the public face loads its rooms when they are asked for
      out.append(f'{name}:{line} imports {module} inside a function')
  return out


def cycle(texts: dict[str, str]) -> list[str]:
  """Modules that import each other in a ring, the first one again at the end; [] where there is no ring."""
  def uses(name):
    for module, *_ in imports(ast.parse(texts[name])):
      # A name in a module is the module; in a package's __init__ it may be either.
      found = [known for known in texts if is_in(module, known)]
      if found and max(found, key=len) != name:
        yield max(found, key=len)

  try:
    graphlib.TopologicalSorter({name: set(uses(name)) for name in texts}).prepare()
  except graphlib.CycleError as e:
    return e.args[1]
  return []


def test_no_module_imports_itself_by_way_of_others():
  assert cycle({name: file.read_text() for name, file in sources().items()}) == []


def test_a_cycle_within_a_room_is_found():
  texts = {'mla_jax.model.a': 'from mla_jax.model import b', 'mla_jax.model.b': 'from mla_jax.model.c import f',
           'mla_jax.model.c': 'import mla_jax.model.a as a', 'mla_jax.model': 'from mla_jax.model import a'}
  assert sorted(set(cycle(texts))) == ['mla_jax.model.a', 'mla_jax.model.b', 'mla_jax.model.c']


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

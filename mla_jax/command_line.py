"""What train.py and infer.py share: flags that fail in one clear line, and exit codes."""

import itertools
import logging
import pathlib
import re
import sys

from absl import app, flags
from absl import logging as absl_logging

from mla_jax.config import Config, ConfigError, leaf_keys, unknown_key


def _fail(message: str):
  name = sys.argv[0].rpartition('/')[2]
  print(f'{name}: error: {" ".join(str(message).split())}', file=sys.stderr)
  sys.exit(2)


def parse(argv: list[str], config_flag: flags.FlagHolder | None = None) -> list[str]:
  """absl's flag parsing with every failure turned into one line: an unknown flag, a wrong --config key (the nearest
  right ones are named), a value of the wrong type, a config file that isn't there."""
  if config_flag is not None:
    _check_config_flags(argv[1:])
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, TypeError, ValueError) as e:
    missing = re.match(r'flag (--\S+)=None', str(e))
    _fail(f'{missing[1]} is missing' if missing else e)
  except Exception as e:  # whatever running the config file raises
    if '--debug' in argv:
      raise
    _fail(f'the file of --config can not be run: {type(e).__name__}: {e}; --debug shows where')
  if len(rest) > 1:
    _fail(f'{rest[1]!r} is no flag; flags begin with --')
  return rest


def _check_config_flags(arguments: list[str]):
  """Before absl sees them: its config flags answer a wrong key with a KeyError and a missing file with silence."""
  known = [f'--config.{name}' for name in leaf_keys(Config())]
  for argument, following in itertools.zip_longest(arguments, arguments[1:]):
    name, has_value, value = ('-' + argument if re.match('-[^-]', argument) else argument).partition('=')
    if name.startswith('--config.') and name not in known:
      _fail(unknown_key(name, known))
    if name == '--config':
      file = pathlib.Path(value if has_value else following or '')
      if not file.is_file():
        there = ', '.join(sorted(str(f) for f in file.parent.glob('*.py'))) or f'nothing in {file.parent}'
        _fail(f'--config={file} does not exist; there is {there}')


def run(main, config_flag: flags.FlagHolder | None = None):
  """Runs `main(argv)` and exits with what it returns. A ConfigError or an OSError is one line and exit code 2; with
  --debug all errors show their stack."""
  # Our own libraries speak; Orbax and others, which share absl's logger, only warn.
  absl_logging.set_verbosity(absl_logging.WARNING)
  # Orbax logs the stack of an error in each of its threads and raises it too; whoever gets it says it in one line.
  absl_logging.get_absl_handler().addFilter(lambda record: record.exc_info is None or flags.FLAGS.debug)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  for library in ('mla_jax', 'pallas_kernels'):
    logging.getLogger(library).setLevel(logging.INFO)
    logging.getLogger(library).addHandler(handler)
    logging.getLogger(library).propagate = False

  def guarded(argv):
    if flags.FLAGS.debug:
      return main(argv)
    try:
      return main(argv)
    except (ConfigError, OSError) as e:
      _fail(e)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      return 130

  app.run(guarded, flags_parser=lambda argv: parse(argv, config_flag))

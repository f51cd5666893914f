"""What train.py and infer.py share: flags that fail in one clear line, and exit codes."""

import logging
import sys

from absl import app, flags

from mla_jax.config import Config, ConfigError, leaf_keys, unknown_key


def _fail(message: str):
  name = sys.argv[0].rpartition('/')[2]
  print(f'{name}: error: {" ".join(str(message).split())}', file=sys.stderr)
  sys.exit(2)


def parse(argv: list[str], config_flag: flags.FlagHolder | None = None) -> list[str]:
  """absl's flag parsing with every failure turned into one line: an unknown flag, a wrong --config key (the nearest
  right ones are named), a value of the wrong type, a config file that isn't there."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      _fail(f'{rest[1]!r} is no flag; flags begin with --')
    if config_flag is not None:
      config_flag.value.model  # noqa: B018  a missing file raises here and not before
    return rest
  except KeyError as e:
    key = str(e.args[0]).strip('"\'').split()[0].strip('"\'')
    _fail(unknown_key(f'--config.{key}', [f'--config.{name}' for name in leaf_keys(Config())]))
  except OSError as e:
    _fail(str(e).partition('\n')[0])
  except (flags.Error, TypeError, ValueError, AttributeError) as e:
    _fail(e)


def run(main, config_flag: flags.FlagHolder | None = None):
  """Runs `main(argv)` and exits with what it returns. A ConfigError is one line and exit code 2; with --debug all
  errors show their stack."""
  # Our own libraries speak; Orbax and others, which share absl's logger, only warn.
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
    except ConfigError as e:
      _fail(e)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      return 130

  app.run(guarded, flags_parser=lambda argv: parse(argv, config_flag))

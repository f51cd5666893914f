"""Trains a model: python train.py --config=configs/tiny.py --workdir=runs/demo [--config.training.steps=200 ...]"""

import os

from absl import flags
from ml_collections import config_flags

from mla_jax import command_line, report
from mla_jax.training import loop

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; any setting: --config.training.steps=200')
WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics and the report go; resumed if it has some')
INIT_FROM = flags.DEFINE_string('init_from', '', 'A Hugging Face directory or another workdir to take weights from')
ALLOW_OLDER = flags.DEFINE_bool('allow_older_checkpoint', False,
                                'Continue from an older checkpoint if the newest is damaged')
DEBUG = flags.DEFINE_bool('debug', False, 'Show stack traces')
flags.mark_flags_as_required(['config', 'workdir'])
flags.register_validator('workdir', lambda name: name != '', 'it is empty; name a folder')


def main(_):
  workdir, init_from = map(os.path.expanduser, (WORKDIR.value, INIT_FROM.value))
  code = loop.train(CONFIG.value, workdir, init_from=init_from, allow_older_checkpoint=ALLOW_OLDER.value)
  print(f'report: {report.write(workdir)}')
  return code


if __name__ == '__main__':
  command_line.run(main, CONFIG)

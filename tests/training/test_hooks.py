"""What a person at the terminal is told."""

import numpy as np

from mla_jax import axes
from mla_jax.training import hooks
from mla_jax.training.schedule import BatchSchedule
from mla_jax.training.step import Controls
from tests.training import small


def test_skipped_steps_are_said_when_they_rise_and_an_unknown_rate_is_not(tmp_path, caplog):
  config = small.config(steps=5)
  recorder = hooks.Recorder(tmp_path, config, axes.make_mesh(config.mesh), 0, BatchSchedule(config.training))
  numbers = dict.fromkeys(('loss', 'main_loss', 'mtp_loss', 'balance_loss', 'grad_norm'), np.float32(1))
  with caplog.at_level('INFO', logger='mla_jax'), recorder:
    for step, skipped in enumerate((0, 1, 1, 3, 3), 1):
      recorder.step(step, Controls(1e-3, 0.3, 0.0), numbers | dict(
          skipped_steps=np.int32(skipped), load_LE=np.zeros((0, 0))))
  warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert [line.partition(' changed nothing')[0] for line in warned] == ['1 steps up to step 2', '3 steps up to step 4']
  said = [r.getMessage() for r in caplog.records if r.levelname == 'INFO']
  assert said[0] == 'step 1 of 5: loss 1.000, MTP 1.000'  # it compiled, so it has no rate
  assert said[1].endswith(' tokens/s')

"""What a run tells: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import contextlib
import json
import logging
import math
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm
from tensorboardX import SummaryWriter
from tqdm.contrib.logging import logging_redirect_tqdm

from mla_jax.config import Config
from mla_jax.files import read_records, replace_text
from mla_jax.training.schedule import BatchSchedule
from mla_jax.training.throughput import flops_per_token, peak_flops

log = logging.getLogger(__name__)

LIBRARIES = ('mla_jax', 'pallas_kernels')  # whose loggers speak to the person at the terminal


def truncate_metrics(file: pathlib.Path, step: int):
  """Cuts metrics.jsonl back to `step`; a line torn by a crash goes too."""
  if file.exists():
    kept = [line for _, line, record in read_records(file) if record is not None and record['step'] <= step]
    replace_text(file, ''.join(line + '\n' for line in kept))


class Recorder:
  """Turns metrics into records. Device values are fetched at logged steps only; time spent compiling, evaluating or
  saving is left out of the rates."""

  def __init__(self, workdir: pathlib.Path, config: Config, mesh, first_step: int, plan: BatchSchedule):
    self._config, self._plan, self._devices = config, plan, mesh.size
    self._file_name, self._log_dir, self._first = workdir / 'metrics.jsonl', workdir / 'tensorboard', first_step
    self._flops = flops_per_token(config.model, config.training.sequence_length)
    self._peak = peak_flops()
    self._seconds, self._since, self._counted = 0.0, None, first_step
    self._skipped = 0  # steps, as the person was last told
    self._entry = None  # written one record late, so that an evaluation of the same step joins it

  def __enter__(self):
    truncate_metrics(self._file_name, self._first)
    self._file = self._file_name.open('a')
    self._events = SummaryWriter(str(self._log_dir), purge_step=self._first + 1)
    steps = self._config.training.steps
    self._bar = tqdm.tqdm(total=steps, initial=self._first, unit='step', dynamic_ncols=True,
                          disable=not sys.stderr.isatty())
    self._redirected = contextlib.ExitStack()
    if not self._bar.disable:  # log lines go above the bar, not into it
      self._redirected.enter_context(logging_redirect_tqdm([logging.getLogger(name) for name in LIBRARIES]))
    return self

  def __exit__(self, *_):
    self._write()
    self._redirected.close()
    self._bar.close()
    self._events.close()
    self._file.close()

  @contextlib.contextmanager
  def paused(self, pending):
    """What runs inside does not count as training time; waits for `pending` arrays first."""
    jax.block_until_ready(pending)
    self._stop_clock()
    yield
    self._start_clock()

  def _stop_clock(self):
    if self._since is not None:
      self._seconds += time.perf_counter() - self._since
      self._since = None

  def _start_clock(self):
    self._since = time.perf_counter()

  def step(self, step: int, controls, metrics: dict):
    """To be called after every step."""
    self._bar.update()
    compiled = self._plan.batch_size(step - 1) != self._plan.batch_size(step - 2) or step == self._first + 1
    if compiled:  # this step compiled: don't count it
      jax.block_until_ready(metrics)
      self._counted, self._seconds = step, 0.0
      self._start_clock()
    if step % self._config.training.log_interval and step != self._config.training.steps:
      return
    metrics = jax.device_get(metrics)  # waits for the step, so the clock is read after
    self._stop_clock()
    self._write()
    load_LE = metrics.pop('load_LE')
    entry = dict(step=step, tokens=self._plan.tokens_before(step))
    entry |= {name: metrics[name].item() for name in (
        'loss', 'main_loss', 'mtp_loss', 'balance_loss', 'grad_norm', 'skipped_steps')}
    entry['learning_rate'] = float(controls.learning_rate)
    entry |= self._rates(step)
    if load_LE.size:
      violation_L = load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9) - 1
      entry['max_violation'] = violation_L.max().item()
      entry['layer_violations'] = [round(v, 4) for v in violation_L.tolist()]
    else:
      entry['max_violation'] = None
    self._entry = entry
    self._show(entry)
    if entry['skipped_steps'] > self._skipped:
      self._skipped = entry['skipped_steps']
      log.warning('%d steps up to step %d changed nothing, because their gradient was not finite; if it goes on, '
                  'lower optimizer.learning_rate', self._skipped, step)
    self._start_clock()

  def _rates(self, step: int) -> dict:
    done, tokens = step - self._counted, self._plan.tokens_before(step) - self._plan.tokens_before(self._counted)
    seconds, self._seconds, self._counted = self._seconds, 0.0, step
    if not done or not seconds:
      return dict(tokens_per_second=None, step_seconds=None, mfu=None)
    rate = tokens / seconds
    mfu = rate * self._flops / (self._peak * self._devices) if self._peak else None
    return dict(tokens_per_second=rate, step_seconds=seconds / done, mfu=mfu)

  def _show(self, entry: dict):
    said = f'loss {entry["main_loss"]:.3f}'
    if self._config.model.num_nextn_predict_layers:
      said += f', MTP {entry["mtp_loss"]:.3f}'
    if entry['tokens_per_second'] is not None:
      said += f', {entry["tokens_per_second"]:,.0f} tokens/s'
    self._bar.set_postfix_str(said)
    if self._bar.disable:
      log.info('step %d of %d: %s', entry['step'], self._config.training.steps, said)

  def evaluation(self, step: int, results: dict):
    """Adds an evaluation's results to this step's record."""
    if self._entry is None or self._entry['step'] != step:
      self._write()
      self._entry = dict(step=step, tokens=self._plan.tokens_before(step))
    self._entry |= results
    said = ', '.join(f'{name} {value:.4f}' for name, value in results.items())
    self._bar.write(f'step {step}: {said}', file=sys.stderr)
    self._write()

  def _write(self):
    if self._entry is None:
      return
    entry, self._entry = self._entry, None
    # JSON has no NaN.
    entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    self._file.write(json.dumps(entry) + '\n')
    self._file.flush()
    for name, value in entry.items():
      if isinstance(value, (int, float)) and name != 'step':
        self._events.add_scalar(name, value, entry['step'])

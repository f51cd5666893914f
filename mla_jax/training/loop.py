"""The run: build everything, then `for step: state, metrics = train_step(state, batch); hooks(...)`."""

import dataclasses
import json
import logging
import pathlib
import signal

import jax
import numpy as np

from mla_jax import axes
from mla_jax.checkpoint import hugging_face, store, tensor_files
from mla_jax.config import Config, ConfigError, leaf_keys, to_dict
from mla_jax.data import pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.files import replace_text
from mla_jax.model import transformer
from mla_jax.training import schedule
from mla_jax.training.hooks import Recorder
from mla_jax.training.state import TrainState, initial_state, make_optimizer, shardings
from mla_jax.training.step import Controls, eval_step, train_step

log = logging.getLogger(__name__)

PREEMPTED = 75  # exit code: stopped by a signal, all saved
FIXED = ('model.', 'data.', 'training.batch_', 'training.sequence_length')  # what a resumed run can't change


def train(config: Config, workdir: str, *, init_from: str = '', allow_older_checkpoint: bool = False) -> int:
  """Trains to `training.steps`, resuming what `workdir` holds. Returns 0, or 75 when a signal stopped it and all is
  saved. Raises ConfigError, one line, where settings, data or checkpoints can't work."""
  config.validate()
  if jax.process_count() > 1:
    raise ConfigError(f'{jax.process_count()} processes are not supported yet; run one process that sees all devices')
  workdir = pathlib.Path(workdir)
  mesh = axes.make_mesh(config.mesh)
  _check_batches(config, mesh)
  tokenizer = load_tokenizer(config.data.tokenizer)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ConfigError(f'the tokenizer has {tokenizer.vocab_size} tokens, above model.vocab_size='
                      f'{config.model.vocab_size}; use at least that many')
  length = config.training.sequence_length + 1
  batches = pipeline.Batches(config.data, tokenizer, length=length, num_rows=config.training.batch_size)
  held_out = _held_out(config, tokenizer, length)

  model = transformer.abstract(config.model)
  optimizer = make_optimizer(config.optimizer, axes.letters_of(model.params))
  checkpoints = store.Store(_open_workdir(workdir, config, tokenizer), config.training.keep_checkpoints)
  plan = schedule.BatchSchedule(config.training)
  first = checkpoints.usable_step(
      allow_older=allow_older_checkpoint, way_out='pass --allow_older_checkpoint to continue from step {older}')
  if first is None:
    first = 0
    state = initial_state(config.model, optimizer, config.training.seed, mesh)
    if init_from:
      state = _initialise_from(init_from, config, state, mesh)
  else:
    state, run = _restore(checkpoints, first, model, optimizer, mesh)
    batches.restore(run['data'])
    log.info('resumed %s at step %d', workdir, first)
    if init_from:
      log.warning('--init_from=%s is not used: %s has weights of its own', init_from, workdir)

  def save(step, state):
    if step not in checkpoints.steps():
      checkpoints.save(step, dict(params=state.params, buffers=state.buffers),
                       dict(optimizer=state.optimizer, skipped=state.skipped),
                       dict(step=step, tokens=plan.tokens_before(step), data=batches.state()))

  evaluate = eval_step(config)
  recorder = Recorder(workdir, config, mesh, first, plan)
  run_step = train_step(config, optimizer)
  with jax.set_mesh(mesh), recorder, _Signals() as stop:
    _announce(config, model, mesh, plan, first)
    step = first
    for step in range(first + 1, config.training.steps + 1):
      batch = batches.next(plan.batch_size(step - 1))
      controls = _controls(plan.tokens_before(step), config)
      state, metrics = run_step(state, batch, controls)
      recorder.step(step, controls, metrics)
      t = config.training
      if held_out and (step % t.eval_interval == 0 or step == t.steps):
        with recorder.paused(state):
          recorder.evaluation(step, _evaluate(evaluate, state, held_out))
      if step % t.checkpoint_interval == 0 or step == t.steps or stop.asked:
        with recorder.paused(state):
          save(step, state)
      if stop.asked:
        break
    checkpoints.close()
  if step < config.training.steps:
    log.warning('stopped by %s at step %d, all saved; the same command continues', stop.asked, step)
    return PREEMPTED
  return 0


def _controls(tokens: int, config: Config) -> Controls:
  return Controls(*map(np.float32, (
      schedule.learning_rate(tokens, config.optimizer), schedule.mtp_loss_weight(tokens, config.training),
      schedule.bias_update_speed(tokens, config.training))))


def _evaluate(evaluate, state: TrainState, held_out) -> dict:
  total = jax.tree.map(lambda *parts: float(sum(parts)),
                       *(evaluate(state.params, state.buffers, batch) for batch in held_out))
  out = dict(held_out_loss=total['nats'] / max(total['predictions'], 1))
  if 'compared' in total:
    out['held_out_mtp_acceptance'] = total['agreed'] / max(total['compared'], 1)
  return out


def _held_out(config: Config, tokenizer, length: int) -> list[dict]:
  if not config.data.held_out_fraction:
    log.warning('data.held_out_fraction=0: no held-out loss')
    return []
  return pipeline.held_out_batches(config.data, tokenizer, length=length, batch_size=config.training.batch_size,
                                   num_batches=config.training.eval_batches)


def _check_batches(config: Config, mesh):
  """Every batch of the ramp, and every micro-batch of it, must divide over the mesh's batch axes."""
  ways = int(np.prod([mesh.shape[name] for name in axes.TABLE['B']]))
  for stage in schedule.BatchSchedule(config.training).stages:
    rows = stage.batch_size // config.training.gradient_accumulation
    if rows % ways:
      raise ConfigError(f'a micro-batch of {rows} sequences (batch {stage.batch_size}, gradient_accumulation='
                        f'{config.training.gradient_accumulation}) is not divisible by {ways} devices of mesh axes '
                        f'{", ".join(axes.TABLE["B"])}; use a multiple of {ways}')


def _open_workdir(workdir: pathlib.Path, config: Config, tokenizer) -> pathlib.Path:
  """Writes what identifies the run, or compares it with what is there."""
  facts, file, data_file = to_dict(config), workdir / 'config.json', workdir / 'data.json'
  data = dict(source=config.data.source, digest=pipeline.source_digest(config.data))
  before = leaf_keys(store.read_config(workdir)) if file.exists() else {}  # what is no run's is not overwritten
  # Until something is saved there is nothing to be true to: a start that failed must not bind the next one.
  if before and store.saved_steps(workdir):
    now = leaf_keys(config)
    changed = [key for key in now if before.get(key) != now[key]]
    if fixed := [key for key in changed if key.startswith(FIXED)]:
      told = ', '.join(f'{key} (was {before.get(key)!r}, now {now[key]!r})' for key in fixed[:4])
      raise ConfigError(f'{workdir} was started with another {told}; use the old values or another --workdir')
    for key in changed:
      log.warning('resuming with another %s: was %r, now %r', key, before.get(key), now[key])
    if data_file.exists() and tensor_files.read_json(data_file) != data:
      raise ConfigError(f'the files of data.source={config.data.source!r} are not those that {workdir} was started '
                        f'with (their digest differs from {data_file}); restore them or use another --workdir')
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise ConfigError(f'--workdir={workdir} can\'t be made a folder ({e.strerror}); name another') from e
  tokenizer.save(workdir / 'tokenizer')
  replace_text(data_file, json.dumps(data, indent=1))
  replace_text(file, json.dumps(facts, indent=1))
  return workdir


def _abstract_like(variables, places):
  return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), variables, places,
                      is_leaf=axes.is_variable)


def _restore(checkpoints: store.Store, step: int, model, optimizer, mesh) -> tuple[TrainState, dict]:
  places = shardings(model, optimizer, mesh)
  shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), model.params, is_leaf=axes.is_variable)
  moments = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                         jax.eval_shape(optimizer.init, shapes), places.optimizer)
  skipped = jax.ShapeDtypeStruct((), np.int32, sharding=places.skipped)
  found = checkpoints.restore(
      step, dict(params=_abstract_like(model.params, places.params),
                 buffers=_abstract_like(model.buffers, places.buffers)), dict(optimizer=moments, skipped=skipped))
  return TrainState(**found['weights'], **found['optimizer']), found['run']


def _initialise_from(source: str, config: Config, state: TrainState, mesh) -> TrainState:
  """Weights from a Hugging Face directory or another workdir; the optimizer starts fresh."""
  # Before others take their place: two models may not fit.
  jax.tree.map(lambda x: x.delete(), (state.params, state.buffers))
  folder = pathlib.Path(source)
  if (folder / 'checkpoints').is_dir():
    other, params, buffers = store.read_run(folder)
    found = other.model
  else:
    found, params, buffers = hugging_face.load(folder, dtype='float32', place=mesh)
  theirs, ours = leaf_keys(found), leaf_keys(config.model)
  differ = ', '.join(f'model.{k} ({theirs[k]!r} there, {ours[k]!r} here)' for k in ours
                     if ours[k] != theirs[k] and k not in ('initializer_range', 'aux_loss_alpha'))
  same = jax.tree.structure(params) == jax.tree.structure(state.params) and all(
      jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, params, state.params)))
  if not same:
    raise ConfigError(f'--init_from={source} holds another network: {differ}; set these --config.model.* to its values')
  if differ:
    log.warning('--init_from=%s was made with another %s: its weights will not compute what they did', source, differ)

  def place(tree, like):
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), tree, like)

  return dataclasses.replace(state, params=place(params, state.params), buffers=place(buffers, state.buffers))


def _announce(config: Config, model, mesh, plan, first: int):
  device = mesh.devices.flat[0]
  log.info('%.1fM parameters; %d x %s; mesh %s; steps %d to %d, %d tokens in all',
               transformer.count_parameters(config.model) / 1e6, mesh.size, device.device_kind, dict(mesh.shape),
               first, config.training.steps, plan.tokens_before(config.training.steps))
  undivided = sorted({line for v in jax.tree.leaves(model.params, is_leaf=axes.is_variable)
                      for line in axes.undivided(v.axes, v.shape, mesh)})
  for line in undivided:
    log.warning('%s: such weights are laid out over fewer devices', line)


class _Signals:
  """SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT stops at once."""

  asked = ''

  def __enter__(self):
    self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _handle(self, number, frame):
    del frame
    if self.asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.asked = signal.Signals(number).name

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

"""A run's checkpoints: Orbax writes and commits them, asynchronously; we add a digest of every file.

    workdir/checkpoints/<step>/{weights,optimizer}/   arrays; weights can be read alone
    workdir/checkpoints/<step>/run/                   step, tokens, data position
    workdir/checkpoints/<step>/digests.json           sha256 of each file above

Orbax restores a file with a flipped bit without complaint, hence the digests: what was read is what was written.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import logging
import pathlib

import jax
import orbax.checkpoint as ocp

from mla_jax.checkpoint.tensor_files import HFError, read_json
from mla_jax.config import Config, ConfigError, from_dict
from mla_jax.files import replace_text
from mla_jax.model import transformer

log = logging.getLogger(__name__)

DIGESTS = 'digests.json'


class CheckpointError(ConfigError):
  """A checkpoint that can't be used or written; the message says which and what to do."""


def _first_line(error: Exception) -> str:
  """Orbax says kilobytes; what failed stands at the beginning of a line, why at its end."""
  line = next(iter(str(error).splitlines()), type(error).__name__)
  return line if len(line) <= 250 else f'{line[:100]} ... {line[-140:]}'


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
  """Of the checkpoints that were committed, whole or damaged."""
  return sorted(int(folder.name) for folder in (pathlib.Path(workdir) / 'checkpoints').glob('*')
                if folder.name.isdecimal())


def _digests(folder: pathlib.Path) -> dict[str, str]:
  def digest(file):
    with file.open('rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  return {str(f.relative_to(folder)): digest(f) for f in sorted(folder.rglob('*')) if f.is_file() and f.name != DIGESTS}


def damage(folder: pathlib.Path) -> str | None:
  """What differs from the digests, in a few words; None if nothing does."""
  file = folder / DIGESTS
  if not file.exists():
    # The run died between Orbax's commit and ours. The checkpoint is whole as far as Orbax can tell.
    log.warning('%s has no %s: its run was stopped before it was written; reading it unchecked', folder, DIGESTS)
    return None
  try:
    expected = read_json(file)
  except HFError as e:
    return str(e)
  found = _digests(folder)
  if missing := sorted(expected.keys() - found.keys()):
    return f'{missing[0]} is missing'
  if changed := sorted(name for name, digest in expected.items() if found[name] != digest):
    return f'{changed[0]} differs from its digest'
  return None


class Store:
  """Saves and restores {'weights': tree, 'optimizer': tree} and a small JSON dictionary."""

  def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
        self.folder, item_names=('weights', 'optimizer', 'run'),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True))
    self._sealer = concurrent.futures.ThreadPoolExecutor(1)
    self._sealing = None  # (step, future) of the save whose digests are not known to be written

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, weights, optimizer, run: dict):
    """Returns once the arrays are copied to the host; writing, committing and digesting go on behind. Raises
    CheckpointError where this save or the one before it can't be written."""
    self.wait()
    with self._writing(step):
      self._manager.save(step, args=ocp.args.Composite(
          weights=ocp.args.StandardSave(weights), optimizer=ocp.args.StandardSave(optimizer),
          run=ocp.args.JsonSave(run)))
    self._sealing = step, self._sealer.submit(self._write_digests, step)

  def _write_digests(self, step: int):
    self._manager.wait_until_finished()
    folder = self.folder / str(step)
    replace_text(folder / DIGESTS, json.dumps(_digests(folder), indent=1))

  @contextlib.contextmanager
  def _writing(self, step: int):
    try:
      yield
    except Exception as e:  # a full disk reaches us as OSError, ValueError or XlaRuntimeError
      last = f'step {self.steps()[-1]}' if self.steps() else 'the beginning'
      raise CheckpointError(f'checkpoint {step} in {self.folder} could not be written ({_first_line(e)}); free space '
                            f'there and run the same command: it goes on from {last}') from e

  def wait(self):
    """Until all that was saved is on disk with its digests. Raises CheckpointError where it can't be."""
    sealing, self._sealing = self._sealing, None
    if sealing is not None:
      step, digests = sealing
      with self._writing(step):
        self._manager.wait_until_finished()  # here too: Orbax raises an error of a save once in every thread
        digests.result()
    self._manager.wait_until_finished()

  def close(self):
    self.wait()
    self._manager.close()
    self._sealer.shutdown()

  def usable_step(self, *, allow_older: bool = False,
                  way_out: str = 'move {folder} away to read step {older}') -> int | None:
    """The newest step, checked against its digests. A damaged one raises, or with `allow_older` is moved to
    workdir/damaged_checkpoints and the one before it is taken. `way_out` is how the caller's user gets that one."""
    for step in reversed(self.steps()):
      what = damage(self.folder / str(step))
      if what is None:
        return step
      older = [s for s in self.steps() if s < step]
      if not allow_older or not older:
        advice = way_out.format(folder=self.folder / str(step), older=older[-1]) if older else (
            'there is no older one; restore the file from a copy, or start in another workdir')
        raise CheckpointError(f'checkpoint {step} in {self.folder} is damaged: {what}; {advice}')
      aside = self.folder.parent / 'damaged_checkpoints'
      aside.mkdir(exist_ok=True)
      names = (aside / (f'{step}.{i}' if i else str(step)) for i in itertools.count())
      free = next(name for name in names if not name.exists())
      (self.folder / str(step)).rename(free)
      log.warning('checkpoint %d is damaged (%s): moved to %s', step, what, free)
      self._manager.reload()
    return None

  def restore(self, step: int, weights, optimizer=None) -> dict:
    """{'weights', 'optimizer', 'run'} like the given abstract trees, laid out by their shardings; without `optimizer`
    the weights alone."""
    items = dict(weights=ocp.args.StandardRestore(weights))
    if optimizer is not None:
      items |= dict(optimizer=ocp.args.StandardRestore(optimizer), run=ocp.args.JsonRestore())
    try:
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
    except (ValueError, KeyError, OSError) as e:
      raise CheckpointError(f"checkpoint {step} in {self.folder} can't be read: {_first_line(e)}; "
                            'restore it from a copy, or move its folder away to use the one before') from e


def read_config(workdir: str | pathlib.Path) -> Config:
  """The resolved config that a run was started with."""
  file = pathlib.Path(workdir) / 'config.json'
  if not file.exists():
    raise CheckpointError(f'{file} does not exist, so {workdir} is no run; train one there or name another')
  try:
    return from_dict(Config, read_json(file))
  except HFError as e:
    raise CheckpointError(f'{e}; restore it from a copy') from e
  except ConfigError as e:
    raise CheckpointError(f'{file} is not what train.py wrote: {e}') from e


def read_run(workdir: str | pathlib.Path) -> tuple[Config, dict, dict]:
  """(config, params, buffers) of a run's newest checkpoint, on the default device."""
  config = read_config(workdir)
  if not saved_steps(workdir):
    raise CheckpointError(f'{workdir} holds no checkpoint; train longer, or name another run')
  store = Store(workdir)
  try:
    step = store.usable_step()
    _, params, buffers = transformer.abstract(config.model)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding),
                          dict(params=params, buffers=buffers), is_leaf=transformer.is_variable)
    weights = store.restore(step, target)['weights']
    return config, weights['params'], weights['buffers']
  finally:
    store.close()

"""A run's checkpoints: Orbax writes and commits them, asynchronously; we add a digest of every file.

    workdir/checkpoints/<step>/{weights,optimizer}/   arrays; weights can be read alone
    workdir/checkpoints/<step>/run/                   step, tokens, data position
    workdir/checkpoints/<step>/digests.json           sha256 of each file above

Orbax restores a file with a flipped bit without complaint, hence the digests: what was read is what was written.
"""

import hashlib
import json
import logging
import pathlib
import threading

import jax
import orbax.checkpoint as ocp

from mla_jax.config import Config, ConfigError, from_dict
from mla_jax.model import transformer

log = logging.getLogger(__name__)

DIGESTS = 'digests.json'


class CheckpointError(ConfigError):
  """A checkpoint that can't be used; the message says which and what to do."""


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
  expected, found = json.loads(file.read_text()), _digests(folder)
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
    self._seal = None

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, weights, optimizer, run: dict):
    """Returns once the arrays are copied to the host; writing, committing and digesting go on behind."""
    self.wait()
    self._manager.save(step, args=ocp.args.Composite(
        weights=ocp.args.StandardSave(weights), optimizer=ocp.args.StandardSave(optimizer), run=ocp.args.JsonSave(run)))
    self._seal = threading.Thread(target=self._write_digests, args=(step,))
    self._seal.start()

  def _write_digests(self, step: int):
    self._manager.wait_until_finished()
    folder = self.folder / str(step)
    partial = folder.parent / f'{DIGESTS}.{step}'
    partial.write_text(json.dumps(_digests(folder), indent=1))
    partial.rename(folder / DIGESTS)

  def wait(self):
    """Until all that was saved is on disk with its digests."""
    if self._seal is not None:
      self._seal.join()
      self._seal = None
    self._manager.wait_until_finished()

  def close(self):
    self.wait()
    self._manager.close()

  def usable_step(self, *, allow_older: bool) -> int | None:
    """The newest step, checked against its digests. A damaged one raises, or with `allow_older` is moved to
    workdir/damaged_checkpoints and the one before it is taken."""
    for step in reversed(self.steps()):
      what = damage(self.folder / str(step))
      if what is None:
        return step
      older = [s for s in self.steps() if s < step]
      if not allow_older or not older:
        way_out = f'pass --allow_older_checkpoint to continue from step {older[-1]}' if older else (
            'there is no older one; restore the file from a copy or start in another --workdir')
        raise CheckpointError(f'checkpoint {step} in {self.folder} is damaged: {what}; {way_out}')
      aside = self.folder.parent / 'damaged_checkpoints'
      aside.mkdir(exist_ok=True)
      (self.folder / str(step)).rename(aside / str(step))
      log.warning('checkpoint %d is damaged (%s): moved to %s', step, what, aside / str(step))
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
      raise CheckpointError(f"checkpoint {step} in {self.folder} can't be read: {str(e).splitlines()[0]}; "
                            'restore it from a copy, or move its folder away to use the one before') from e


def read_config(workdir: str | pathlib.Path) -> Config:
  """The resolved config that a run was started with."""
  file = pathlib.Path(workdir) / 'config.json'
  if not file.exists():
    raise CheckpointError(f'{file} does not exist, so {workdir} is no run; train one there or name another --workdir')
  try:
    return from_dict(Config, json.loads(file.read_text()))
  except json.JSONDecodeError as e:
    raise CheckpointError(f'{file} is no JSON ({e}); restore it from a copy') from e


def read_run(workdir: str | pathlib.Path) -> tuple[Config, dict, dict]:
  """(config, params, buffers) of a run's newest checkpoint, on the default device."""
  config = read_config(workdir)
  if not (pathlib.Path(workdir) / 'checkpoints').is_dir():
    raise CheckpointError(f'{workdir} holds no checkpoint; train longer, or name another --workdir')
  store = Store(workdir)
  try:
    step = store.usable_step(allow_older=False)
    if step is None:
      raise CheckpointError(f'{store.folder} holds no checkpoint; train longer, or name another --workdir')
    _, params, buffers = transformer.abstract(config.model)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding),
                          dict(params=params, buffers=buffers), is_leaf=transformer.is_variable)
    weights = store.restore(step, target)['weights']
    return config, weights['params'], weights['buffers']
  finally:
    store.close()

"""Checkpoints that can't be written, or whose own files are damaged: one clear line, and nothing lost."""

import resource

import numpy as np
import pytest

from mla_jax.checkpoint import store
from mla_jax.config import ConfigError
from mla_jax.language_model import LanguageModel


def save(saved, step):
  weights = np.random.default_rng(step).normal(size=(64, 128))  # no two alike: nothing to compress
  saved.save(step, dict(params=weights), dict(moments=weights), dict(step=step))
  saved.wait()


@pytest.fixture
def saved(tmp_path):
  """Checkpoints 1 and 2."""
  saved = store.Store(tmp_path / 'run')
  for step in (1, 2):
    save(saved, step)
  yield saved
  saved.close()


def test_a_checkpoint_that_can_not_be_written(saved):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(store.CheckpointError, match=r'checkpoint 3 in .* could not be written \(.+File too large.*'
                       r'\); free space there and run the same command: it goes on from step 2$') as error:
      save(saved, 3)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 700
  save(saved, 4)
  assert saved.steps() == [2, 4]
  assert saved.usable_step() == 4


def test_digests_that_can_not_be_written(saved, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(store, 'replace_text', full)
    with pytest.raises(store.CheckpointError, match=r'checkpoint 3 .*No space left on device.* goes on from step 3$'):
      save(saved, 3)
  saved.wait()  # said once


@pytest.mark.parametrize('content', [b'{"weights', b'[]', b'\xff', 100_000 * b'['])
def test_damaged_digests(saved, content):
  (saved.folder / '2' / store.DIGESTS).write_bytes(content)
  with pytest.raises(store.CheckpointError, match=rf'checkpoint 2 .*damaged: .*{store.DIGESTS} .*; '
                     rf'move {saved.folder}/2 away to read step 1$') as error:
    saved.usable_step()
  assert '\n' not in str(error.value)
  (saved.folder / '2').rename(saved.folder.parent / 'away')
  assert store.Store(saved.folder.parent).usable_step() == 1


def test_a_step_damaged_again_is_moved_beside_the_first(saved):
  for name in ('2', '2.1'):
    (saved.folder / '2' / store.DIGESTS).write_text('[]')
    assert saved.usable_step(allow_older=True) == 1
    assert (saved.folder.parent / 'damaged_checkpoints' / name / 'weights').is_dir()
    save(saved, 2)


@pytest.mark.parametrize('content', [b'5', b'[]', b'{"training": 1}', b'\xff', 100_000 * b'[', b'{'])
def test_damaged_configs(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  for read in (store.read_config, LanguageModel.load):
    with pytest.raises(ConfigError, match=r'config\.json') as error:
      read(tmp_path)
    assert '\n' not in str(error.value)

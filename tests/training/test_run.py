"""Whole runs: resume, preemption, damage, another mesh's settings, and what a workdir refuses."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from mla_jax.checkpoint import hugging_face, store
from mla_jax.config import ConfigError, OptimizerConfig
from mla_jax.training import hooks, loop
from tests.training import small


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for i in range(12):
    words = rng.choice(['latent', 'expert', 'token', 'draft', 'page'], 60)
    (folder / f'{i}.txt').write_text(f'{i}: ' + ' '.join(words) + '\n')
  return folder


@pytest.fixture(scope='module')
def config(text):
  config = small.config(batch_ramp_start=4, batch_ramp_increment=4, batch_ramp_tokens=96, gradient_accumulation=2)
  config.optimizer = OptimizerConfig(learning_rate=1e-2, warmup_tokens=200, cosine_until_tokens=800)
  config.data = dataclasses.replace(config.data, path=str(text), fim_rate=0.5)
  return config


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """A run of four steps that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  assert loop.train(config, str(workdir)) == 0
  return workdir


def weights(workdir):
  _, params, buffers = store.read_run(workdir)
  return jax.device_get((params, buffers))


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  timing = ('tokens_per_second', 'step_seconds', 'mfu')
  return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def copy(workdir, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(workdir, tmp_path / 'copy'))


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_metrics_have_the_contracts_fields(finished):
  lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  fields = {'step', 'tokens', 'loss', 'main_loss', 'mtp_loss', 'balance_loss', 'learning_rate', 'grad_norm',
            'tokens_per_second', 'step_seconds', 'mfu', 'max_violation', 'skipped_steps'}
  assert all(fields <= line.keys() for line in lines)
  assert {'held_out_loss', 'held_out_mtp_acceptance'} <= lines[-1].keys()
  # One stage of 4 sequences for about 96 tokens, then 8, of 24 tokens each.
  assert [line['tokens'] for line in lines] == [96, 288, 480, 672]
  assert lines[-1]['mfu'] is None
  assert (finished / 'config.json').exists()
  assert list((finished / 'tensorboard').iterdir())


@pytest.mark.parametrize('torn', [False, True])
def test_resumed_equals_uninterrupted_bit_for_bit(config, finished, tmp_path, torn):
  workdir = copy(finished, tmp_path)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  if torn:
    with (workdir / 'metrics.jsonl').open('a') as f:
      f.write('{"step": 5, "lo')
  assert loop.train(config, str(workdir)) == 0
  assert losses(workdir) == losses(finished)
  same(weights(workdir), weights(finished))


def test_a_signal_saves_and_the_same_command_continues(config, finished, tmp_path, monkeypatch):
  step = hooks.Recorder.step

  def interrupted(self, number, *rest):
    step(self, number, *rest)
    if number == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(hooks.Recorder, 'step', interrupted)
    assert loop.train(config, str(tmp_path / 'run')) == loop.PREEMPTED
  assert store.Store(tmp_path / 'run').steps()[-1] == 3
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert loop.train(config, str(tmp_path / 'run')) == 0
  assert losses(tmp_path / 'run') == losses(finished)
  same(weights(tmp_path / 'run'), weights(finished))


def flip_a_bit(folder):
  """In the middle of the largest file, where Orbax alone would not notice."""
  file = max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def truncate(folder):
  file = max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def remove(folder):
  max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size).unlink()


@pytest.mark.parametrize('damage', [flip_a_bit, truncate, remove])
def test_damaged_newest_checkpoint(config, finished, tmp_path, damage):
  workdir = copy(finished, tmp_path)
  damage(workdir / 'checkpoints' / '4')
  with pytest.raises(ConfigError, match=r'checkpoint 4 .* damaged.*--allow_older_checkpoint to continue from step 2'):
    loop.train(config, str(workdir))
  with pytest.raises(ConfigError, match=rf'damaged.*; move {workdir}/checkpoints/4 away to read step 2$'):
    store.read_run(workdir)
  if damage is flip_a_bit:
    assert loop.train(config, str(workdir), allow_older_checkpoint=True) == 0
    assert (workdir / 'damaged_checkpoints' / '4').is_dir()  # moved, not lost
    same(weights(workdir), weights(finished))


def test_only_checkpoint_damaged_has_no_way_back(config, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  shutil.rmtree(workdir / 'checkpoints' / '2')
  flip_a_bit(workdir / 'checkpoints' / '4')
  with pytest.raises(ConfigError, match='there is no older one'):
    loop.train(config, str(workdir), allow_older_checkpoint=True)
  assert (workdir / 'checkpoints' / '4').is_dir()


@pytest.mark.parametrize(('section', 'key', 'value'), [
    ('model', 'routed_scaling_factor', 3.0), ('data', 'fim_rate', 0.25), ('training', 'batch_size', 12),
    ('training', 'sequence_length', 20)])
def test_what_a_resumed_run_cannot_change(config, finished, section, key, value):
  changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
  before = (finished / 'config.json').read_bytes()
  with pytest.raises(ConfigError, match=rf'started with another {section}.{key} \(was '):
    loop.train(changed, str(finished))
  assert (finished / 'config.json').read_bytes() == before


def test_steps_may_grow_and_the_change_is_logged(config, finished, tmp_path, caplog):
  workdir = copy(finished, tmp_path)
  longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=5))
  files = [workdir / name for name in ('tokenizer/tokenizer.json', 'data.json', 'config.json')]
  before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
  with caplog.at_level('INFO', logger='mla_jax'):
    assert loop.train(longer, str(workdir)) == 0
  after = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
  assert after[:2] == before[:2]  # what identifies the run is not written again
  assert after[2][0] != before[2][0]  # and what changed is written aside, then renamed
  assert 'another training.steps: was 4, now 5' in caplog.text
  assert losses(workdir)[-1]['step'] == 5


def test_other_data_are_refused(config, finished, tmp_path):
  workdir, folder = copy(finished, tmp_path), pathlib.Path(config.data.path)
  victim = folder / '3.txt'
  kept = victim.read_text()
  try:
    victim.write_text(kept + 'more')
    with pytest.raises(ConfigError, match='digest differs'):
      loop.train(config, str(workdir))
  finally:
    victim.write_text(kept)


def test_init_from_another_run(config, finished, tmp_path):
  one = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1),
                            optimizer=OptimizerConfig(learning_rate=1e-12))
  wider = dataclasses.replace(one, model=dataclasses.replace(one.model, intermediate_size=64))
  with pytest.raises(ConfigError, match=r'another network: model.intermediate_size \(48 there, 64 here\)'):
    loop.train(wider, str(tmp_path / 'tuned'), init_from=str(finished))
  # The same workdir: one that has no checkpoint binds nobody.
  assert loop.train(one, str(tmp_path / 'tuned'), init_from=str(finished)) == 0
  for a, b in zip(jax.tree.leaves(weights(tmp_path / 'tuned')[0]), jax.tree.leaves(weights(finished)[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-9)


def test_a_config_of_another_program_is_not_overwritten(config, tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "deepseek_v3"}')
  with pytest.raises(ConfigError, match='model_type is no setting'):
    loop.train(config, str(tmp_path))
  assert (tmp_path / 'config.json').read_text() == '{"model_type": "deepseek_v3"}'


def test_a_workdir_that_is_a_file(config, tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ConfigError, match=r"file can't be made a folder \(File exists\); name another"):
    loop.train(config, str(tmp_path / 'file'))
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.long
def test_init_from_a_hugging_face_directory(config, finished, tmp_path, caplog):
  params, buffers = weights(finished)
  hugging_face.save(tmp_path / 'hf', config.model, params, buffers, file_bytes=20_000)
  one = dataclasses.replace(
      config, training=dataclasses.replace(config.training, steps=1), optimizer=OptimizerConfig(learning_rate=1e-12),
      model=dataclasses.replace(config.model, routed_scaling_factor=1.5))
  with caplog.at_level(logging.WARNING):
    assert loop.train(one, str(tmp_path / 'tuned'), init_from=str(tmp_path / 'hf')) == 0
  for a, b in zip(jax.tree.leaves(weights(tmp_path / 'tuned')[0]), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-9)
  assert 'made with another model.routed_scaling_factor (1.0 there, 1.5 here)' in caplog.text


def test_a_dense_model_without_mtp_trains_and_is_read_back(config, tmp_path):
  model = dataclasses.replace(config.model, n_routed_experts=0, num_nextn_predict_layers=0, attention='mqa')
  dense = dataclasses.replace(config, model=model, training=dataclasses.replace(
      config.training, steps=1, gradient_accumulation=1, batch_ramp_start=0))
  assert loop.train(dense, str(tmp_path / 'run')) == 0
  assert weights(tmp_path / 'run')[1] == {}
  assert losses(tmp_path / 'run')[0]['max_violation'] is None


@pytest.mark.parametrize(('section', 'changes', 'message'), [
    ('data', dict(path='/nonexistent/folder'), '/nonexistent/folder'),
    ('training', dict(sequence_length=400), 'above the model.*max_position_embeddings=128'),
    ('model', dict(vocab_size=100), 'the tokenizer has 262 tokens, above model.vocab_size=100'),
    ('data', dict(tokenizer='nonesuch'), 'nonesuch'),
    ('mesh', dict(fsdp=3), 'mesh .* 3'),
    ('mesh', dict(tensor=2), 'mesh.tensor=2 is not supported yet'),
])
def test_bad_settings_leave_nothing_behind(config, tmp_path, section, changes, message):
  bad = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
  with pytest.raises(ConfigError, match=message) as error:
    loop.train(bad, str(tmp_path / 'run'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()

"""A config for train.py in tests; --config.data.path names the text."""

from mla_jax.config import Config
from tests.training import small


def get_config() -> Config:
  return small.config(steps=30, checkpoint_interval=5, eval_interval=30)

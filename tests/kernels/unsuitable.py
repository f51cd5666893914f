import contextlib

import pytest


@contextlib.contextmanager
def skipped_if_unsuitable(implementation):
  """A chip's kernels serve some operands only and say so: the test is skipped with what they say."""
  try:
    yield
  except NotImplementedError as error:
    if implementation not in ('gpu', 'tpu'):
      raise
    pytest.skip(str(error))

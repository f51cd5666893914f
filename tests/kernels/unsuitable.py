import contextlib

import pytest


@contextlib.contextmanager
def skipped_if_unsuitable(implementation, case=''):
  """A chip's kernels serve some operands only and say so: the test is skipped with what they say. Not where the case's
  name says that it is for them."""
  try:
    yield
  except NotImplementedError as error:
    if implementation not in ('gpu', 'tpu') or (implementation == 'gpu' and 'of a GPU' in str(case)):
      raise
    pytest.skip(str(error))

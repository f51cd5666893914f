"""The Hopper kernel of latent decode, interpreted on the CPU. On a GPU test_mla_decode.py runs it."""

import jax
import numpy as np
import pytest

from pallas_kernels import mla_decode, mosaic_gpu, testing
from pallas_kernels.mla_decode import gpu, schedule
from tests.kernels import hopper_interpreter

pytestmark = [pytest.mark.long, pytest.mark.skipif(jax.__version_info__ < (0, 11, 2),
                                                   reason='Hopper kernels need jax 0.11.2')]
CASES = [case for case in testing.CASES['mla_decode'] if 'of a GPU' in case.name]


def interpreted(q_BTNJ, pages_PSJ, table_BP, lengths_B, scale, value_width, return_lse, implementation='gpu'):
  """`mla_decode`, but 'gpu' needs no GPU."""
  operands = q_BTNJ, pages_PSJ, table_BP, lengths_B
  if implementation == 'gpu':
    assert gpu.unsuitable(q_BTNJ, pages_PSJ, value_width=value_width) is None
    return gpu.mla_decode(*operands, None, scale, value_width)
  return mla_decode(*operands, scale=scale, value_width=value_width, return_lse=return_lse,
                    implementation=implementation)


@pytest.fixture(autouse=True)
def kernel_of_its_own(monkeypatch):
  """Traced anew, so that no test runs what another one spoilt."""
  monkeypatch.setattr(gpu, '_kernel', gpu._kernel.__wrapped__)


@pytest.fixture
def whole_requests(monkeypatch):
  """No request is cut: programs that share one wait for each other, and here they run one after the other."""
  monkeypatch.setattr(schedule, 'CUT', 1 << 20)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_matches_reference(case, monkeypatch, whole_requests):
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    testing.check(interpreted, 'gpu', case)
    assert not races_found()


def run(length):
  """One request, whose result is not looked at."""
  case = testing.mla_decode_case('small', (length,), t=1, max_pages=16, page=64, heads=16, c=128, r=64,
                                 dtype='bfloat16')
  decode = jax.jit(lambda arrays: interpreted(**arrays, **case.options))
  jax.block_until_ready(decode(case.arrays(np.random.default_rng(0))))


def test_interpreter_finds_a_planted_race(monkeypatch, whole_requests):
  monkeypatch.setattr(mosaic_gpu.plgpu, 'commit_smem', lambda: None)  # results leave before they are written
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    run(200)
    assert races_found()


def test_interpreter_refuses_shared_requests(monkeypatch):
  monkeypatch.setattr(schedule, 'CUT', -100)
  with hopper_interpreter.interpreter(monkeypatch), pytest.raises(Exception, match='this one waits for another'):
    run(1000)

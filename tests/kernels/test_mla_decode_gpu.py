"""The Hopper kernel of latent decode, interpreted on the CPU. On a GPU test_mla_decode.py runs it."""

import jax
import jax.numpy as jnp
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


@pytest.mark.usefixtures('whole_requests')
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_matches_reference(case, monkeypatch):
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    testing.check(interpreted, 'gpu', case)
    assert not races_found()


@pytest.mark.usefixtures('whole_requests')
def test_requests_of_a_vmap_run_one_after_the_other(monkeypatch):
  case = testing.mla_decode_case('vmapped', (70,), t=1, max_pages=2, page=64, heads=16, **testing.GPU)
  arrays = [case.arrays(np.random.default_rng(seed)) for seed in range(2)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *arrays)
  with hopper_interpreter.interpreter(monkeypatch):
    o_XBTNC, _ = jax.block_until_ready(jax.jit(jax.vmap(lambda x: interpreted(**x, **case.options)))(stacked))
  for actual, x in zip(o_XBTNC, arrays, strict=True):
    expected, _ = mla_decode(**x, **case.options, implementation='reference')
    testing.assert_close('vmapped', actual, expected, case.tolerance)


def test_a_plan_for_other_tokens_is_refused():
  """It would launch more programs than the chip holds, and they wait for each other."""
  case = testing.mla_decode_case('planned', (70, 3), t=4, max_pages=2, page=64, heads=128, **testing.GPU)
  arrays = case.arrays(np.random.default_rng(0))
  operands = [jnp.asarray(x) for x in arrays.values()]
  for lengths, message in ((arrays['lengths_B'], 'of 66 parts for 2 sequences, and this call takes at most 16 for 2'),
                           (arrays['lengths_B'][:1], 'for 1 sequences')):
    plan = gpu.make_plan(jnp.asarray(lengths), rows=128)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(lambda plan=plan: gpu.mla_decode(*operands, plan, 0.1, 128))


def run(length):
  """One request, whose result is not looked at."""
  case = testing.mla_decode_case('small', (length,), t=1, max_pages=16, page=64, heads=16, **testing.GPU)
  decode = jax.jit(lambda arrays: interpreted(**arrays, **case.options))
  jax.block_until_ready(decode(case.arrays(np.random.default_rng(0))))


@pytest.mark.usefixtures('whole_requests')
def test_interpreter_finds_a_planted_race(monkeypatch):
  monkeypatch.setattr(mosaic_gpu.plgpu, 'commit_smem', lambda: None)  # results leave before they are written
  with hopper_interpreter.interpreter(monkeypatch) as races_found:
    run(200)
    assert races_found()


def test_interpreter_refuses_shared_requests(monkeypatch):
  monkeypatch.setattr(schedule, 'CUT', -100)
  with hopper_interpreter.interpreter(monkeypatch), pytest.raises(Exception, match='this one waits for another'):
    run(1000)

"""The plan of the split decode kernel: every step of every request is done once, by the parts the plan names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import make_plan
from pallas_kernels.mla_decode import schedule

make = functools.partial(jax.jit, static_argnums=1)(schedule.make)


def pieces(lengths, parts):
  """[(request, first step, end, part)] as the kernel walks them, and the plan's parts of each request."""
  begin, parts_B2 = (np.asarray(x) for x in make(jnp.asarray(lengths, jnp.int32), parts))
  steps = -(-np.asarray(lengths) // schedule.STEP_KEYS)
  out = []
  for part in range(parts):
    (first, first_step), (last, last_step) = begin[part], begin[part + 1]
    for request in range(first, last + (last_step > 0)):
      out.append((request, first_step if request == first else 0, last_step if request == last else steps[request],
                  part))
  return out, parts_B2


def check(lengths, parts):
  walked, parts_B2 = pieces(lengths, parts)
  for request, length in enumerate(lengths):
    mine = [p for p in walked if p[0] == request]
    assert [step for _, lo, hi, _ in mine for step in range(lo, hi)] == list(range(-(-length // schedule.STEP_KEYS)))
    # A request without keys has one empty piece: someone must write its zeros.
    assert [part for *_, part in mine] == list(range(parts_B2[request, 0], parts_B2[request, 1] + 1))
  return walked


# A batch size each, so that few programs are compiled.
@pytest.mark.parametrize('batch', [1, 2, 7])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_step_once(batch, data):
  longest = data.draw(st.sampled_from([1, 300, 20_000]))
  lengths = data.draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
  check(lengths, data.draw(st.sampled_from([1, 5, 66])))


@pytest.mark.parametrize(('lengths', 'parts', 'most'), [
  ([4096] * 128, 66, 64),  # two whole requests a part keep 64 of 66 busy: nothing is cut
  ([4096] * 128, 132, 32),
  ([32768], 66, 5),  # 256 steps over 66 parts
  ([8192], 132, 2),
  ([65536] + [128] * 65, 66, 13),  # one long request among short ones is cut
])
def test_work_is_balanced(lengths, parts, most):
  work = np.zeros(parts, int)
  for _, lo, hi, part in check(lengths, parts):
    work[part] += hi - lo
  assert work.max() <= most


def test_no_plan_where_nothing_is_split():
  with jax.default_device(jax.devices('cpu')[0]):
    assert make_plan(jnp.array([5, 7]), tokens=1, heads=4) is None

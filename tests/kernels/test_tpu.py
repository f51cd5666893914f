"""The TPU kernels in Pallas' simulation of a TPU's memories: uninitialised memory is NaN, copies land at the last
moment, and each access is checked for races."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import flash_attention, grouped_matmul, grouped_matmul_fp8, mla_decode, mosaic_tpu, testing

OPS = {'mla_decode': mla_decode, 'flash_attention': flash_attention, 'grouped_matmul': grouped_matmul,
       'grouped_matmul_fp8': grouped_matmul_fp8}


@pytest.fixture
def simulated(capsys):
  """Runs the test inside the interpreter, which prints the races it finds."""
  with mosaic_tpu.interpreter():
    yield
  assert 'RACE DETECTED' not in capsys.readouterr().out


def test_the_interpreter_is_asked_for():
  for op in OPS.values():
    assert 'serves tpu' in op.unavailable('cpu')['tpu']
    assert op.implementations('tpu')[0] == 'tpu'
    with mosaic_tpu.interpreter():
      assert op.implementations('cpu')[0] == 'tpu'
      assert 'tpu' not in op.implementations('gpu')


def test_a_race_is_found(capsys):
  def kernel(x, y, buffer, arrived):
    copy = pltpu.make_async_copy(x, buffer, arrived)
    copy.start()
    y[...] = buffer[...]  # before it has arrived
    copy.wait()

  any_memory = pl.BlockSpec(memory_space=pl.ANY)
  with mosaic_tpu.interpreter():
    mosaic_tpu.call(kernel, [jnp.ones((8, 128))], grid=(1,), in_specs=[any_memory], dimensions=('arbitrary',),
                    out_shape=[((8, 128), jnp.float32)], out_specs=[pl.BlockSpec((8, 128), lambda _: (0, 0))],
                    scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA], name='race')
  assert 'RACE DETECTED' in capsys.readouterr().out


def test_kernels_are_not_divided_by_the_compiler(caplog):
  caplog.set_level(logging.INFO, 'pallas_kernels')
  q_BTNH, v_BTNV = jnp.ones((4, 8, 2, 8)), jnp.ones((4, 8, 2, 4))

  def shapes(implementation):
    return jax.eval_shape(lambda: flash_attention(q_BTNH, q_BTNH, v_BTNV, scale=1, implementation=implementation))

  device = jax.sharding.AbstractDevice(device_kind='TPU v5', num_cores=2, platform='tpu')
  with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ('data',), (AxisType.Auto,), abstract_device=device)):
    assert mosaic_tpu.chip().cores == 2
    with pytest.raises(NotImplementedError, match=r'over the mesh \(data=4\): call the op inside jax.shard_map'):
      shapes('tpu')
    assert shapes(None).shape == v_BTNV.shape
  assert 'xla on tpu (' in caplog.text
  with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ('data',), (AxisType.Manual,), abstract_device=device)):
    assert shapes('tpu').shape == v_BTNV.shape


def test_a_contraction_beyond_vmem_is_refused():
  operands = [jax.ShapeDtypeStruct(*x) for x in (((8, 200_000), jnp.bfloat16), ((2, 200_000, 128), jnp.bfloat16),
                                                 ((2,), jnp.int32))]
  with mosaic_tpu.interpreter(), pytest.raises(NotImplementedError, match='a contraction of 200000 does not fit'):
    jax.eval_shape(lambda *x: grouped_matmul(*x, implementation='tpu'), *operands)


def simulations():
  for op in OPS:
    for case in testing.CASES[op]:
      # From ten seconds on, simulated; what they are for are other chips, or larger copies of what the others cover.
      slow = ('GPU' in case.name or 'one tile' in case.name or (op == 'flash_attention' and 'wide' in case.name)
              or (op == 'grouped_matmul_fp8' and case.name != 'rows by an order'))
      yield pytest.param(op, case, id=f'{op}-{case}', marks=[pytest.mark.long] if slow else [])


@pytest.mark.parametrize(('op', 'case'), list(simulations()))
@pytest.mark.usefixtures('simulated')
def test_matches_reference(op, case):
  testing.check(OPS[op], 'tpu', case)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 48), min_size=5, max_size=5))
def test_any_group_sizes(cuts):
  sizes = tuple(np.diff([0, *sorted(cuts)]).tolist())
  with mosaic_tpu.interpreter():
    testing.check(grouped_matmul, 'tpu', testing.grouped_matmul_case(str(sizes), sizes))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 272), min_size=4, max_size=4))
def test_any_lengths(lengths):
  with mosaic_tpu.interpreter():
    testing.check(mla_decode, 'tpu', testing.mla_decode_case(str(lengths), lengths, t=3, max_pages=17))


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(t=st.integers(1, 100), s=st.integers(1, 100), v=st.integers(1, 40), causal=st.booleans(), packed=st.booleans())
def test_attention_of_any_shape(t, s, v, causal, packed):
  documents = (max(t, s) // 2, max(t, s) - max(t, s) // 2) if packed else None
  case = testing.flash_attention_case(f'{t} {s} {v} {causal} {packed}', t, s, causal, documents, heads=1, v=v)
  with mosaic_tpu.interpreter():
    testing.check(flash_attention, 'tpu', case)


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(m=st.integers(1, 60), k=st.integers(1, 50), n=st.integers(1, 50), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_matmul_of_any_shape(m, k, n, cuts):
  sizes = tuple(np.diff([0, *sorted(min(cut, m) for cut in cuts), m]).tolist())
  with mosaic_tpu.interpreter():
    testing.check(grouped_matmul, 'tpu', testing.grouped_matmul_case(f'{m} {k} {n} {sizes}', sizes, m, k, n))


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 100), min_size=1, max_size=4), t=st.integers(1, 8), heads=st.integers(1, 20),
       page=st.sampled_from([8, 16, 64, 128]))
def test_decode_of_any_shape(lengths, t, heads, page):
  case = testing.mla_decode_case(f'{lengths} {t} {heads} {page}', lengths, t, -(-100 // page), page, heads)
  with mosaic_tpu.interpreter():
    testing.check(mla_decode, 'tpu', case)


@pytest.mark.usefixtures('simulated')
def test_other_groups_and_the_tail_do_not_leak():
  # As for the other implementations in test_grouped_matmul.py, in tiles that hold several groups and the tail.
  rng = np.random.default_rng(1)
  lhs_MK, rhs_GKN = rng.normal(size=(20, 8)).astype('f'), rng.normal(size=(3, 8, 12)).astype('f')
  dy_MN, sizes = np.ones((20, 12), np.float32), jnp.array([9, 0, 5])

  @jax.jit
  def run(lhs_MK, rhs_GKN, dy_MN):
    y_MN, transpose = jax.vjp(lambda *x: grouped_matmul(*x, sizes, implementation='tpu'), lhs_MK, rhs_GKN)
    return y_MN, *transpose(dy_MN)

  expected = run(lhs_MK, rhs_GKN, dy_MN)
  lhs_MK[14:], rhs_GKN[1], dy_MN[14:] = np.nan, np.nan, np.nan
  for x, y in zip(run(lhs_MK, rhs_GKN, dy_MN), expected, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('dtypes', [('float8_e4m3fn', 'float8_e5m2'), ('float8_e5m2', 'float8_e4m3fn')])
def test_a_chip_that_multiplies_fp8_takes_two_formats(dtypes, monkeypatch):
  change_chip(monkeypatch, multiplies_fp8=True)
  rng = np.random.default_rng(0)
  shapes = (12, 128), (2, 128, 16)
  lhs_MK, rhs_GKN = (jnp.asarray(rng.normal(size=s), dtype) for s, dtype in zip(shapes, dtypes, strict=True))
  operands = lhs_MK, rhs_GKN, jnp.array([7, 5]), jnp.ones((12, 1)), jnp.ones((2, 1, 1))
  with mosaic_tpu.interpreter():
    actual, expected = (grouped_matmul(*operands, out_dtype='float32', implementation=name)
                        for name in ('tpu', 'reference'))
  testing.assert_close('product', actual, expected, 1e-6)


def test_two_cores_share_a_batch(monkeypatch, capsys):
  # A v5p device is two cores. Five sequences: one core has an item of its own more than the other.
  change_chip(monkeypatch, cores=2)
  case = testing.mla_decode_case('two cores', (3, 40, 0, 0, 100), t=2, max_pages=7)
  with mosaic_tpu.interpreter(num_cores_or_threads=2):
    testing.check(on_two_cores, 'tpu', case)
  assert 'RACE DETECTED' not in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures('simulated')
def test_gradients_of_more_queries_than_fit_at_once(monkeypatch):
  change_chip(monkeypatch, attention_queries=64)
  testing.check(in_parts, 'tpu', testing.flash_attention_case('parts', t=80, s=110, documents=(60, 50), heads=1))


def change_chip(monkeypatch, **values):
  monkeypatch.setitem(mosaic_tpu.CHIPS, 'cpu', dataclasses.replace(mosaic_tpu.CHIPS['cpu'], **values))


# Functions of their own: `testing` keeps one compiled program an op.


def on_two_cores(**arguments):
  return mla_decode(**arguments)


def in_parts(**arguments):
  return flash_attention(**arguments)

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, flash_attention, testing
from pallas_kernels.flash_attention import xla

# The kernels for Hopper take some operands only: test_flash_attention_gpu.py.
ANY = [name for name in flash_attention.implementations() if name != 'gpu']
FASTER = [name for name in ANY if name != 'reference']
IN_PAIRS = 'xla, in pairs'  # its path for long sequences, which short ones on CPUs would not take


@pytest.fixture
def implementation(request, monkeypatch):
  if request.param == IN_PAIRS:
    monkeypatch.setitem(xla.BANDED, dispatch.platform(), 0)
    jax.clear_caches()  # of programs in bands, and then of those in pairs
  yield request.param.partition(',')[0]
  if request.param == IN_PAIRS:
    jax.clear_caches()


def oracle(q_BTNH, k_BSNH, v_BSNV, scale, causal, q_segments=None, kv_segments=None):
  (b, t, n, _), s = q_BTNH.shape, k_BSNH.shape[1]
  o_BTNV, lse_BTN = np.zeros((b, t, n, v_BSNV.shape[3])), np.full((b, t, n), -np.inf)
  for i, j, h in np.ndindex(b, t, n):
    seen = [key for key in range(s) if (not causal or key <= j + s - t)
            and (q_segments is None or q_segments[i, j] == kv_segments[i, key])]
    if seen:
      weights = np.exp(scale * (k_BSNH[i, seen, h].astype(np.float64) @ q_BTNH[i, j, h]))
      o_BTNV[i, j, h] = weights @ v_BSNV[i, seen, h] / weights.sum()
      lse_BTN[i, j, h] = np.log(weights.sum())
  return o_BTNV, lse_BTN


def operands(b=2, t=5, s=5, n=2, h=4, v=3):
  rng = np.random.default_rng(1)
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((b, t, n, h), (b, s, n, h), (b, s, n, v)))


@pytest.mark.parametrize(('t', 's'), [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('packed', [True, False])
def test_reference_is_query_by_query(t, s, causal, packed):
  qkv = operands(t=t, s=s)
  ids = np.array([[0, 0, 1, 1, 2], [3, 3, 3, 1, 1]], np.int32)
  segments = (ids[:, :t], ids[:, -s:]) if packed else (None, None)
  out = flash_attention(*qkv, scale=0.7, causal=causal, q_segments=segments[0], kv_segments=segments[1],
                        return_lse=True, implementation='reference')
  for actual, expected in zip(out, oracle(*qkv, 0.7, causal, *segments), strict=True):
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('implementation', [*FASTER, IN_PAIRS], indirect=True)
@pytest.mark.parametrize('case', testing.CASES['flash_attention'], ids=str)
def test_matches_reference(implementation, case):
  testing.check(flash_attention, implementation, case)


@pytest.mark.parametrize('implementation', [*ANY, IN_PAIRS], indirect=True)
def test_query_without_keys_has_zero_gradients(implementation):
  q_BTNH, k_BSNH, v_BSNV = operands(t=4, s=2)  # aligned to the end: queries 0 and 1 come before the first key

  def loss(q_BTNH, k_BSNH, v_BSNV):
    o_BTNV, lse_BTN = flash_attention(q_BTNH, k_BSNH, v_BSNV, scale=0.7, return_lse=True, implementation=implementation)
    return (o_BTNV ** 2).sum() + jnp.exp(lse_BTN).sum()

  dq_BTNH, dk_BSNH, dv_BSNV = jax.jit(jax.grad(loss, (0, 1, 2)))(q_BTNH, k_BSNH, v_BSNV)
  assert not dq_BTNH[:, :2].any()
  assert dq_BTNH[:, 2:].any()
  assert np.isfinite(dk_BSNH).all()
  assert np.isfinite(dv_BSNV).all()


@pytest.mark.parametrize('implementation', [IN_PAIRS], indirect=True)
@pytest.mark.parametrize('t', [75, 600])
def test_causal_skips_what_no_query_sees(implementation, t):
  qkv = [jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)] * 3

  def pairs(causal):
    text = jax.jit(lambda *qkv: flash_attention(*qkv, scale=1.0, causal=causal, implementation=implementation)).lower(
      *qkv)
    return int(re.search(r'tensor<(\d+)xi32>', text.as_text()).group(1))

  blocks = -(-t // xla.BLOCK[dispatch.platform()])
  assert (pairs(causal=False), pairs(causal=True)) == (blocks ** 2, blocks * (blocks + 1) // 2)


@pytest.mark.parametrize(('t', 's', 'bands'), [
  (192, 192, [(64, 64), (64, 128), (64, 192)]), (128, 192, [(64, 128), (64, 192)]), (75, 75, [(38, 38), (37, 75)]),
  (192, 128, [(64, 1), (64, 64), (64, 128)]),  # a band that sees no key computes one: there is no maximum of none
])
def test_bands_skip_what_no_query_sees(t, s, bands, monkeypatch):
  monkeypatch.setitem(xla.BLOCK, dispatch.platform(), 64)
  monkeypatch.setitem(xla.BANDED, dispatch.platform(), 10)
  q, k = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for length in (t, s))
  text = jax.jit(lambda q, k: flash_attention(q, k, k, scale=1.0, implementation='xla')).lower(q, k).as_text()
  scores = re.findall(r'contracting_dims = \[3\] x \[3\],.* -> tensor<1x1x(\d+)x(\d+)xf32>', text)
  assert [tuple(map(int, shape)) for shape in scores] == bands


def test_the_scores_are_never_stored_whole():
  qkv = [jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)] * 3
  gradient = jax.jit(jax.grad(lambda *qkv: flash_attention(*qkv, scale=1.0, implementation='xla').sum(), (0, 1, 2)))
  share = 1 / 8 if jax.default_backend() == 'cpu' else 1 / 4
  assert gradient.lower(*qkv).compile().memory_analysis().temp_size_in_bytes < 4 * 2 * 2048 * 2048 * share


@pytest.mark.parametrize(('change', 'message'), [
  ({'k_BSNH': np.ones((2, 5, 1, 4), np.float32)}, 'repeat shared key and value heads first'),
  ({'v_BSNV': np.ones((2, 4, 2, 3), np.float32)}, r'v \(2, 4, 2, 3\) must be'),
  ({'k_BSNH': np.ones((5, 2, 4), np.float32)}, r'k \(5, 2, 4\), v .* must be'),
  ({'v_BSNV': np.ones((2, 5, 2, 3), np.float16)}, 'float32, float32, float16; cast to one dtype'),
  ({'k_BSNH': np.ones((2, 0, 2, 4), np.float32), 'v_BSNV': np.ones((2, 0, 2, 3), np.float32)},
   r'k \[2, 0, 2, 4\] has an empty axis'),
  ({'scale': 'traced'}, 'flash_attention: scale is traced and must be known when tracing'),
  ({'q_segments': np.zeros((2, 5), np.int32)}, 'go together'),
  ({'q_segments': np.zeros((2, 5), np.int32), 'kv_segments': np.zeros((2, 4), np.int32)},
   r'kv_segments is int32\[2, 4\] and must be integers \[2, 5\]'),
])
def test_bad_operands(change, message):
  q_BTNH, k_BSNH, v_BSNV = operands()
  arguments = {'q_BTNH': q_BTNH, 'k_BSNH': k_BSNH, 'v_BSNV': v_BSNV, **change}
  traced = arguments.pop('scale', None)
  run = functools.partial(flash_attention, **arguments)
  with pytest.raises(ValueError, match=message):
    (jax.jit(lambda scale: run(scale=scale)) if traced else lambda scale: run(scale=scale))(1.0)

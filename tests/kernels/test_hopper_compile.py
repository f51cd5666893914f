"""The Hopper kernels compiled ahead of time for an H200 that is not there, at the models' sizes."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import flash_attention

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None,
                     reason='jax-cuda13-plugin is not installed here; benchmarks/hopper_compile.py says what it takes'),
]
BF16, I32 = jnp.bfloat16, jnp.int32


def attention(segmented, gradients, causal=True):
  def forward(q, k, v, *ids):
    ids = dict(zip(('q_segments', 'kv_segments'), ids, strict=True)) if segmented else {}
    return flash_attention(q, k, v, scale=0.1, causal=causal, implementation='gpu', return_lse=True, **ids)

  def loss(*operands):
    o, lse = forward(*operands)
    return o.astype(jnp.float32).sum() + lse.sum()

  return jax.grad(loss, (0, 1, 2)) if gradients else forward


def operands(t, s, heads, width, value_width, segmented):
  ids = (((2, t), I32), ((2, s), I32)) if segmented else ()
  return ((2, t, heads, width), BF16), ((2, s, heads, width), BF16), ((2, s, heads, value_width), BF16), *ids


FORWARD, DQ, DKV = 'flash_attention_forward', 'flash_attention_dq', 'flash_attention_dkv'
# Spilled bytes allowed; of dkv's, none lie in the loop over blocks that need no mask.
CASES = {
  'V3': ((4096, 4096, 128, 192, 128, False), True, {FORWARD: 0, DQ: 0, DKV: 184}),
  'V2-Lite, packed documents': ((4096, 4096, 16, 192, 128, True), True, {FORWARD: 32, DQ: 0, DKV: 224}),
  'chunked prefill, odd lengths': ((1000, 4093, 16, 192, 128, False), True, {FORWARD: 0, DQ: 0, DKV: 184}),
  'equal widths': ((2048, 2048, 32, 128, 128, False), True, {FORWARD: 0, DQ: 0, DKV: 0}),
  'narrow, all keys': ((77, 300, 4, 64, 64, False), False, {FORWARD: 0, DQ: 0, DKV: 0}),
}


@pytest.mark.parametrize('name', CASES)
def test_attention_compiles(name, capfd):
  from benchmarks import hopper_compile
  shapes, causal, allowed = CASES[name]
  hopper_compile.compile_for_hopper(attention(shapes[-1], True, causal), *operands(*shapes))
  report = ''.join(capfd.readouterr())
  spills = hopper_compile.spills(report)
  with capfd.disabled():
    print(f'\n{name}: spilled bytes {spills}')
  assert spills.keys() == allowed.keys()
  assert all(spills[kernel] <= allowed[kernel] for kernel in allowed), (spills, allowed)
  assert 'serialized' not in report  # ptxas: products that run one after the other, whatever the kernel says

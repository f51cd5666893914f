"""One list of cases an op, run by every implementation against the reference: values, and gradients where there are.

  for case in testing.CASES['grouped_matmul']:
    testing.check(grouped_matmul, 'xla', case)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# Largest error allowed, as a share of the largest value. FP8 operands are exact in both; their output is bfloat16.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}


@dataclass(frozen=True)
class Case:
  """arrays(rng) -> keyword arguments that are arrays; options: the others; gradients: arguments differentiated."""

  name: str
  arrays: Callable[[np.random.Generator], dict]
  options: dict = field(default_factory=dict)
  gradients: tuple[str, ...] = ()
  tolerance: float = TOLERANCE['float32']

  def __str__(self):
    return self.name


def check(op, implementation, case, seed=0):
  """Raises AssertionError where `implementation` of `op` differs from the reference on `case`.

  Outputs and gradients for random cotangents are compared: shape, dtype, places of infinities, values.
  """
  rng = np.random.default_rng(seed)
  arrays = {name: None if x is None else jnp.asarray(x) for name, x in case.arrays(rng).items()}
  options = tuple(sorted(case.options.items()))
  reference = _outputs(op, 'reference', options, ())
  cotangents = jax.tree.map(lambda x: _normal(rng, x.shape, x.dtype.name), jax.eval_shape(reference, arrays))
  with jax.default_matmul_precision('highest'):
    # Waited for: a simulated kernel needs the dispatching that the reference would fill.
    actual, expected = (jax.block_until_ready(_outputs(op, name, options, case.gradients)(arrays, cotangents))
                        for name in (implementation, 'reference'))
  for name in expected:
    assert_close(f'{case}: {name}', actual[name], expected[name], case.tolerance)


def assert_close(name, actual, expected, tolerance):
  """Equal shape, dtype and infinities, no NaN, and |actual - expected| <= tolerance * max |expected|."""
  assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), (
    f'{name}: {actual.dtype}{actual.shape}, expected {expected.dtype}{expected.shape}')
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  finite = np.isfinite(expected)
  np.testing.assert_array_equal(actual[~finite], expected[~finite], f'{name}: infinities')
  assert not np.isnan(expected).any(), f'{name}: NaN in the expected values'
  assert np.isfinite(actual[finite]).all(), f'{name}: NaN or stray infinity'
  error = np.abs(actual[finite] - expected[finite]).max(initial=0)
  limit = tolerance * np.abs(expected[finite]).max(initial=0)
  assert error <= limit, f'{name}: largest error {error:.3g}, allowed {limit:.3g}'


@functools.cache
def _outputs(op, implementation, options, gradients):
  """Jitted (arrays, cotangents) -> {name of output or gradient: array}; one compilation serves all cases of a shape."""
  def outputs(arrays):
    out = op(**arrays, **dict(options), implementation=implementation)
    return {f'output {i}': x for i, x in enumerate(out if isinstance(out, tuple) else (out,))}

  @jax.jit
  def run(arrays, cotangents=None):
    if not gradients:
      return outputs(arrays)
    differentiated = {name: arrays[name] for name in gradients}
    out, transpose = jax.vjp(lambda differentiated: outputs({**arrays, **differentiated}), differentiated)
    return {**out, **{f'gradient of {name}': x for name, x in transpose(cotangents)[0].items()}}

  return run


def grouped_matmul_case(name, sizes, m=48, k=32, n=24, dtype='float32'):
  def arrays(rng):
    return {'lhs_MK': _normal(rng, (m, k), dtype), 'rhs_GKN': _normal(rng, (len(sizes), k, n), dtype),
            'group_sizes_G': np.array(sizes, np.int32)}

  return Case(name, arrays, gradients=('lhs_MK', 'rhs_GKN'), tolerance=TOLERANCE[dtype])


def grouped_matmul_fp8_case(name, sizes, m, k, n):
  def arrays(rng):
    blocks = -(-k // 128), -(-n // 128)
    return {'lhs_MK': _normal(rng, (m, k), 'float8_e4m3fn'),
            'rhs_GKN': _normal(rng, (len(sizes), k, n), 'float8_e4m3fn'),
            'group_sizes_G': np.array(sizes, np.int32),
            'lhs_scales': rng.uniform(0.5, 2, (m, blocks[0])).astype(np.float32),
            'rhs_scales': rng.uniform(0.5, 2, (len(sizes), *blocks)).astype(np.float32)}

  return Case(name, arrays, tolerance=TOLERANCE['bfloat16'])


def grouped_matmul_fp8_gradients_case(name, sizes, m=160, k=128, n=128, dtype='float32', chosen=None,
                                      powers_of_two=False):
  """grouped_matmul_fp8: every implementation multiplies the same quantised numbers. chosen: experts a token, whose rows
  are then found through an order; None = rows come sorted."""
  def arrays(rng):
    order = None if chosen is None else rng.permutation(m).astype(np.int32)
    return {'lhs_BK': _normal(rng, (m // (chosen or 1), k), dtype), 'rhs_GKN': _normal(rng, (len(sizes), k, n), dtype),
            'group_sizes_G': np.array(sizes, np.int32), 'order_M': order}

  return Case(name, arrays, {'powers_of_two': powers_of_two}, ('lhs_BK', 'rhs_GKN'), TOLERANCE[dtype])


def flash_attention_case(name, t=75, s=75, causal=True, documents=None, dtype='float32', heads=2, h=24, v=16,
                         scale=0.3):
  """documents: lengths of the segments, counted back from the last key and query; None = no segments."""
  def arrays(rng):
    segments = {'q_segments': None, 'kv_segments': None}
    if documents is not None:
      ids = np.repeat(np.arange(len(documents)), documents)[-max(s, t):].astype(np.int32)
      # Rows of the batch differ: the second has its boundaries elsewhere.
      ids = np.stack([ids, np.roll(ids, 7)])
      segments = {'q_segments': ids[:, -t:], 'kv_segments': ids[:, -s:]}
    return {'q_BTNH': _normal(rng, (2, t, heads, h), dtype), 'k_BSNH': _normal(rng, (2, s, heads, h), dtype),
            'v_BSNV': _normal(rng, (2, s, heads, v), dtype), **segments}

  return Case(name, arrays, {'scale': scale, 'causal': causal, 'return_lse': True}, ('q_BTNH', 'k_BSNH', 'v_BSNV'),
              TOLERANCE[dtype])


def mla_decode_case(name, lengths, t, max_pages, page=16, heads=4, c=32, r=8, dtype='float32', cache_dtype=None,
                    scale=0.3):
  """Cache rows past each length are NaN, and table entries past the last page point nowhere."""
  def arrays(rng):
    batch = len(lengths)
    pages = _normal(rng, (batch * max_pages + 1, page, c + r), cache_dtype or dtype)
    table = rng.permutation(batch * max_pages).reshape(batch, max_pages).astype(np.int32)
    position = np.arange(max_pages * page).reshape(max_pages, page)
    for b, length in enumerate(lengths):
      pages[table[b]] = np.where((position < length)[..., None], pages[table[b]], np.nan)
      table[b, -(-length // page):] = (-1, 1 << 30)[b % 2]
    return {'q_BTNJ': _normal(rng, (batch, t, heads, c + r), dtype), 'pages_PSJ': pages, 'table_BP': table,
            'lengths_B': np.array(lengths, np.int32)}

  return Case(name, arrays, {'scale': scale, 'value_width': c, 'return_lse': True}, tolerance=TOLERANCE[dtype])


def swiglu_case(name, m, f, dtype='float32'):
  def arrays(rng):
    return {'h_M2F': _normal(rng, (m, 2 * f), dtype) * 3, 'weights_M': rng.uniform(0, 1, m).astype(np.float32),
            'dy_MF': _normal(rng, (m, f), dtype)}

  return Case(name, arrays, tolerance=TOLERANCE[dtype])


def _normal(rng, shape, dtype):
  return rng.standard_normal(shape, np.float32).astype(getattr(ml_dtypes, dtype, dtype))


WIDE = {'dtype': 'bfloat16', 'heads': 1, 'h': 192, 'v': 128, 'scale': 0.07}  # what the kernels for Hopper take

GPU = {'c': 128, 'r': 64, 'dtype': 'bfloat16'}  # likewise, of a cache

CASES = {
  'grouped_matmul': (
    grouped_matmul_case('uneven groups and a tail', (5, 0, 17, 1, 20)),
    grouped_matmul_case('groups as large as the rows', (10, 10, 8, 10, 10)),
    grouped_matmul_case('all rows in the last group', (0, 0, 0, 0, 48)),
    grouped_matmul_case('no rows at all', (0, 0, 0, 0, 0)),
    grouped_matmul_case('bfloat16', (5, 0, 17, 1, 20), dtype='bfloat16'),
    grouped_matmul_case('fewer rows than groups', (0, 1, 0, 0, 1, 0, 0), m=3),
    grouped_matmul_case('bfloat16, tiles of a GPU', (70, 0, 98, 9), m=197, k=64, n=192, dtype='bfloat16'),
    grouped_matmul_case('bfloat16, one tile of columns', (70, 0, 98, 9), m=197, k=192, n=64, dtype='bfloat16'),
    grouped_matmul_fp8_case('FP8 with cut blocks', (3, 0, 7), m=12, k=160, n=136),
    grouped_matmul_fp8_case('FP8, tiles of a GPU', (70, 0, 98, 9), m=197, k=256, n=192),
    grouped_matmul_fp8_case('FP8, one tile of columns', (70, 0, 98, 9), m=197, k=128, n=64),
  ),
  'swiglu_gradients': (
    swiglu_case('odd sizes', 37, 9),
    swiglu_case('bfloat16', 37, 9, 'bfloat16'),
    swiglu_case('bfloat16, tiles of a GPU', 200, 192, 'bfloat16'),
  ),
  'grouped_matmul_fp8': (
    grouped_matmul_fp8_gradients_case('uneven groups and a tail', (5, 0, 130, 1, 20)),
    grouped_matmul_fp8_gradients_case('cut tiles and blocks', (20, 0, 60), m=90, k=160, n=40),
    grouped_matmul_fp8_gradients_case('no rows at all', (0, 0, 0), m=20),
    grouped_matmul_fp8_gradients_case('scales of powers of two', (20, 70), m=90, powers_of_two=True),
    grouped_matmul_fp8_gradients_case('rows by an order', (3, 65, 9), m=81, chosen=3),
    grouped_matmul_fp8_gradients_case('tiles of a GPU', (70, 0, 98, 9), m=190, k=256, dtype='bfloat16'),
    grouped_matmul_fp8_gradients_case('tiles of a GPU by an order', (0, 132, 20), m=154, n=256, dtype='bfloat16',
                                      chosen=2),
  ),
  'flash_attention': (
    flash_attention_case('causal'),
    flash_attention_case('all keys, packed documents', causal=False, documents=(22, 3, 50)),
    flash_attention_case('packed documents', documents=(22, 3, 50)),
    flash_attention_case('bfloat16', dtype='bfloat16', documents=(22, 3, 50)),
    flash_attention_case('more keys than queries', s=140, documents=(90, 3, 47)),
    flash_attention_case('queries that see no key', s=30, documents=(22, 3, 50)),
    flash_attention_case('one query', t=1),
    flash_attention_case('wide heads, packed documents', t=150, s=150, documents=(60, 3, 87), **WIDE),
    flash_attention_case('wide heads, more keys than queries', t=70, s=300, documents=(90, 13, 197), **WIDE),
    flash_attention_case('wide heads, queries that see no key', t=203, s=130, **WIDE),
    flash_attention_case('equal widths, all keys', t=140, s=260, causal=False, **{**WIDE, 'h': 128}),
    flash_attention_case('wide heads, fewer positions than a tile has', t=5, s=7, **WIDE),
    flash_attention_case('narrow equal widths', **{**WIDE, 'h': 64, 'v': 64}),
  ),
  'mla_decode': (
    mla_decode_case('decode, unequal lengths', (1, 250, 16, 0), t=1, max_pages=17),
    mla_decode_case('verify drafts', (3, 272, 2, 40), t=3, max_pages=17),
    mla_decode_case('short table', (3, 40), t=2, max_pages=3),
    mla_decode_case('bfloat16', (3, 272, 2, 40), t=3, max_pages=17, dtype='bfloat16'),
    # Widths a GPU kernel takes; more rows than a tile and fewer than two.
    mla_decode_case('bfloat16, tiles of a GPU', (700, 0, 40), t=5, max_pages=12, page=64, heads=16, scale=-0.05, **GPU),
    mla_decode_case('bfloat16, one tile of a GPU, small pages', (130, 64, 1, 0), t=1, max_pages=9, heads=16, **GPU),
    mla_decode_case('bfloat16, three tiles of a GPU, large pages', (200, 3), t=3, max_pages=2, page=128, heads=48,
                    **GPU),
    mla_decode_case('bfloat16, tiles of a GPU, a cut request', (2600, 0, 40), t=5, max_pages=82, page=32, heads=16,
                    **GPU),
    mla_decode_case('bfloat16, one tile of a GPU, wide latent', (300,), t=1, max_pages=5, page=64, heads=16,
                    **{**GPU, 'c': 512}),
    mla_decode_case('bfloat16 cache, float32 queries', (3, 40), t=2, max_pages=3, cache_dtype='bfloat16'),
  ),
}

"""grouped_matmul's part of benchmarks.kernels: forward and both gradients, with balanced and Zipf(1.0) groups.

Rounds of ours and of torch._grouped_mm, on the same arrays, alternate: a GPU at its power limit slows down under
whatever runs first. FP8 has lines of its own (--op=grouped_matmul_fp8), beside torch._scaled_grouped_mm on the same
bytes; torch scales whole rows and columns, we tiles of 128 and blocks of 128x128. `error` is that of the result against
the product of the same quantised numbers in float32, both as Euclidean norms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import grouped_matmul, grouped_matmul_fp8, quantise_blocks, quantise_tiles
from pallas_kernels.grouped_matmul import gpu, registry, xla
from pallas_kernels.grouped_matmul.fp8 import registry as quantising_registry
from pallas_kernels.grouped_matmul.scales import quantise_tokens

# Groups, rows, contraction, columns. On a CPU a small one.
SHAPES = {True: ((32, 8192, 7168, 2048), (32, 8192, 2048, 7168), (32, 32768, 7168, 4096), (64, 32768, 2048, 1408),
                 (8, 65536, 7168, 4096), (32, 1024, 7168, 4096)),
          False: ((8, 512, 256, 128),)}


def group_sizes(groups: int, rows: int, load: str) -> np.ndarray:
  """Rows of each group: equal, or proportional to 1 / rank in a fixed random order."""
  share = np.ones(groups) if load == 'balanced' else 1 / np.arange(1, groups + 1)
  sizes = np.floor(rows * share / share.sum()).astype(np.int32)
  sizes[0] += rows - sizes.sum()
  return np.random.default_rng(0).permutation(sizes)


def run(peer: bool, only: str):
  _each(measure, peer, only)


def run_fp8(peer: bool, only: str):
  _each(measure_fp8, peer, only)


def _each(measure, peer, only):
  for shape in SHAPES[timing.on_gpu()]:
    for load in ('balanced', 'zipf'):
      if only in f'{_name(*shape)} {load}':
        measure(*shape, load, peer)


def _name(groups, m, k, n):
  return f'G{groups} M{m} K{k} N{n}'


def measure(groups, m, k, n, load, peer):
  keys = jax.random.split(jax.random.key(0), 3)
  dtype = jnp.bfloat16 if timing.on_gpu() else jnp.float32
  lhs, rhs, dy = (jax.random.normal(key, shape, dtype)
                  for key, shape in zip(keys, ((m, k), (groups, k, n), (m, n)), strict=True))
  sizes = group_sizes(groups, m, load)

  def transpose(argument):
    def gradient(lhs, rhs, dy, sizes):
      return jax.vjp(lambda *x: grouped_matmul(*x, sizes), lhs, rhs)[1](dy)[argument]
    return jax.jit(gradient)

  forward, to_lhs, to_rhs = jax.jit(grouped_matmul), transpose(0), transpose(1)
  sizes_G = jnp.asarray(sizes)
  ours = {'forward': lambda: forward(lhs, rhs, sizes_G), 'gradient to lhs': lambda: to_lhs(lhs, rhs, dy, sizes_G),
          'gradient to rhs': lambda: to_rhs(lhs, rhs, dy, sizes_G)}
  theirs = {}
  if peer:
    import torch
    a, b, d = map(torch.from_dlpack, (lhs, rhs, dy))
    ends = torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(a.device)
    theirs = {'forward': lambda: torch._grouped_mm(a, b, offs=ends),
              'gradient to lhs': lambda: torch._grouped_mm(d, b.transpose(1, 2), offs=ends),
              'gradient to rhs': lambda: torch._grouped_mm(a.t(), d, offs=ends)}
  for op, call in ours.items():
    report('grouped_matmul', op, (groups, m, k, n), load, registry.best(lhs, rhs).name, call, 'torch._grouped_mm',
           theirs.get(op))


def measure_fp8(groups, m, k, n, load, peer):
  """Products of quantised numbers, stored as the kernels read them; then the op that quantises, on the same numbers."""
  keys = jax.random.split(jax.random.key(0), 3)
  lhs, rhs, dy = (jax.random.normal(key, shape, jnp.bfloat16)
                  for key, shape in zip(keys, ((m, k), (groups, k, n), (m, n)), strict=True))
  sizes = group_sizes(groups, m, load)
  sizes_G, shape = jnp.asarray(sizes), (groups, m, k, n)
  line = functools.partial(report, shape=shape, load=load)

  # y = x w and dx = dy w^T, in 1x128 tiles and 128x128 blocks; both want the weights with the contraction innermost.
  for direction, x, contraction in (('forward', lhs, 1), ('gradient to lhs', dy, 2)):
    x, x_scales = jax.jit(quantise_tiles)(x)
    w, w_scales = jax.jit(lambda w, c=contraction: quantise_blocks(w.swapaxes(c, 2)))(rhs)
    multiply = jax.jit(_times_transpose)
    operands = x, w, sizes_G, x_scales, w_scales
    expected = functools.partial(_times_transpose, out_dtype=jnp.float32, implementation='xla')
    line('grouped_matmul FP8', direction, implementation=registry.best(x, w.swapaxes(1, 2)).name,
         ours=functools.partial(multiply, *operands), peer='torch._scaled_grouped_mm, a scale a row',
         theirs=_scaled_grouped_mm(x, w, sizes) if peer else None, error=error(multiply(*operands), expected, operands))

  # dw = x^T dy, in tiles of 128 tokens; both with the tokens of a tile innermost.
  tokens = jax.jit(lambda x, sizes_G: _transposed(*quantise_tokens(x, sizes_G)))
  operands = *tokens(lhs, sizes_G), *tokens(dy, sizes_G), sizes_G
  name, kernels = ('gpu', gpu) if timing.on_gpu() else ('xla', xla)
  multiply = jax.jit(functools.partial(_rhs_gradient, kernels, dtype=jnp.bfloat16))
  line('grouped_matmul FP8', 'gradient to rhs', implementation=name, ours=functools.partial(multiply, *operands),
       error=error(multiply(*operands), functools.partial(_rhs_gradient, xla, dtype=jnp.float32), operands))

  def whole(op):
    def forward_and_gradients(lhs, rhs, dy, sizes_G):
      y, transpose = jax.vjp(lambda *x: op(*x, sizes_G), lhs, rhs)
      return y, transpose(dy)
    return functools.partial(jax.jit(forward_and_gradients), lhs, rhs, dy, sizes_G)

  line('grouped_matmul_fp8', 'all three, quantising too', products=3,
       implementation=quantising_registry.best(lhs, rhs).name, ours=whole(grouped_matmul_fp8),
       peer='grouped_matmul in bfloat16', theirs=whole(grouped_matmul))


def _times_transpose(x, w_GNK, sizes_G, x_scales, scales_GNK, **options):
  return grouped_matmul(x, w_GNK.swapaxes(1, 2), sizes_G, x_scales, scales_GNK.swapaxes(1, 2), **options)


def _transposed(x, scales):
  return x.reshape(-1, 128, x.shape[1]).swapaxes(1, 2), scales


def _rhs_gradient(kernels, lhs_TKB, lhs_scales, dy_TNB, dy_scales, sizes_G, dtype):
  lhs_PK, dy_PN = (x.swapaxes(1, 2).reshape(-1, x.shape[1]) for x in (lhs_TKB, dy_TNB))
  return kernels.rhs_gradient_tokens(lhs_PK, lhs_scales, dy_PN, dy_scales, sizes_G, jnp.dtype(dtype))


def _scaled_grouped_mm(x, w_GNK, sizes):
  """A call of torch's product on the same bytes."""
  import torch
  a, b = (torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(torch.float8_e4m3fn) for x in (x, w_GNK))
  row_scales, column_scales = torch.ones(len(a), device=a.device), torch.ones(b.shape[:2], device=a.device)
  ends = torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(a.device)
  return lambda: torch._scaled_grouped_mm(a, b.transpose(1, 2), row_scales, column_scales, offs=ends,
                                          out_dtype=torch.bfloat16, use_fast_accum=True)


def error(actual, expected, operands) -> float:
  """Relative, against expected(*operands) with products in float32."""
  with jax.default_matmul_precision('highest'):
    return timing.relative_error(actual, jax.jit(expected)(*operands))


def report(op, direction, shape, load, implementation, ours, peer=None, theirs=None, products=1, **fields):
  """Times ours and, if there, theirs (of torch or of jax), and prints the line; each makes `products` products."""
  calls = {'ours': (ours, _wait)}
  if theirs:
    calls['theirs'] = theirs, _wait
  seconds = timing.alternate(calls)
  _, m, k, n = shape
  rate = products * 2 * m * k * n / seconds['ours']
  if theirs:
    fields |= dict(peer=peer, peer_ms=seconds['theirs'] * 1e3, peer_over_ours=seconds['theirs'] / seconds['ours'])
  timing.print_line(op=op, direction=direction, hardware=timing.hardware(), shape=_name(*shape),
                    load=load, implementation=implementation, ms=seconds['ours'] * 1e3,
                    tflops=rate / 1e12, fraction_of_matmul=rate / timing.matmul_limit(), **fields)


def _wait(results):
  if any(isinstance(x, jax.Array) for x in jax.tree.leaves(results)):
    jax.block_until_ready(results)
  else:
    import torch
    torch.cuda.synchronize()

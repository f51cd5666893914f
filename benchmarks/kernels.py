"""Times the kernels beside their peers: python -m benchmarks.kernels [--op=flash_attention] [--only=H128] [--peer]

Prints a JSON line a case: op, direction, hardware, shape, the implementation that was chosen, median milliseconds,
achieved TFLOP/s (a causal program's as half of the whole), their fraction of a large matrix product's on this machine,
the relative error against float32, and with --peer the best peer's milliseconds, in rounds that alternate with ours,
and peer / ours. On a CPU the shapes are small.
"""

import os

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the peer needs memory too

import functools
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import kernels_grouped, timing
from pallas_kernels import flash_attention as attention
from pallas_kernels import make_plan
from pallas_kernels import mla_decode as latent_decode
from pallas_kernels.flash_attention import registry as attention_registry
from pallas_kernels.mla_decode import registry as decode_registry

ATTENTION_SHAPES = {True: ((2, 128, 4096), (1, 128, 8192), (4, 16, 4096)), False: ((1, 4, 512),)}
WIDTH, VALUE_WIDTH = 192, 128
# Heads, batch, cached keys, query tokens. On a CPU two small ones.
DECODE_SHAPES = {
  True: ((128, 128, 4096, 1), (128, 128, 4096, 2), (128, 64, 16384, 1), (128, 16, 8192, 1), (16, 128, 4096, 1),
         (16, 128, 4096, 2), (64, 128, 8192, 1), (128, 1, 32768, 1), (16, 1, 8192, 1)),
  False: ((16, 4, 512, 1), (16, 4, 512, 2)),
}
LATENT, ROPE, PAGE = 512, 64, 64
BEYOND_L2 = 300e6  # bytes of caches taken in turn, so that none is still in an L2 of 50 MB when it is read again


def flash_attention(peer: bool, only: str):
  """Causal, 192/128 wide. The error is that of some heads, the gradients' the largest of three."""
  for batch, heads, length in ATTENTION_SHAPES[timing.on_gpu()]:
    shape = f'B{batch} H{heads} S{length}'
    if only not in shape:
      continue
    dtype = jnp.bfloat16 if timing.on_gpu() else jnp.float32
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (batch, length, heads, width), dtype)
                   for key, width in zip(keys, (WIDTH, WIDTH, VALUE_WIDTH, VALUE_WIDTH), strict=True))
    run = functools.partial(attention, scale=WIDTH**-0.5, causal=True)
    forward, backward = jax.jit(run), jax.jit(lambda transpose, do: transpose(do))
    o, transpose = jax.vjp(forward, q, k, v)
    some = (slice(0, 1), slice(None), slice(0, 4))
    expected, transpose_some = jax.vjp(jax.jit(functools.partial(run, implementation='reference')),
                                       *(x[some].astype(jnp.float32) for x in (q, k, v)))
    gradients = backward(transpose, do), transpose_some(do[some].astype(jnp.float32))
    errors = {'forward': timing.relative_error(o[some], expected),
              'backward': max(timing.relative_error(x[some], y) for x, y in zip(*gradients, strict=True))}
    calls = {'forward': {'ours': (functools.partial(forward, q, k, v), jax.block_until_ready)},
             'backward': {'ours': (functools.partial(backward, transpose, do), jax.block_until_ready)}}
    if peer:
      for name, theirs in (('cuDNN through torch', cudnn_attention(batch, heads, length)),
                           ('tokamax', tokamax_attention(q, k, v, do))):
        for direction, call in theirs.items():
          calls[direction][name] = call
    flops = batch * heads * length**2 * (WIDTH + VALUE_WIDTH)
    for direction, work in (('forward', flops), ('backward', 2.5 * flops)):
      report('flash_attention', shape, attention_registry.best(q, k, v).name, timing.alternate(calls[direction]), work,
             direction=direction, error=errors[direction])


def cudnn_attention(batch, heads, length):
  """{direction: (call, wait)} of cuDNN's attention through torch."""
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  def normal(width):
    return torch.randn(batch, heads, length, width, device='cuda', dtype=torch.bfloat16, requires_grad=True)

  q, k, v = normal(WIDTH), normal(WIDTH), normal(VALUE_WIDTH)

  def run():
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
      return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

  def forward():
    with torch.no_grad():
      return run()

  def wait(_):
    torch.cuda.synchronize()

  o = run()
  do = torch.randn_like(o)
  return {'forward': (forward, wait),
          'backward': (lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), wait)}


def tokamax_attention(q, k, v, do):
  """The same of tokamax's Pallas kernels, or nothing, with a word why, where tokamax cannot be imported."""
  try:
    import tokamax
  except ImportError as error:
    print(f'tokamax is not timed: {error}', file=sys.stderr)
    return {}
  forward = jax.jit(functools.partial(tokamax.dot_product_attention, scale=WIDTH**-0.5, is_causal=True,
                                      implementation='mosaic'))
  backward = jax.jit(lambda transpose, do: transpose(do))
  _, transpose = jax.vjp(forward, q, k, v)
  return {'forward': (functools.partial(forward, q, k, v), jax.block_until_ready),
          'backward': (functools.partial(backward, transpose, do), jax.block_until_ready)}


def mla_decode(peer: bool, only: str):
  """One layer's absorbed attention over bfloat16 pages in random order; the plan is made before, as for a model's
  layers. On a GPU ms is what its kernels take by the GPU's own clock, wall_ms what calls take that are queued back to
  back, at the power limit and with what the host takes."""
  for heads, batch, keys, tokens in DECODE_SHAPES[timing.on_gpu()]:
    shape = f'H{heads} B{batch} S{keys} T{tokens}'
    if only not in shape:
      continue
    cache_bytes = batch * keys * (LATENT + ROPE) * 2
    turns = max(1, int(BEYOND_L2 // cache_bytes) + 1) if timing.on_gpu() else 1
    count = turns * batch * keys // PAGE
    pages = jax.random.normal(jax.random.key(0), (count, PAGE, LATENT + ROPE), jnp.bfloat16)
    tables = jax.random.permutation(jax.random.key(1), count).astype(jnp.int32).reshape(turns, batch, -1)
    q = jax.random.normal(jax.random.key(2), (batch, tokens, heads, LATENT + ROPE), jnp.bfloat16)
    lengths = jnp.full(batch, keys, jnp.int32)
    plan = jax.jit(functools.partial(make_plan, tokens=tokens, heads=heads))(lengths)
    run = jax.jit(functools.partial(latent_decode, scale=WIDTH**-0.5, value_width=LATENT))
    call = functools.partial(run, plan=plan)
    sets = [(q, pages, table, lengths) for table in tables]
    some = slice(0, 4)
    expected = latent_decode(q[some], pages, tables[0, some], lengths[some], scale=WIDTH**-0.5, value_width=LATENT,
                             implementation='reference')
    error = timing.relative_error(call(*sets[0])[some], expected)
    wall = timing.median_seconds(call, *sets, launches=max(20, turns))
    fields = {}
    if timing.on_gpu():
      kernels = timing.kernel_seconds(call, *sets)
      fields = dict(wall_ms=wall * 1e3, kernels_us={name: t * 1e6 for name, t in kernels.items()})
    seconds = sum(kernels.values()) if timing.on_gpu() else wall
    flops = 2 * batch * tokens * heads * keys * (2 * LATENT + ROPE)
    moved = cache_bytes + 2 * batch * tokens * heads * (2 * LATENT + ROPE)
    report('mla_decode', shape, decode_registry.best(q, pages, value_width=LATENT).name, {'ours': seconds}, flops,
           tbytes=moved / seconds / 1e12, fraction_of_copy=moved / seconds / timing.copy_limit(), error=error,
           **(dict(peer='FlashMLA is not to be had for jax') if peer else {}), **fields)


def report(op, shape, implementation, seconds, flops, **fields):
  """seconds: {'ours': ..., the name of a peer: ...}; of several peers the fastest counts."""
  ours = seconds['ours']
  peers = {name: t * 1e3 for name, t in seconds.items() if name != 'ours'}
  if peers:
    best = min(peers, key=peers.get)
    fields |= {'peer': best, 'peer_ms': peers[best], 'peer_over_ours': peers[best] / (ours * 1e3)}
  if len(peers) > 1:
    fields |= {'peers_ms': peers}
  timing.print_line(op=op, hardware=timing.hardware(), shape=shape, implementation=implementation, ms=ours * 1e3,
                    tflops=flops / ours / 1e12, fraction_of_matmul=flops / ours / timing.matmul_limit(), **fields)


OPS = {'flash_attention': flash_attention, 'grouped_matmul': kernels_grouped.run,
       'grouped_matmul_fp8': kernels_grouped.run_fp8, 'mla_decode': mla_decode}


OP = flags.DEFINE_enum('op', None, sorted(OPS), 'Only this one')
ONLY = flags.DEFINE_string('only', '', 'Only the shapes whose name, as it is printed, holds this')
PEER = flags.DEFINE_bool('peer', False, "Time the op's peers too, in the same run: torch and, if installed, tokamax")


def main(_):
  if PEER.value and (reason := timing.no_torch()):
    raise SystemExit(f'--peer times torch on a GPU, and {reason}; leave it out')
  for name, op in OPS.items():
    if OP.value in (None, name):
      op(PEER.value, ONLY.value)
  if not timing.lines_printed():
    raise SystemExit(f'--only={ONLY.value!r} is in no shape of {OP.value or "any op"}; without it all are timed')


if __name__ == '__main__':
  app.run(main)

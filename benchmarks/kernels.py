"""Times the kernels beside their peers: python -m benchmarks.kernels [--op=flash_attention] [--peer]

Prints a JSON line a case: op, direction, hardware, shape, the implementation that was chosen, median milliseconds,
achieved TFLOP/s (a causal program's as half of the whole), their fraction of a large matrix product's on this machine,
and with --peer, where torch is installed and sees the same GPU, the peer's milliseconds in the same run and
peer / ours. On a CPU the shapes are small.
"""

import os

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the peer needs memory too

import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import kernels_grouped, timing
from pallas_kernels import dispatch, make_plan
from pallas_kernels import flash_attention as attention
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


def flash_attention(peer: bool):
  """Causal, 192/128 wide; backward is the time of the gradient less that of the forward pass in it."""
  for batch, heads, length in ATTENTION_SHAPES[timing.on_gpu()]:
    dtype = jnp.bfloat16 if timing.on_gpu() else jnp.float32
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (batch, length, heads, width), dtype)
                   for key, width in zip(keys, (WIDTH, WIDTH, VALUE_WIDTH, VALUE_WIDTH), strict=True))
    run = functools.partial(attention, scale=WIDTH**-0.5, causal=True)
    forward = timing.median_seconds(jax.jit(run), (q, k, v), launches=10)
    gradient = jax.jit(lambda q, k, v, do, run=run: jax.vjp(run, q, k, v)[1](do))
    backward = timing.median_seconds(gradient, (q, k, v, do), launches=5) - forward
    name = chosen(attention_registry, q, k, v)
    flops = batch * heads * length**2 * (WIDTH + VALUE_WIDTH)
    theirs = cudnn_attention(batch, heads, length) if peer else {}
    for direction, seconds, work in (('forward', forward, flops), ('backward', backward, 2.5 * flops)):
      report('flash_attention', f'B{batch} H{heads} S{length}', name, seconds, work, theirs.get(direction),
             direction=direction, **{key: x for key, x in theirs.items() if key.startswith('peer')})


def cudnn_attention(batch, heads, length):
  """Seconds of cuDNN's attention through torch, forward and backward, or why there are none."""
  try:
    import torch
  except ImportError:
    return {'peer': 'torch is not installed'}
  if not torch.cuda.is_available():
    return {'peer': 'torch sees no GPU'}
  from torch.nn.attention import SDPBackend, sdpa_kernel
  from triton.testing import do_bench

  def normal(width):
    return torch.randn(batch, heads, length, width, device='cuda', dtype=torch.bfloat16, requires_grad=True)

  q, k, v = normal(WIDTH), normal(WIDTH), normal(VALUE_WIDTH)
  with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
    def run():
      return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad():
      forward = do_bench(run, warmup=50, rep=200, return_mode='median')
    o = run()
    do = torch.randn_like(o)
    backward = do_bench(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), warmup=50, rep=200,
                        return_mode='median')
  return {'peer': 'cuDNN through torch', 'forward': forward / 1e3, 'backward': backward / 1e3}


def mla_decode(peer: bool):
  """One layer's absorbed attention over bfloat16 pages in random order; the plan is made before, as for a model's
  layers. FlashMLA, the peer, installs on no machine of ours: `peer` says so."""
  del peer
  for heads, batch, keys, tokens in DECODE_SHAPES[timing.on_gpu()]:
    cache_bytes = batch * keys * (LATENT + ROPE) * 2
    turns = max(1, int(BEYOND_L2 // cache_bytes) + 1) if timing.on_gpu() else 1
    count = turns * batch * keys // PAGE
    pages = jax.random.normal(jax.random.key(0), (count, PAGE, LATENT + ROPE), jnp.bfloat16)
    tables = jax.random.permutation(jax.random.key(1), count).astype(jnp.int32).reshape(turns, batch, -1)
    q = jax.random.normal(jax.random.key(2), (batch, tokens, heads, LATENT + ROPE), jnp.bfloat16)
    lengths = jnp.full(batch, keys, jnp.int32)
    plan = jax.jit(functools.partial(make_plan, tokens=tokens, heads=heads))(lengths)
    run = jax.jit(functools.partial(latent_decode, scale=WIDTH**-0.5, value_width=LATENT))
    sets = [(q, pages, table, lengths) for table in tables]
    seconds = timing.median_seconds(functools.partial(run, plan=plan), *sets, launches=max(20, turns))
    flops = 2 * batch * tokens * heads * keys * (2 * LATENT + ROPE)
    moved = cache_bytes + 2 * batch * tokens * heads * (2 * LATENT + ROPE)
    name = chosen(decode_registry, q, pages, value_width=LATENT)
    report('mla_decode', f'H{heads} B{batch} S{keys} T{tokens}', name, seconds, flops, tbytes=moved / seconds / 1e12,
           fraction_of_copy=moved / seconds / timing.copy_limit(), peer='FlashMLA: not installable here')


def chosen(registry, *operands, **facts) -> str:
  """Name of the implementation that None means for these operands."""
  target = dispatch.platform(*operands)
  return next(i.name for i in registry.all if i.reason_against(target, *operands, **facts) is None)


def report(op, shape, implementation, seconds, flops, peer_seconds=None, **fields):
  rate = flops / seconds
  if peer_seconds is not None:
    fields |= {'peer_ms': peer_seconds * 1e3, 'peer_over_ours': peer_seconds / seconds}
  timing.print_line(op=op, hardware=timing.hardware(), shape=shape, implementation=implementation, ms=seconds * 1e3,
                    tflops=rate / 1e12, fraction_of_matmul=rate / timing.matmul_limit(), **fields)


OPS = {'flash_attention': flash_attention, 'grouped_matmul': kernels_grouped.run,
       'grouped_matmul_fp8': kernels_grouped.run_fp8, 'mla_decode': mla_decode}


OP = flags.DEFINE_enum('op', None, sorted(OPS), 'Only this one')
PEER = flags.DEFINE_bool('peer', False, "Time the op's peer too, in the same run")


def main(_):
  for name, op in OPS.items():
    if OP.value in (None, name):
      op(PEER.value)


if __name__ == '__main__':
  app.run(main)

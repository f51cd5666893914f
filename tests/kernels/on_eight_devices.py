"""The ops inside jax.shard_map with check_vma, and under automatic partitioning, on eight CPU devices.

Run by test_dispatch.py in a process of its own. Each op must give, values and gradients, what the reference gives on
the pieces put together, whatever each operand is replicated over.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention, grouped_matmul, grouped_matmul_fp8, mla_decode, testing

MESH = jax.make_mesh((4, 2), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)


def per_shard(function, in_specs, out_specs):
  return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=True))


def close(actual, expected):
  jax.tree.map(lambda x, y: testing.assert_close('sharded', x, y, 2e-5), actual, expected)


def grouped_matmul_with_replicated_weights(implementation):
  # Rows on every device, the experts' weights on the expert axis alone: their gradient is a sum over data.
  rng = np.random.default_rng(0)
  lhs_MK, rhs_GKN = rng.normal(size=(8 * 6, 4)).astype('f'), rng.normal(size=(2 * 3, 4, 5)).astype('f')
  sizes = rng.integers(0, 3, (8, 3)).astype('i')

  def sharded(lhs_MK, rhs_GKN):
    def local(lhs_MK, rhs_GKN, sizes):
      return jnp.sin(grouped_matmul(lhs_MK, rhs_GKN, sizes[0], implementation=implementation))

    both = P(('data', 'expert'))
    return per_shard(local, (both, P('expert'), both), both)(lhs_MK, rhs_GKN, sizes).sum()

  def local_sum(lhs_MK, rhs_GKN, sizes):
    # The gradient taken inside the shards, where cotangents have varying types of their own.
    def loss(lhs_MK, rhs_GKN):
      return jnp.sin(grouped_matmul(lhs_MK, rhs_GKN, sizes[0], implementation=implementation)).sum()

    return jax.grad(loss, (0, 1))(lhs_MK, rhs_GKN)

  def whole(lhs_MK, rhs_GKN):
    y = [grouped_matmul(lhs, rhs_GKN[3 * (i % 2):][:3], sizes[i], implementation='reference')
         for i, lhs in enumerate(jnp.split(lhs_MK, 8))]
    return jnp.sin(jnp.concatenate(y)).sum()

  expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(lhs_MK, rhs_GKN)
  close(jax.jit(jax.value_and_grad(sharded, (0, 1)))(lhs_MK, rhs_GKN), expected)
  both = P(('data', 'expert'))
  close(per_shard(local_sum, (both, P('expert'), both), (both, P('expert')))(lhs_MK, rhs_GKN, sizes), expected[1])


def fp8_by_an_order(implementation):
  # Tokens over all devices, each with an order and sizes of its own; weights are replicated.
  rng = np.random.default_rng(3)
  x_BK, rhs_GKN, dy_MN = (rng.normal(size=s).astype(np.float32) for s in ((8 * 6, 8), (3, 8, 16), (8 * 12, 16)))
  order = np.concatenate([rng.permutation(12) for _ in range(8)]).astype(np.int32)
  sizes = np.array([[4, 0, 8], [1, 2, 3]] * 4)

  def local(x_BK, rhs_GKN, sizes, order, implementation=implementation):
    return grouped_matmul_fp8(x_BK, rhs_GKN, sizes[0], order, implementation=implementation)

  def parts(x_BK, rhs_GKN, sizes, order):
    split = (np.split(x, 8) if isinstance(x, np.ndarray) else jnp.split(x, 8) for x in (x_BK, sizes, order))
    return jnp.concatenate([local(x, rhs_GKN, size, o, 'reference') for x, size, o in zip(*split, strict=True)])

  both = P(('data', 'expert'))
  sharded = per_shard(local, (both, P(), both, both), both)

  def value_and_gradients(run):
    return jax.jit(jax.value_and_grad(lambda x, w: (run(x, w, sizes, order) * dy_MN).sum(), (0, 1)))(x_BK, rhs_GKN)

  close(value_and_gradients(sharded), value_and_gradients(parts))


def attention_with_segments(implementation):
  # Batch over data, heads over expert; segments vary over data alone, and the keys of all heads are the same array.
  case = testing.flash_attention_case('sharded', documents=(30, 45))
  arrays = case.arrays(np.random.default_rng(1))
  q_BTNH, k_BSNH, v_BSNV, segments = (np.concatenate([arrays[n]] * 2) for n in (
    'q_BTNH', 'k_BSNH', 'v_BSNV', 'q_segments'))
  k_BS1H = k_BSNH[:, :, :1]

  def local(q_BTNH, k_BS1H, v_BSNV, segments, implementation):
    k_BSNH = jnp.broadcast_to(k_BS1H, (*k_BS1H.shape[:2], q_BTNH.shape[2], k_BS1H.shape[3]))
    return flash_attention(q_BTNH, k_BSNH, v_BSNV, scale=0.3, q_segments=segments, kv_segments=segments,
                           return_lse=True, implementation=implementation)

  heads = P('data', None, 'expert')
  run = per_shard(functools.partial(local, implementation=implementation), (heads, P('data'), heads, P('data')), heads)
  def value_and_gradients(attention):
    def loss(*qkv):
      return sum(jnp.sin(x).sum() for x in attention(*qkv, segments))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q_BTNH, k_BS1H, v_BSNV)

  close(value_and_gradients(run), value_and_gradients(functools.partial(local, implementation='reference')))


def decode_with_replicated_pages(implementation):
  case = testing.mla_decode_case('sharded', (3, 272, 2, 40), t=2, max_pages=17)
  arrays = case.arrays(np.random.default_rng(2))
  options = {**case.options, 'implementation': implementation}
  heads = P('data', None, 'expert')
  run = per_shard(lambda q, pages, table, lengths: mla_decode(q, pages, table, lengths, **options),
                  (heads, P(), P('data'), P('data')), heads)
  close(run(*arrays.values()), mla_decode(**arrays, **{**options, 'implementation': 'reference'}))


def attention_partitions_over_the_batch():
  batch = jax.NamedSharding(MESH, P('data'))
  qkv = [jax.ShapeDtypeStruct((8, 160, 2, 16), jnp.float32, sharding=batch)] * 3
  gradient = jax.grad(lambda *qkv: flash_attention(*qkv, scale=0.3).sum(), (0, 1, 2))
  text = jax.jit(gradient, out_shardings=batch).lower(*qkv).compile().as_text()
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert collective not in text, f'attention over a sharded batch moves data: {collective}'


assert len(jax.devices()) == 8
for check, op in ((grouped_matmul_with_replicated_weights, grouped_matmul), (fp8_by_an_order, grouped_matmul_fp8),
                  (attention_with_segments, flash_attention), (decode_with_replicated_pages, mla_decode)):
  for name in op.implementations():
    check(name)
attention_partitions_over_the_batch()

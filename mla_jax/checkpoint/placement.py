"""Arrays that are filled piece by piece where they will live, and read piece by piece from where they are."""

import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

ALIGNMENT = 64  # bytes: what jax asks for to use host memory as it is


class HostShard:
  """A part of an array in host memory, which is a CPU device's memory too."""

  def __init__(self, shape, dtype):
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)  # a bias that no file holds stays 0
    start = -memory.ctypes.data % ALIGNMENT
    self.array = memory[start:start + size].view(dtype).reshape(shape)

  def put(self, start: tuple[int, ...], piece: np.ndarray):
    self.array[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))] = piece

  def finish(self, devices) -> list:
    return [jax.device_put(self.array, device) for device in devices]


class DeviceShard:
  """A part of an array on accelerators (several: replicas). A piece is transferred and written in place."""

  def __init__(self, shape, dtype, devices):
    self.arrays = [jax.jit(functools.partial(jnp.zeros, shape, dtype),
                           out_shardings=jax.sharding.SingleDeviceSharding(device))() for device in devices]

  def put(self, start: tuple[int, ...], piece: np.ndarray):
    start = tuple(map(np.int32, start))
    self.arrays = [_update(array, jax.device_put(piece, next(iter(array.devices()))), start) for array in self.arrays]

  def finish(self, devices) -> list:
    del devices
    return self.arrays


@functools.partial(jax.jit, donate_argnums=0)
def _update(array, piece, start):
  return jax.lax.dynamic_update_slice(array, piece, start)


class Target:
  """An array to be filled. sharding None: NumPy, whole; else a jax.Array, of which this process holds its part."""

  def __init__(self, shape: tuple[int, ...], dtype, sharding=None, on_host=None):
    """`on_host`: whether a device's memory is the host's; None asks the device."""
    self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding
    if sharding is None:
      self.shards = [(tuple(slice(0, size) for size in shape), HostShard(shape, dtype), [])]
      return
    holders = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
      holders[tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))].append(device)
    self.shards = []  # (index into the whole array, what holds that part, its devices)
    for spans, devices in holders.items():
      sizes = tuple(stop - start for start, stop in spans)
      host = devices[0].platform == 'cpu' if on_host is None else on_host
      shard = HostShard(sizes, dtype) if host else DeviceShard(sizes, dtype, devices)
      self.shards.append((tuple(slice(*span) for span in spans), shard, devices))

  def finish(self):
    if self.sharding is None:
      return self.shards[0][1].array
    arrays = [array for _, shard, devices in self.shards for array in shard.finish(devices)]
    return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def fetch(array, index: tuple) -> np.ndarray:
  """`array[index]` (integers and whole slices) in host memory, without copying more than that out of a device."""
  if isinstance(array, np.ndarray):
    return array[index]
  if len(array.devices()) == 1 and next(iter(array.devices())).platform == 'cpu':
    return np.asarray(array)[index]  # a view
  whole = tuple(isinstance(i, slice) for i in index)
  start = tuple(np.int32(0 if isinstance(i, slice) else i) for i in index)
  piece = np.asarray(_slice(array, start, tuple(s if w else 1 for s, w in zip(array.shape, whole, strict=True))))
  return piece.reshape([size for size, is_whole in zip(piece.shape, whole, strict=True) if is_whole])


@functools.partial(jax.jit, static_argnums=2)
def _slice(array, start, sizes):
  return jax.lax.dynamic_slice(array, start, sizes)

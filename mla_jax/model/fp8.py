"""Weights that stay FP8 in memory and become numbers of the compute dtype where a layer uses them: the same bits as
taking them out of FP8 on loading, at half of bfloat16's memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.axes import gather
from mla_jax.config import ConfigError
from pallas_kernels.grouped_matmul.scales import dequantise


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the blocks of a published matrix lie in our array. Letters of the array, as of any weight; of the scales: first
  the letters that number matrices, then those of a matrix's rows, then those of its columns.

  row_blocks, column_blocks: int32, the block of each row and column in our order; None: one after the other, as blocks
  cut an axis. Bytes, because what is static is hashed.
  scale_dtype, scale_fmt: how a file stores the scales, and config.json calls them; here they are float32."""

  letters: str
  numbering: str
  rows: str
  columns: str
  block: tuple[int, int] = (128, 128)
  row_blocks: bytes | None = None
  column_blocks: bytes | None = None
  scale_dtype: str = 'F32'
  scale_fmt: str = 'float32'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Weight:
  """A leaf of `params` in place of an array, or several stacked on leading axes.

  bits: float8_e4m3fn, as uint8 (to slice FP8 arrays, the CPU backend makes float16 copies of them), laid out like the
  array. scales: float32, a grid of blocks for each published matrix. A weight is the product, rounded to `loaded_as`,
  which is what it would be in memory if it were taken out of FP8 on loading, then to `dtype`."""

  bits: jax.Array
  scales: jax.Array
  layout: Layout = dataclasses.field(metadata=dict(static=True))
  loaded_as: np.dtype = dataclasses.field(metadata=dict(static=True))
  dtype: np.dtype = dataclasses.field(metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return self.bits.shape

  def astype(self, dtype) -> 'FP8Weight':
    """The dtype that it computes in. Raises ConfigError."""
    check_computes(dtype)
    return dataclasses.replace(self, dtype=jnp.dtype(dtype))

  def __getitem__(self, index) -> 'FP8Weight':
    """Along leading axes: layers, experts."""
    return dataclasses.replace(self, bits=self.bits[index], scales=self.scales[index])

  def dequantise(self) -> jax.Array:
    """The array."""
    layout, scales, order = self.layout, self.scales, self.layout.numbering
    size, blocks = dict(zip(layout.letters, self.shape, strict=True)), {}
    for axis, letters, block, numbers in ((-2, layout.rows, layout.block[0], layout.row_blocks),
                                          (-1, layout.columns, layout.block[1], layout.column_blocks)):
      order += letters
      if numbers is None:
        blocks[letters] = block
        size[letters] = scales.shape[axis]
      else:
        scales = jnp.take(scales, np.frombuffer(numbers, np.int32), axis=axis)
    scales = scales.reshape([size[letter] for letter in order])
    scales = scales.transpose([order.index(letter) for letter in layout.letters])
    with jax.named_scope('dequantise'):
      values = jax.lax.bitcast_convert_type(self.bits, jnp.float8_e4m3fn)
      w = dequantise(values, scales, tuple(blocks.get(letter, 1) for letter in layout.letters))
      # Conversions alone will not do: XLA may leave them out, and multiply with numbers that were not rounded.
      for kind in map(jnp.finfo, (self.loaded_as, self.dtype)):
        w = jax.lax.reduce_precision(w, kind.nexp, kind.nmant)
      return w.astype(self.dtype)


def ready(w, letters: str):
  """A layer's weight as the computation wants it: whole along fsdp and out of FP8. Experts stay FP8 for `chosen`."""
  if not isinstance(w, FP8Weight):
    return gather(w, letters)
  w = dataclasses.replace(w, bits=gather(w.bits, letters))
  return w if 'E' in letters else w.dequantise()


def chosen(sizes_E, rows: int, *weights):
  """(sizes, weights) of groups for a grouped matmul. Arrays are as they are; where a weight is FP8, only the experts
  that have any of the `rows` rows are taken out of FP8, in their order."""
  if not any(isinstance(w, FP8Weight) for w in weights):
    return sizes_E, weights
  if rows < len(sizes_E):
    some = jnp.nonzero(sizes_E, size=rows, fill_value=len(sizes_E))[0]
    sizes_E = sizes_E.at[some].get(mode='fill', fill_value=0)
    weights = [w[jnp.minimum(some, w.shape[0] - 1)] for w in weights]
  return sizes_E, [w.dequantise() if isinstance(w, FP8Weight) else w for w in weights]


def is_fp8(x) -> bool:
  return isinstance(x, FP8Weight)


def check_computes(dtype):
  """Raises ConfigError where kept weights would not be those of a model taken out of FP8 on loading."""
  if jnp.dtype(dtype) == jnp.float16:  # rounding to its subnormals differs by platform
    raise ConfigError('fp8=keep computes in bfloat16 or float32, not float16; give one as dtype, or fp8=dequantise')


def check_trainable(params):
  """Raises ConfigError where a weight is kept in FP8."""
  if any(map(is_fp8, jax.tree.leaves(params, is_leaf=is_fp8))):
    raise ConfigError("weights that are kept in FP8 have no gradients; to train them, load with fp8='dequantise'")

"""The sizes of a call of the latent decode kernel, and the memory that a program works on."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import TILES

ROWS = BLOCK = 64  # queries of a program; keys of a block


@dataclasses.dataclass(frozen=True)
class Call:
  """Sizes. rows: of queries, t tokens of `heads` each, completed to a multiple of 8. parts: of the plan."""

  batch: int
  rows: int
  t: int
  heads: int
  width: int
  value_width: int
  num_pages: int
  page: int
  max_pages: int
  parts: int
  dtype: Any
  scale: float

  @property
  def blocks(self):
    """Tiles of rows."""
    return -(-self.rows // ROWS)

  @property
  def cluster(self):
    """Programs that read the same keys together."""
    return 2 if self.blocks % 2 == 0 else 1

  @property
  def groups(self):
    return self.blocks // self.cluster

  @property
  def half(self):
    """Columns of a warpgroup."""
    return self.value_width // 2

  @property
  def rope(self):
    return self.width - self.value_width

  @property
  def copies(self):
    """Of pages, for a block of keys."""
    return max(1, BLOCK // self.page)

  @property
  def tile_rows(self):
    """Rows of a tile that TMA copies."""
    return min(self.rows, ROWS)


class Refs(NamedTuple):
  """Operands and results in GMEM, then arrays and barriers in shared memory, as `results` and `scratch` make them."""

  q: Any
  pages: Any
  table: Any
  lengths: Any
  begin: Any
  parts: Any

  o: Any
  lse: Any
  part_o: Any
  part_lse: Any

  q_left: Any
  q_right: Any
  q_rope: Any
  k_left: Any
  k_right: Any
  k_rope: Any
  maxima: Any
  sums: Any
  q_ready: Any
  q_free: Any
  k_ready: Any
  k_ready2: Any
  k_free: Any
  max0_told: Any
  max1_told: Any
  weights0_told: Any
  weights1_told: Any
  sums_told: Any
  done: Any


def results(c: Call):
  """o, lse, and the float32 pieces of both: two slots a part, for its first request and for another.

  lse has whole tiles: a store along one dimension is no tensor copy, and nothing stops it at the end of a row.
  """
  pieces = 2 * c.parts, c.blocks * ROWS
  return (jax.ShapeDtypeStruct((c.batch, c.rows, c.value_width), c.dtype),
          jax.ShapeDtypeStruct((c.batch, c.blocks * ROWS), jnp.float32),
          jax.ShapeDtypeStruct((*pieces, c.value_width), jnp.float32), jax.ShapeDtypeStruct(pieces, jnp.float32))


def scratch(c: Call):
  barrier, widths = plgpu.Barrier, (c.half, c.half, c.rope)
  if c.cluster > 1:
    k_free = plgpu.ClusterBarrier(collective_axes=('member',), num_barriers=4)
    done = plgpu.ClusterBarrier(collective_axes=('member',), num_arrivals=2)
  else:
    k_free, done = barrier(num_barriers=4), barrier()
  return (
    *(plgpu.SMEM((1, ROWS, n), c.dtype, transforms=TILES) for n in widths),  # queries
    *(plgpu.SMEM((2, BLOCK, n), c.dtype, transforms=TILES) for n in widths),  # keys of an even and of an odd block
    plgpu.SMEM((2, ROWS), jnp.float32),  # the running maximum after the even block, and after the odd one
    plgpu.SMEM((2, ROWS), jnp.float32),  # each warpgroup's sum of weights
    barrier(num_arrivals=3),  # q_ready
    barrier(num_arrivals=2),  # q_free
    # The half that the warpgroup of an even block, or of an odd one, multiplies first; then the rest of the block.
    barrier(num_arrivals=c.copies, num_barriers=2), barrier(num_arrivals=2 * c.copies, num_barriers=2),
    k_free,  # by 0: k_left of the even block, 1: k_right of the even, 2: k_left of the odd, 3: k_right of the odd
    barrier(), barrier(),  # max0_told, max1_told
    barrier(), barrier(),  # weights0_told, weights1_told
    barrier(num_arrivals=2),  # sums_told
    done,
  )

"""What the three Hopper attention kernels share: tiles, which blocks a tile meets, the table of work, the mask."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import COLUMN, ROW

ROWS = 64  # of a warpgroup's tile; two warpgroups make a program's
L2_SHARE = 24e6  # bytes of keys and values that heads computed at the same time may have together
NOBODY = {'queries': -1, 'keys': -2}  # segments of padding


@dataclasses.dataclass(frozen=True)
class Attention:
  """One call: query t of T sees keys <= t + S - T if it is causal, of its own segment if it is segmented.

  programs: at most so many run, one a streaming multiprocessor.
  tile: rows of a program's tile, of queries (side 'queries') or of keys; block: rows of the other side in one step.
  """

  batch: int
  heads: int
  t: int
  s: int
  width: int
  value_width: int
  scale: float
  causal: bool
  segmented: bool
  programs: int = 132

  @property
  def lag(self):
    return self.s - self.t

  def blocks(self, side, block):
    """int [tiles, 2]: the first block of the other side that each tile of this side may meet, and how many; >= 1."""
    own, other = (self.t, self.s) if side == 'queries' else (self.s, self.t)
    start = np.arange(0, own, 2 * ROWS)
    count = -(-other // block)
    first, end = np.zeros_like(start), np.full_like(start, count)
    if self.causal and side == 'queries':
      end = np.clip(-(-(start + 2 * ROWS + self.lag) // block), 1, count)
    elif self.causal:
      first = np.clip((start - self.lag) // block, 0, count - 1)
    return np.stack([first, end - first], axis=1)

  def work(self, side, block, segments=None):
    """(int32 [programs, most items, 5], int32 [programs]): items as (row of the batch, head, tile, first block,
    blocks), and how many items each program has."""
    blocks = self.blocks(side, block)
    most = max(1, int(L2_SHARE / (max(self.t, self.s) * 2 * (self.width + self.value_width))))
    # What a tile costs beyond its blocks, loading its own rows and writing the result, is about one block more.
    schedule = mosaic_gpu.balanced_schedule(tuple(int(n) + 1 for n in blocks[:, 1]), self.batch * self.heads, most,
                                            self.programs)
    items = np.zeros((len(schedule), max(map(len, schedule)), 2), np.int32)
    for row, own in zip(items, schedule, strict=True):
      row[:len(own)] = own
    tile, batch, head = items[..., 0], items[..., 1] // self.heads, items[..., 1] % self.heads
    if segments is None:
      met = blocks[tile]
    else:
      met = _blocks_of_own_segments(blocks, block, *(segments if side == 'queries' else segments[::-1]))[batch, tile]
    table = jnp.concatenate([np.stack([batch, head, tile], axis=-1), met], axis=-1)
    return table.astype(jnp.int32), jnp.array([len(own) for own in schedule], jnp.int32)

  def hide(self, scores, q_start, k_start, query_axis, ids=None, past_the_end=True):
    """scores with -inf where a query does not see a key; queries run along query_axis from q_start, keys along the
    other from k_start. ids: segments of both. past_the_end: whether some of the keys may be padding."""
    def iota(axis):
      return plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=mosaic_gpu.MATRIX)

    last = jnp.int32(self.s - 1)
    if self.causal:
      last_seen = iota(query_axis) + (q_start + self.lag)
      last = lax.min(last_seen, last) if past_the_end else last_seen
    sees = iota(1 - query_axis) + k_start <= last
    if ids is not None:
      q_ids, k_ids = (mosaic_gpu.across(x, scores.shape, axis) for x, axis in zip(
        ids, (query_axis, 1 - query_axis), strict=True))
      sees &= q_ids == k_ids
    return jnp.where(sees, scores, -jnp.inf)

  def hider(self, ids, batch, q_start, block):
    """hide(scores, j) of a warpgroup's 64 queries from q_start and the j-th block of keys; most blocks need nothing.

    ids: references to the segments of queries and keys, or ().
    """
    q_ids = load_ids(ids[0].at[batch, pl.ds(q_start, ROWS)], ROW) if ids else None
    clear = jnp.int32(self.s // block)  # blocks that all of the queries see whole
    if self.causal:
      clear = lax.min(lax.div(lax.max(q_start + (self.lag + 1), jnp.int32(0)), jnp.int32(block)), clear)

    def hide(scores, j):
      if ids:
        k_ids = load_ids(ids[1].at[batch, pl.ds(j * block, block)], COLUMN)
        return self.hide(scores, q_start, j * block, 0, (q_ids, k_ids))
      if not self.causal and self.s % block == 0:
        return scores
      return lax.cond(j >= clear, lambda: self.hide(scores, q_start, j * block, 0), lambda: scores)

    return hide


def items(table, counts, program):
  """(number of items, item(i) -> (row of the batch, head, first row, first block, blocks)), from references to what
  `Attention.work` made."""
  def item(i):
    batch, head, tile, first, blocks = (table[program, i, j] for j in range(5))
    return batch, head, tile * (2 * ROWS), first, blocks  # a product, so that its divisibility shows: TMA needs it

  return counts[program], item


def padded_ids(segments, length, side):
  """Segments of each position, up to a multiple of what tiles and blocks have, padding being nobody's."""
  return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -length % (2 * ROWS))), constant_values=NOBODY[side])


def whole_swizzles(x_BTN):
  """x with positions added up to a multiple of 8: TMA moves swizzled tiles of 8 rows. What is past is read as zeros."""
  return jnp.pad(x_BTN, [(0, -n % 8 if axis == 1 else 0) for axis, n in enumerate(x_BTN.shape)])


def load_ids(reference, layout):
  return plgpu.load(reference, layout=layout, optimized=False)


def _blocks_of_own_segments(blocks, block, own_ids, other_ids):
  """int [B, tiles, 2]: blocks, without those at either end whose range of segments and the tile's are disjoint."""
  low, high = _ranges(own_ids, 2 * ROWS)
  other_low, other_high = _ranges(other_ids, block)
  count = -(-other_ids.shape[1] // block)
  index = np.arange(count)
  meets = (index >= blocks[:, :1]) & (index < blocks.sum(1)[:, None])
  meets = meets & (low[..., None] <= other_high[:, None]) & (other_low[:, None] <= high[..., None])
  first = jnp.argmax(meets, -1)
  last = count - 1 - jnp.argmax(meets[..., ::-1], -1)
  some = meets.any(-1)
  return jnp.stack([jnp.where(some, first, blocks[:, 0]), jnp.where(some, last - first + 1, 1)], axis=-1)


def _ranges(ids, rows):
  """Lowest and highest segment of each run of rows."""
  def runs(beyond):
    x = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % rows)), constant_values=beyond)
    return x.reshape(x.shape[0], -1, rows)

  limits = jnp.iinfo(jnp.int32)
  return runs(limits.max).min(-1), runs(limits.min).max(-1)

"""The order in which `gpu.py` works, from the group sizes, in plain JAX.

Everything is a comparison and a sum, because XLA makes one kernel of each such sum and of what feeds it, while a
cumulative sum, a search or a sort is a kernel of its own: on the smallest products every launch is 0.5% of the time.

TMA copies tiles of 8 rows, so the tables count rows from the multiple of 8 at or before a group's first one; the rows
before it and after the last one belong to others and are left out at the end.
"""

import jax.numpy as jnp

ALIGNMENT = 8
VISIT = ('group', 'row8', 'first', 'last', 'real')
GROUP = ('group', 'row8', 'chunks', 'first', 'last')


def visits(group_sizes_G, rows: int, tile: int, tail: bool, multiple: int = 1):
  """int32 [1 + V, 5]: how many visits there are, in every column of row 0; then the visits.

  They come in the order of the rows, but for those that fill at most half a tile, which come last: they take less
  time, and so fill the gaps that equal pieces leave at the end. (64 groups with Zipf's sizes on an H200: 1.22 of what
  equal groups take, instead of 1.28.)

  A visit is a tile of at most `tile` rows, all of one group: `VISIT` names its columns. group; row8: its first row / 8;
  [first, last): the part of its rows that is the group's; real: 0 where there is nothing to multiply, for the rows past
  the last group, which `tail` includes, and for what fills the table. V is a bound, and a multiple of `multiple`.
  """
  groups, parts = len(group_sizes_G), len(group_sizes_G) + tail
  index_P, index_G = jnp.arange(parts), jnp.arange(groups)
  sizes_G = group_sizes_G.astype(jnp.int32)
  start_P = jnp.where(index_G < index_P[:, None], sizes_G, 0).sum(1)
  end_P = jnp.where(index_G <= index_P[:, None], sizes_G, 0).sum(1)
  end_P = jnp.where(index_P < groups, end_P, rows)
  base_P = start_P // ALIGNMENT * ALIGNMENT
  tiles_P = jnp.where(end_P > start_P, (end_P - base_P + tile - 1) // tile, 0)
  short_P = (tiles_P > 0) & (end_P - base_P - (tiles_P - 1) * tile <= tile // 2)
  full_P = tiles_P - short_P
  before_P = jnp.where(index_P < index_P[:, None], full_P, 0).sum(1)
  before_short_P = (full_P + jnp.where(index_P < index_P[:, None], short_P, 0)).sum(1)

  most = (rows + (ALIGNMENT - 1) * parts) // tile + parts
  row_of_table, column = jnp.arange(1 + -(-most // multiple) * multiple)[:, None, None], jnp.arange(5)[:, None]
  place = row_of_table - 1
  number_VP = jnp.where(short_P & (place == before_short_P), tiles_P - 1, place - before_P)
  there_VP = (place >= before_P) & (number_VP < full_P) | short_P & (place == before_short_P)
  row = base_P + number_VP * tile
  value = (jnp.minimum(index_P, groups - 1), row // ALIGNMENT, jnp.clip(start_P - row, 0, tile),
           jnp.clip(end_P - row, 0, tile), index_P < groups)
  value = jnp.where(there_VP, _by_column(column, value), 0)
  return jnp.where(row_of_table == 0, tiles_P, value).sum(2).astype(jnp.int32)


def largest_first(group_sizes_G, chunk: int):
  """int32 [G, 5]: the groups, the largest first so that the short ones fill the gaps at the end; `GROUP` names columns.

  group; row8: its first row / 8; chunks: of `chunk` rows, counted from there; [first, last): the part of those rows
  that is the group's.
  """
  size_G = group_sizes_G.astype(jnp.int32)
  index_G = jnp.arange(len(size_G))
  end_G = jnp.where(index_G <= index_G[:, None], size_G, 0).sum(1)
  ahead_GG = (size_G > size_G[:, None]) | ((size_G == size_G[:, None]) & (index_G < index_G[:, None]))
  place_G = ahead_GG.sum(1)
  start_G = end_G - size_G
  base_G = start_G // ALIGNMENT * ALIGNMENT
  chunks_G = jnp.where(size_G > 0, (end_G - base_G + chunk - 1) // chunk, 0)
  value = _by_column(jnp.arange(5)[:, None], (index_G, base_G // ALIGNMENT, chunks_G, start_G - base_G, end_G - base_G))
  return jnp.where(place_G == index_G[:, None, None], value, 0).sum(2).astype(jnp.int32)


def _by_column(column, values):
  value = values[-1]
  for number in reversed(range(len(values) - 1)):
    value = jnp.where(column == number, values[number], value)
  return value

"""Which part of the chip works on which keys: balanced split-KV scheduling, as JAX arithmetic on the lengths.

The requests lie end to end on one line, each as long as its work: its steps of `STEP_KEYS` keys and `OVERHEAD` steps
for what every request costs whatever its length. Equal pieces of that line go to the parts of the chip, so a part may
begin inside one request and end inside another. Cutting a request costs a partial result written and read again;
where whole requests, dealt out in order, keep the parts as busy, none is cut.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

STEP_KEYS = 128  # two blocks of 64 keys, one for each warpgroup
OVERHEAD = 2  # steps' worth of time: queries loaded, the first keys awaited, the output written
CUT = 5  # the same for cutting requests: a partial result more a part, awaited and merged, and queries loaded twice
SHORTEST = 2  # steps: a cut this near the end of a request moves to its end
PIECE = 2  # steps: no more parts than leave each as much. Longer pieces leave a short batch on few processors


class Plan(NamedTuple):
  """begin_P2: (request, step) where each part begins, and one entry past the last; a part ends where the next begins.
  parts_B2: the first and the last part that work on each request."""

  begin_P2: jax.Array
  parts_B2: jax.Array


def make(lengths_B, parts: int) -> Plan:
  """For `parts` processors that each run their piece in order. lengths_B: int32 keys of each request."""
  steps_B = -(-lengths_B.astype(jnp.int32) // STEP_KEYS)
  end_B = jnp.cumsum(steps_B + OVERHEAD)
  total, start_B = end_B[-1], end_B - steps_B - OVERHEAD
  used = jnp.clip(total // PIECE, 1, parts)
  cut_P = _share(total, jnp.arange(parts + 1), used)
  request_P = jnp.searchsorted(end_B, cut_P, side='right', method='compare_all').astype(jnp.int32)
  past_P = request_P >= len(lengths_B)
  inside_P = jnp.minimum(request_P, len(lengths_B) - 1)
  step_P = jnp.maximum(cut_P - start_B[inside_P] - OVERHEAD, 0)
  step_P = jnp.where(step_P < SHORTEST, 0, step_P)
  to_next_P = ~past_P & (steps_B[inside_P] - step_P < SHORTEST) & (step_P > 0)
  split = jnp.stack([request_P + to_next_P, jnp.where(past_P | to_next_P, 0, step_P)], axis=1)

  whole_P = _share(jnp.int32(len(lengths_B)), jnp.arange(parts + 1), jnp.int32(parts))
  whole = jnp.stack([whole_P, jnp.zeros_like(whole_P)], axis=1)
  edge_P = jnp.concatenate([jnp.zeros(1, jnp.int32), end_B])[whole_P]
  slowest_whole = jnp.max(edge_P[1:] - edge_P[:-1])
  slowest_split = -(-total // used) + CUT
  begin_P2 = jnp.where(slowest_whole <= slowest_split, whole, split).astype(jnp.int32)

  # Part p works on request b if it begins before b's end and the next part begins after b's start.
  request = jnp.arange(len(lengths_B))
  first_B = jnp.searchsorted(2 * begin_P2[1:, 0] + (begin_P2[1:, 1] > 0), request * 2, side='right',
                             method='compare_all')
  last_B = jnp.searchsorted(begin_P2[1:, 0], request, side='right', method='compare_all')
  return Plan(begin_P2, jnp.stack([first_B, jnp.minimum(last_B, parts - 1)], axis=1).astype(jnp.int32))


def _share(total, index, parts):
  """floor(total * min(index, parts) / parts) without overflow."""
  index = jnp.minimum(index, parts)
  return ((total // parts) * index + (total % parts) * index // parts).astype(jnp.int32)

"""The routed experts of one device: rows sorted by expert, two grouped matmuls, and their sum for each token.

T tokens (of all sequences), M rows: one for each token and each of its X experts. An expert that lives elsewhere has no
row here: rows past `Routes.sizes_E` hold nothing, are never read back, and may be NaN.

What moves memory is written as gathers alone, forward and backward: a token's row goes to X places and the X rows of a
token are summed, and each is the gradient of the other. Left to autodiff the first one's gradient would be a scatter
that adds, which a GPU does with atomics: slowly, and in another order every time. The routing weight multiplies the
activations, F wide and about to be written anyway, so that both ways carry plain copies and sums.

Between forward and backward stay the sorted rows (X D numbers a token), gate and up (X 2 F) and indices. Activations
are computed again, in the pass that computes their gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.model.fp8 import chosen
from pallas_kernels import dispatch, grouped_matmul, swiglu, swiglu_gradients


class Routes(NamedTuple):
  """Where each choice of a token has its row, and back."""

  place_TX: jax.Array  # int32, the row of a choice; M where its expert is elsewhere
  choice_M: jax.Array  # int32, the choice t X + x that a row is for; past the groups those whose expert is elsewhere
  sizes_E: jax.Array  # int32, rows of each expert


def sort(ids_TX, first, count: int) -> Routes:
  """Sorts choices by expert, stably, for the `count` experts from `first` on; the others come last."""
  local_M = ids_TX.reshape(-1) - first
  here_M = (local_M >= 0) & (local_M < count)
  local_M = jnp.where(here_M, local_M, count)
  choice_M = jnp.argsort(local_M, stable=True)
  row_M = jnp.arange(len(local_M), dtype=choice_M.dtype)
  # Turned round by writing and not by a second sort: a permutation has no two writes to one place.
  place_M = jnp.zeros_like(choice_M).at[choice_M].set(row_M, mode='promise_in_bounds', unique_indices=True)
  sizes_E = (local_M[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
  return Routes(jnp.where(here_M, place_M, len(local_M)).reshape(ids_TX.shape), choice_M, sizes_E)


def _copies(x_TD, routes: Routes):
  """On a GPU two 16-bit numbers travel as one word: XLA's gather moves four elements a thread, whatever their size."""
  pairs = x_TD.dtype.itemsize == 2 and x_TD.shape[1] % 2 == 0 and dispatch.platform(x_TD) == 'gpu'
  words = jax.lax.bitcast_convert_type(x_TD.reshape(len(x_TD), -1, 2), jnp.uint32) if pairs else x_TD
  rows = words.at[routes.choice_M // routes.place_TX.shape[1]].get(mode='promise_in_bounds')
  return jax.lax.bitcast_convert_type(rows, x_TD.dtype).reshape(len(rows), -1) if pairs else rows


def _pick(y_M, place):
  """The rows at `place`, 0 for those that are elsewhere. Selected, for what is past the groups may be NaN."""
  rows = len(y_M)
  y = y_M.at[jnp.minimum(place, rows - 1)].get(mode='promise_in_bounds')
  return jnp.where((place < rows).reshape(place.shape + (1,) * (y_M.ndim - 1)), y, 0)


def _sums(y_MD, routes: Routes):
  """One gather for each choice and not one of [T, X, D]: compilers then write sums only. In a fixed order, float32."""
  total_TD = 0
  for x in range(routes.place_TX.shape[1]):
    total_TD += _pick(y_MD, routes.place_TX[:, x]).astype(jnp.float32)
  return total_TD.astype(y_MD.dtype)


@jax.custom_vjp
def spread(x_TD, routes: Routes):
  """Each token's row at the places of its choices, [M, D]."""
  return _copies(x_TD, routes)


@jax.custom_vjp
def collect(y_MD, routes: Routes):
  """Of each token, the sum of the rows of its choices that are here, [T, D]."""
  return _sums(y_MD, routes)


spread.defvjp(lambda x_TD, routes: (_copies(x_TD, routes), routes),
              lambda routes, g_MD: (collect(g_MD, routes), None))
collect.defvjp(lambda y_MD, routes: (_sums(y_MD, routes), routes),
               lambda routes, g_TD: (spread(g_TD, routes), None))


def weights_of_rows(weights_TX, routes: Routes):
  return weights_TX.reshape(-1).at[routes.choice_M].get(mode='promise_in_bounds')


@jax.custom_vjp
def project(h_M2F, weights_TX, wo_EFD, routes: Routes):
  """The rows' results from gate and up, times their routing weights."""
  return _down(swiglu(h_M2F, weights_of_rows(weights_TX, routes)), wo_EFD, routes)


def _down(activated_MF, wo_EFD, routes):
  return grouped_matmul(activated_MF, wo_EFD, routes.sizes_E, zero_tail=False)


def _project_backward(saved, dy_MD):
  h_M2F, weights_TX, wo_EFD, routes = saved
  # Where gradients are taken does not matter to those of the left operand, so the gate stands in for the activations,
  # which are computed again together with their own gradients.
  gate_MF = h_M2F[:, :wo_EFD.shape[1]]
  (dactivated_MF,) = jax.vjp(lambda a_MF: _down(a_MF, wo_EFD, routes), gate_MF)[1](dy_MD)
  activated_MF, dh_M2F, dweights_M = swiglu_gradients(h_M2F, weights_of_rows(weights_TX, routes), dactivated_MF)
  (dwo_EFD,) = jax.vjp(lambda wo_EFD: _down(activated_MF, wo_EFD, routes), wo_EFD)[1](dy_MD)
  return dh_M2F, _pick(dweights_M, routes.place_TX).astype(weights_TX.dtype), dwo_EFD, None


project.defvjp(lambda *operands: (project(*operands), operands), _project_backward)


def experts(x_TD, ids_TX, weights_TX, wi_ED2F, wo_EFD, first):
  """The weighted sum of the chosen experts among `first` .. first + E - 1; others contribute nothing."""
  with jax.named_scope('moe/sort'):
    routes = sort(ids_TX, first, wi_ED2F.shape[0])
    sizes_E, (wi_ED2F, wo_EFD) = chosen(routes.sizes_E, ids_TX.size, wi_ED2F, wo_EFD)
  # Before any custom gradient, so that weights held by several devices get their gradients summed.
  x_TD, weights_TX, wi_ED2F, wo_EFD, *routes = dispatch.align_varying(x_TD, weights_TX, wi_ED2F, wo_EFD,
                                                                      *routes._replace(sizes_E=sizes_E))
  routes = Routes(*routes)
  with jax.named_scope('moe/spread'):
    rows_MD = spread(x_TD, routes)
  with jax.named_scope('moe/experts'):
    h_M2F = grouped_matmul(rows_MD, wi_ED2F.reshape(*wi_ED2F.shape[:2], -1), routes.sizes_E, zero_tail=False)
    y_MD = project(h_M2F, weights_TX, wo_EFD, routes)
  with jax.named_scope('moe/collect'):
    return collect(y_MD, routes)

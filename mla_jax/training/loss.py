"""Losses as sums over a micro-batch, to be divided by counts of the whole global batch: that way gradient
accumulation and data parallelism give the loss and gradient of one large batch, whatever the padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.config import ModelConfig
from mla_jax.model.moe import Balance
from mla_jax.model.transformer import Transformer


class Counts(NamedTuple):
  """Of the global batch: predictions of the main model and of each MTP module (at least 1 each), and sequences."""

  main: jax.Array
  mtp: tuple[jax.Array, ...]
  sequences: int


class Sums(NamedTuple):
  """Nats summed over predictions (main, each MTP module), balance over sequences and layers, loads per router."""

  main: jax.Array
  mtp: tuple[jax.Array, ...]
  balance: jax.Array
  load_LE: jax.Array


def ahead(x_BU, distance: int, length: int):
  """x_BU[:, i + distance] for i < length, zero past the end."""
  x_BU = jnp.pad(x_BU, ((0, 0), (0, max(0, distance + length - x_BU.shape[1]))))
  return x_BU[:, distance:distance + length]


def predicted(segments_BU, distance: int):
  """Where position i may be asked for token i + distance: both in one document (segment 0 is padding)."""
  length = segments_BU.shape[1] - 1
  now_BT = segments_BU[:, :length]
  return (now_BT > 0) & (ahead(segments_BU, distance, length) == now_BT)


def counts(segments_BU, depth: int) -> Counts:
  def count(distance):
    return jnp.maximum(predicted(segments_BU, distance).sum(dtype=jnp.float32), 1)
  return Counts(count(1), tuple(count(d + 1) for d in range(1, depth + 1)), segments_BU.shape[0])


def cross_entropy(logits_BTW, targets_BT, mask_BT):
  """Nats, summed where the mask holds."""
  chosen_BT = jnp.take_along_axis(logits_BTW, targets_BT[..., None], axis=-1)[..., 0]
  return jnp.where(mask_BT, jax.nn.logsumexp(logits_BTW, axis=-1) - chosen_BT, 0).sum()


def layout(batch: dict, mask_documents: bool):
  """Positions and segments for attention: documents apart, or each row as one text (V3's pre-training)."""
  positions_BT, segments_BT = batch['positions'][:, :-1], batch['segments'][:, :-1]
  if mask_documents:
    return positions_BT, segments_BT
  return jnp.broadcast_to(jnp.arange(positions_BT.shape[1]), positions_BT.shape), jnp.minimum(segments_BT, 1)


def sums(model: Transformer, batch: dict, *, mask_documents: bool, remat: str, unroll: bool) -> Sums:
  """`batch`: int32 tokens, segments, positions, each [B, T + 1]."""
  config: ModelConfig = model.config
  tokens_BU, segments_BU = batch['tokens'], batch['segments']
  length = tokens_BU.shape[1] - 1
  positions_BT, segments_BT = layout(batch, mask_documents)
  hidden_BTD, seen = model.hidden(tokens_BU[:, :-1], positions_BT, segments_BT, remat, unroll)
  main = cross_entropy(model.logits(hidden_BTD), tokens_BU[:, 1:], predicted(segments_BU, 1))
  mtp, seen = [], [] if seen is None else [seen]
  for depth in range(1, config.num_nextn_predict_layers + 1):
    with jax.named_scope(f'mtp_{depth}'):
      hidden_BTD, mtp_seen = model.mtp_hidden(depth, hidden_BTD, ahead(tokens_BU, depth, length), positions_BT,
                                              segments_BT, predicted(segments_BU, depth), remat)
      mtp.append(cross_entropy(model.logits(hidden_BTD), ahead(tokens_BU, depth + 1, length),
                               predicted(segments_BU, depth + 1)))
      seen += [] if mtp_seen is None else [jax.tree.map(lambda x: x[None], mtp_seen)]
  if not seen:
    return Sums(main, tuple(mtp), jnp.zeros(()), jnp.zeros((0, 0)))
  seen = Balance(*map(jnp.concatenate, zip(*seen, strict=True)))
  return Sums(main, tuple(mtp), seen.loss.sum(), seen.load_E)


def total(s: Sums, n: Counts, mtp_weight, alpha: float):
  """(loss, its parts): L = main + mtp_weight / depth * sum of the MTP losses + alpha * balance."""
  main_loss = s.main / n.main
  mtp_loss = sum((x / c for x, c in zip(s.mtp, n.mtp, strict=True)), jnp.zeros(())) / max(len(s.mtp), 1)
  balance_loss = alpha * s.balance / n.sequences
  return main_loss + mtp_weight * mtp_loss + balance_loss, dict(
      main_loss=main_loss, mtp_loss=mtp_loss, balance_loss=balance_loss)

"""One training step and one evaluation step, each a jitted pure function."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mla_jax.axes import shard
from mla_jax.config import Config
from mla_jax.model.fp8 import check_trainable
from mla_jax.model.layers import cast
from mla_jax.model.moe import rebalance
from mla_jax.model.transformer import abstract
from mla_jax.training import loss
from mla_jax.training.state import TrainState


class Controls(NamedTuple):
  """What the schedules set for a step, float32 scalars."""

  learning_rate: float
  mtp_loss_weight: float
  bias_update_speed: float


def train_step(config: Config, optimizer: optax.GradientTransformation):
  """step(state, batch, controls) -> (state, metrics); the state is donated. A step whose gradient is not finite
  changes nothing and is counted."""
  graph, model = abstract(config.model).graph, config.model
  micro_batches, dtype = config.training.gradient_accumulation, jnp.dtype(config.training.compute_dtype)

  def micro_loss(params, buffers, batch, counts, mtp_weight):
    sums = loss.sums(nnx.merge(graph, cast(params, dtype), buffers), batch,
                     mask_documents=config.data.mask_documents, remat=config.training.remat,
                     unroll=config.training.unroll_layers)
    value, _ = loss.total(sums, counts, mtp_weight, model.aux_loss_alpha)
    return value, sums

  def gradients(state, batch, counts, mtp_weight):
    gradient = jax.grad(micro_loss, has_aux=True)
    if micro_batches == 1:
      return gradient(state.params, state.buffers, batch, counts, mtp_weight)

    def body(total, micro_batch):
      return jax.tree.map(jnp.add, total, gradient(state.params, state.buffers, micro_batch, counts, mtp_weight)), None

    # Rows are dealt out in turn, so that every device has its share of each micro-batch where the rows already lie.
    parts = jax.tree.map(
        lambda x: shard(x.reshape(-1, micro_batches, x.shape[-1]).swapaxes(0, 1), 'ABU'), batch)
    shapes = jax.eval_shape(gradient, state.params, state.buffers, jax.tree.map(lambda x: x[0], parts), counts,
                            mtp_weight)
    return jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts)[0]

  def step(state: TrainState, batch: dict, controls: Controls):
    check_trainable(state.params)
    batch = jax.tree.map(lambda x: shard(x, 'BU'), batch)
    counts = loss.counts(batch['segments'], model.num_nextn_predict_layers)
    grads, sums = gradients(state, batch, counts, controls.mtp_loss_weight)
    value, parts = loss.total(sums, counts, controls.mtp_loss_weight, model.aux_loss_alpha)
    with jax.named_scope('optimizer'):
      norm = optax.tree.norm(grads)
      finite = jnp.isfinite(norm)
      updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
      params = jax.tree.map(lambda w, u: w - controls.learning_rate * u, state.params, updates)
      buffers = state.buffers
      if model.uses_selection_bias:
        buffers = dict(bias_LE=rebalance(buffers['bias_LE'], sums.load_LE, controls.bias_update_speed))
      new = (params, buffers, optimizer_state)
      old = (state.params, state.buffers, state.optimizer)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    state = TrainState(*new, state.skipped + ~finite)
    return state, dict(loss=value, **parts, grad_norm=norm, load_LE=sums.load_LE, skipped_steps=state.skipped)

  return jax.jit(step, donate_argnums=0)


def eval_step(config: Config):
  """step(params, buffers, batch) -> sums over the batch: nats, predictions, agreements of the first MTP module's
  argmax with the main model's one position later, and how many were compared."""
  graph, dtype = abstract(config.model).graph, jnp.dtype(config.training.compute_dtype)

  def step(params, buffers, batch):
    model = nnx.merge(graph, cast(params, dtype), buffers)
    tokens_BU, segments_BU = batch['tokens'], batch['segments']
    length = tokens_BU.shape[1] - 1
    positions_BT, segments_BT = loss.layout(batch, config.data.mask_documents)
    hidden_BTD, _ = model.hidden(tokens_BU[:, :-1], positions_BT, segments_BT)
    logits_BTW = model.logits(hidden_BTD)
    mask_BT = loss.predicted(segments_BU, 1)
    out = dict(nats=loss.cross_entropy(logits_BTW, tokens_BU[:, 1:], mask_BT), predictions=mask_BT.sum())
    if config.model.num_nextn_predict_layers:
      draft_BTD, _ = model.mtp_hidden(1, hidden_BTD, tokens_BU[:, 1:], positions_BT, segments_BT, mask_BT)
      # Module 1 at i and the main model at i + 1 both predict token i + 2.
      compared_BT = loss.predicted(segments_BU, 2)[:, :length - 1]
      same_BT = model.logits(draft_BTD).argmax(-1)[:, :-1] == logits_BTW.argmax(-1)[:, 1:]
      out |= dict(agreed=(same_BT & compared_BT).sum(), compared=compared_BT.sum())
    return out

  return jax.jit(step)

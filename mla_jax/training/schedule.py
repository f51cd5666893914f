"""What changes over a run, as plain functions of the tokens seen (host arithmetic: 14.8T tokens overflow int32)."""

import bisect
import dataclasses
import math

from mla_jax.config import OptimizerConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Stage:
  """A run of steps with one batch size."""

  first_step: int
  batch_size: int
  tokens_before: int


class BatchSchedule:
  """Batch size and tokens seen, by step. The ramp climbs from `batch_ramp_start` by `batch_ramp_increment` sequences
  in stages of about equal tokens; a stage ends on a whole step."""

  def __init__(self, training: TrainingConfig):
    t = training
    self.sequence_length = t.sequence_length
    sizes = list(range(t.batch_ramp_start, t.batch_size, t.batch_ramp_increment)) if t.batch_ramp_start else []
    self.stages, step, tokens = [], 0, 0
    for size in sizes:
      self.stages.append(Stage(step, size, tokens))
      steps = max(1, round(t.batch_ramp_tokens / len(sizes) / (size * t.sequence_length)))
      step, tokens = step + steps, tokens + steps * size * t.sequence_length
    self.stages.append(Stage(step, t.batch_size, tokens))

  def _stage(self, step: int) -> Stage:
    return self.stages[bisect.bisect_right([s.first_step for s in self.stages], step) - 1]

  def batch_size(self, step: int) -> int:
    return self._stage(step).batch_size

  def tokens_before(self, step: int) -> int:
    stage = self._stage(step)
    return stage.tokens_before + (step - stage.first_step) * stage.batch_size * self.sequence_length


def learning_rate(tokens: int, o: OptimizerConfig) -> float:
  """Warm-up, constant, cosine, constant, last constant (V3 report, section 4.2); times V2's step decays."""
  if o.final_from_tokens and tokens > o.final_from_tokens:
    return o.final_learning_rate
  rate = o.learning_rate
  start = max(o.warmup_tokens, o.constant_until_tokens)
  if tokens < o.warmup_tokens:
    rate *= tokens / o.warmup_tokens
  elif o.cosine_until_tokens and tokens > start:
    done = min((tokens - start) / (o.cosine_until_tokens - start), 1.0)
    rate = o.end_learning_rate + (rate - o.end_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))
  return rate * o.step_decay_factor ** sum(tokens > at for at in o.step_decay_at_tokens)


def mtp_loss_weight(tokens: int, t: TrainingConfig) -> float:
  late = t.mtp_loss_switch_tokens and tokens > t.mtp_loss_switch_tokens
  return t.mtp_loss_weight_after if late else t.mtp_loss_weight


def bias_update_speed(tokens: int, t: TrainingConfig) -> float:
  return 0.0 if t.bias_freeze_tokens and tokens > t.bias_freeze_tokens else t.bias_update_speed

import pytest

from mla_jax.config import OptimizerConfig, TrainingConfig
from mla_jax.training.schedule import BatchSchedule, bias_update_speed, learning_rate, mtp_loss_weight

V3 = OptimizerConfig(learning_rate=2.2e-4, warmup_tokens=100, constant_until_tokens=1000, cosine_until_tokens=1430,
                     end_learning_rate=2.2e-5, final_from_tokens=1763, final_learning_rate=7.3e-6)


@pytest.mark.parametrize(('tokens', 'rate'), [
    (0, 0), (50, 1.1e-4), (100, 2.2e-4), (1000, 2.2e-4), (1215, 1.21e-4), (1430, 2.2e-5), (1763, 2.2e-5),
    (1764, 7.3e-6)])
def test_v3_learning_rate(tokens, rate):
  assert learning_rate(tokens, V3) == pytest.approx(rate)


def test_v2_step_decay():
  o = OptimizerConfig(learning_rate=1.0, step_decay_at_tokens=(60, 90), step_decay_factor=0.316)
  assert [learning_rate(t, o) for t in (60, 61, 91)] == pytest.approx([1.0, 0.316, 0.316**2])


def test_batch_ramp_counts_every_token():
  t = TrainingConfig(batch_size=16, sequence_length=10, batch_ramp_start=4, batch_ramp_increment=4,
                     batch_ramp_tokens=1200)
  plan = BatchSchedule(t)
  sizes = [plan.batch_size(step) for step in range(40)]
  assert sorted(set(sizes)) == [4, 8, 12, 16]
  assert sizes == sorted(sizes)
  for step in range(41):
    assert plan.tokens_before(step) == 10 * sum(sizes[:step])
  ramp = plan.tokens_before(sizes.index(16))
  assert abs(ramp - 1200) <= 3 * 12 * 10 / 2


def test_no_ramp():
  plan = BatchSchedule(TrainingConfig(batch_size=3, sequence_length=7))
  assert (plan.batch_size(0), plan.batch_size(99), plan.tokens_before(5)) == (3, 3, 105)


def test_switches():
  t = TrainingConfig(mtp_loss_weight=0.3, mtp_loss_switch_tokens=10, mtp_loss_weight_after=0.1,
                     bias_update_speed=1e-3, bias_freeze_tokens=20)
  assert [mtp_loss_weight(n, t) for n in (10, 11)] == [0.3, 0.1]
  assert [bias_update_speed(n, t) for n in (20, 21)] == [1e-3, 0.0]

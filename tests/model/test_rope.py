"""RoPE and YaRN against independent NumPy."""

import math

import jax.numpy as jnp
import mtp_oracle
import numpy as np
import pytest
from model_cases import config

from mla_jax.config import RopeScaling
from mla_jax.model.rope import inverse_frequencies, rotate, rotation

PUBLISHED = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)


def test_plain_frequencies():
  np.testing.assert_allclose(inverse_frequencies(8, 10000.0, RopeScaling()), [1, 0.1, 0.01, 0.001], rtol=1e-12)


@pytest.mark.parametrize(('width', 'theta', 'scaling'), [
    (64, 10000.0, PUBLISHED),
    (64, 500000.0, RopeScaling(factor=8.0, original_max_position_embeddings=8192, beta_fast=16.0, beta_slow=2.0)),
    (8, 100.0, RopeScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.25)),
])
def test_yarn_frequencies(width, theta, scaling):
  plain = [theta ** (-2 * i / width) for i in range(width // 2)]
  expected = mtp_oracle.yarn_frequencies(plain, theta, vars(scaling))
  ours = inverse_frequencies(width, theta, scaling)
  np.testing.assert_allclose(ours, expected, rtol=1e-12)
  stretched = np.array(plain) / ours
  assert stretched[0] == pytest.approx(1)  # the fastest pair is kept
  assert stretched[-1] == pytest.approx(scaling.factor)  # the slowest turns `factor` times slower
  assert (np.diff(stretched) >= -1e-9).all()


def test_published_yarn_blends_pairs_10_to_23():
  """64 wide, theta 10000, 4096 positions, 32 and 1 turns: the ramp runs over these pairs."""
  ratio = inverse_frequencies(64, 10000.0, RopeScaling()) / inverse_frequencies(64, 10000.0, PUBLISHED)
  assert (ratio[:11] == 1).all()
  assert ((ratio[11:23] > 1) & (ratio[11:23] < 40)).all()
  np.testing.assert_allclose(ratio[23:], 40, rtol=1e-12)


@pytest.mark.parametrize(('mscale', 'scale'), [(0.707, 0.1147), (1.0, 0.1352)])
def test_published_softmax_scales(mscale, scale):
  made = config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=RopeScaling(
      factor=40.0, mscale=mscale, mscale_all_dim=mscale))
  assert made.softmax_scale == pytest.approx(scale, abs=5e-5)
  assert config(qk_nope_head_dim=128, qk_rope_head_dim=64).softmax_scale == pytest.approx(192**-0.5)


def test_magnitude_is_the_ratio_of_both_factors():
  scaling = RopeScaling(factor=40.0, original_max_position_embeddings=16, mscale=1.2, mscale_all_dim=0.6)
  cos, sin = rotation(jnp.arange(6)[None], 8, 10000.0, scaling)
  expected = (1 + 0.12 * math.log(40)) / (1 + 0.06 * math.log(40))
  np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-5)


def test_rotation_turns_pairs_of_halves_and_scores_see_distance_alone():
  random = np.random.default_rng(0)
  x_BTR = random.standard_normal((1, 40, 8)).astype(np.float32)
  positions_BT = np.arange(40)[None]
  turned = np.asarray(rotate(jnp.asarray(x_BTR), rotation(positions_BT, 8, 10000.0, RopeScaling())))
  pairs = x_BTR[..., :4] + 1j * x_BTR[..., 4:]
  angle = positions_BT[..., None] * 10000.0 ** (-np.arange(4) / 4)
  expected = pairs * np.exp(1j * angle)
  np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)
  # Heads turn alike, and moving every position by the same amount changes no score.
  x_BTNR = np.stack([x_BTR, x_BTR], axis=2)
  np.testing.assert_array_equal(rotate(jnp.asarray(x_BTNR), rotation(positions_BT, 8, 10000.0, RopeScaling()))[:, :, 1],
                                turned)
  moved = np.asarray(rotate(jnp.asarray(x_BTR), rotation(positions_BT + 100, 8, 10000.0, RopeScaling())))
  np.testing.assert_allclose(moved[0] @ moved[0].T, turned[0] @ turned[0].T, atol=1e-3)


def test_angles_are_float32_whatever_the_input():
  """In bfloat16, position 40001 would be 40000."""
  scaling = RopeScaling()
  x_BTR = jnp.ones((1, 2, 8), jnp.bfloat16)
  positions_BT = jnp.array([[40000, 40001]])
  assert rotate(x_BTR, rotation(positions_BT, 8, 10000.0, scaling)).dtype == jnp.bfloat16
  cos, _ = rotation(positions_BT, 8, 10000.0, scaling)
  np.testing.assert_allclose(cos[0, :, 0], np.cos([40000.0, 40001.0]), atol=1e-4)

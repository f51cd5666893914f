"""Configs: parameter counts of the published models, one clear line for each bad value, dictionaries there and back."""

import dataclasses
import importlib
import json
import math

import pytest
from model_cases import EXPERTS, TINY

from mla_jax.config import Config, ConfigError, MeshConfig, ModelConfig, RopeScaling, from_dict, leaf_keys, to_dict
from mla_jax.model.transformer import count_parameters


def published(name) -> ModelConfig:
  return importlib.import_module(f'configs.{name}').model()


@pytest.mark.parametrize(('name', 'depth', 'billions'), [
    ('deepseek_v2_lite', 0, 15.706), ('deepseek_v2', 0, 235.741), ('deepseek_v3', 0, 671.026),
    ('deepseek_v3', 1, 682.64)])
def test_published_parameter_counts(name, depth, billions):
  model = dataclasses.replace(published(name), num_nextn_predict_layers=depth)
  assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=6e-3)


def test_count_by_hand():
  """A sum over the layers, written out."""
  c = dataclasses.replace(TINY, **EXPERTS, q_lora_rank=16, num_nextn_predict_layers=1)
  attention = 32 * 16 + 16 + 16 * 4 * 16 + 32 * (12 + 6) + 12 + 12 * 4 * (10 + 8) + 4 * 8 * 32
  dense, experts = 3 * 32 * 24, 8 * 3 * 32 * 12 + 3 * 32 * 12 + 32 * 8 + 8
  layers = 2 * (attention + 2 * 32) + dense + experts
  module = attention + 2 * 32 + experts + 3 * 32 + 64 * 32
  assert count_parameters(c) == 2 * 23 * 32 + 32 + layers + module
  assert count_parameters(dataclasses.replace(c, tie_word_embeddings=True)) == count_parameters(c) - 23 * 32


@pytest.mark.parametrize('name', ['tiny', 'deepseek_v2_lite', 'deepseek_v2', 'deepseek_v3'])
def test_configs_are_valid_and_survive_json(name):
  made = importlib.import_module(f'configs.{name}').get_config()
  made.validate()
  assert from_dict(Config, json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize(('values', 'line'), [
    ({'modle': {}}, 'modle is no setting; did you mean model?'),
    ({'model': {'hiden_size': 3}}, 'model.hiden_size is no setting; did you mean model.hidden_size'),
    ({'model': {'rope_scaling': {'mscale_all': 1}}}, 'did you mean model.rope_scaling.mscale_all_dim'),
    ({'training': 1}, 'training=1 is no JSON object'),
    ([], 'config=[] is no JSON object'),
    ({'zzz': 1}, 'zzz is no setting; the keys here are data, mesh, model'),
])
def test_what_is_no_config_is_one_clear_line(values, line):
  with pytest.raises(ConfigError) as error:
    from_dict(Config, values)
  assert line in str(error.value)
  assert '\n' not in str(error.value)


MOE = dict(EXPERTS)
BAD_MODELS = [
    (dict(vocab_size=1), 'vocab_size=1 is below 2'),
    (dict(hidden_size=0), 'hidden_size=0'),
    (dict(num_hidden_layers=0), 'num_hidden_layers=0'),
    (dict(num_attention_heads=0), 'num_attention_heads=0'),
    (dict(max_position_embeddings=0), 'max_position_embeddings=0'),
    (dict(intermediate_size=0), 'intermediate_size=0'),
    (dict(first_k_dense_replace=-1), 'first_k_dense_replace=-1'),
    (dict(q_lora_rank=-1), 'q_lora_rank=-1'),
    (dict(num_nextn_predict_layers=-1), 'num_nextn_predict_layers=-1'),
    (dict(aux_loss_alpha=-0.1), 'aux_loss_alpha=-0.1'),
    (dict(initializer_range=-0.1), 'initializer_range=-0.1'),
    (dict(rms_norm_eps=0.0), 'rms_norm_eps=0.0 is not positive'),
    (dict(rope_theta=0), 'rope_theta=0 is not positive'),
    (dict(rope_theta=math.nan), 'rope_theta=nan is not positive'),
    (dict(attention='mlp'), "attention='mlp' is unknown; use one of 'mla'"),
    (dict(kv_lora_rank=0), 'kv_lora_rank=0'),
    (dict(qk_rope_head_dim=5), 'qk_rope_head_dim=5 is odd'),
    (dict(attention='mha', head_dim=7), 'head_dim=7 is odd'),
    (dict(attention='gqa', num_key_value_heads=3), 'num_key_value_heads=3 does not divide'),
    (dict(attention='gqa'), 'num_key_value_heads=0'),
    (dict(attention='mha', rope_scaling=RopeScaling(factor=2.0)), 'rope_scaling.factor=2.0'),
    (dict(rope_scaling=RopeScaling(factor=0.5)), 'rope_scaling.factor=0.5 is below 1'),
    (MOE | dict(topk_method='best'), "topk_method='best' is unknown"),
    (MOE | dict(scoring_func='relu'), "scoring_func='relu' is unknown"),
    (MOE | dict(n_routed_experts=6), 'n_routed_experts=6 is not divisible by n_group=4'),
    (MOE | dict(topk_group=5), 'topk_group=5 is above n_group=4'),
    (MOE | dict(num_experts_per_tok=5), 'num_experts_per_tok=5 is above the 4 experts a token can reach'),
    (MOE | dict(num_experts_per_tok=0), 'num_experts_per_tok=0'),
    (MOE | dict(moe_intermediate_size=0), 'moe_intermediate_size=0'),
    (MOE | dict(n_group=8), 'n_group=8 leaves one expert a group'),
]


@pytest.mark.parametrize(('changes', 'line'), BAD_MODELS, ids=[line for _, line in BAD_MODELS])
def test_bad_models_are_one_clear_line(changes, line):
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(TINY, **changes).validate()
  message = str(error.value)
  assert line in message
  assert 'use ' in message  # the way out
  assert '\n' not in message


BAD_RUNS = [
    ('training.steps', 0, 'training.steps=0 is below 1'),
    ('training.batch_size', 0, 'training.batch_size=0'),
    ('training.sequence_length', 1, 'training.sequence_length=1'),
    ('training.sequence_length', 8192, "above the model's max_position_embeddings=4096"),
    ('training.gradient_accumulation', 3, 'is not divisible by gradient_accumulation=3'),
    ('training.compute_dtype', 'float8', "compute_dtype='float8' is unknown"),
    ('training.remat', 'some', "remat='some' is unknown"),
    ('training.batch_ramp_start', 4, 'batch_ramp_increment=0'),
    ('optimizer.learning_rate', 0.0, 'learning_rate=0.0 is not positive'),
    ('optimizer.beta2', 1.0, 'beta2=1.0 is outside [0, 1)'),
    ('optimizer.clip_norm', 0.0, 'clip_norm=0.0'),
    ('optimizer.epsilon', 0.0, 'epsilon=0.0 is not positive'),
    ('optimizer.step_decay_factor', -0.5, 'step_decay_factor=-0.5 is below 0'),
    ('optimizer.step_decay_at_tokens', (-5, 'a'), "step_decay_at_tokens=(-5, 'a') are no numbers of tokens"),
    ('optimizer.learning_rate', math.inf, 'learning_rate=inf is not finite'),
    ('model.routed_scaling_factor', math.nan, 'routed_scaling_factor=nan is not finite'),
    ('training.mtp_loss_switch_tokens', -1, 'mtp_loss_switch_tokens=-1 is below 0'),
    ('training.bias_freeze_tokens', -1, 'bias_freeze_tokens=-1 is below 0'),
    ('optimizer.weight_decay', -1.0, 'weight_decay=-1.0'),
    ('optimizer.moment_dtype', 'int8', "moment_dtype='int8'"),
    ('data.source', 'web', "data.source='web' is unknown"),
    ('data.source', 'text', 'data.path is empty'),
    ('data.held_out_fraction', 1.0, 'held_out_fraction=1.0 is outside [0, 1)'),
    ('data.fim_rate', 2.0, 'fim_rate=2.0 is outside [0, 1]'),
    ('mesh.data', 0, 'mesh.data=0 is no size'),
    ('mesh.tensor', 2, 'mesh.tensor=2 is not supported yet'),
    ('mesh.fsdp', -1, 'several axes of size -1'),
    ('mesh.expert', 2, 'mesh.expert=2, but the model has no routed experts'),
]


@pytest.mark.parametrize(('key', 'value', 'line'), BAD_RUNS)
def test_bad_runs_are_one_clear_line(key, value, line):
  made = Config()
  section, name = key.split('.')
  assert key in leaf_keys(made)
  setattr(getattr(made, section), name, value)
  with pytest.raises(ConfigError) as error:
    made.validate()
  assert line in str(error.value)
  assert '\n' not in str(error.value)


def test_experts_that_do_not_divide_name_the_next_that_do():
  with pytest.raises(ConfigError, match='n_routed_experts=60 is not divisible by mesh axis expert=8; use 56 or 64'):
    MeshConfig(expert=8).validate(ModelConfig(n_routed_experts=60))

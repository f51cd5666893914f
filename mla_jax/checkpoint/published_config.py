"""config.json of DeepSeek-V2 and -V3 directories: to our ModelConfig and back."""

import dataclasses

from mla_jax.checkpoint.tensor_files import HFError
from mla_jax.config import ModelConfig, RopeScaling

# Read as they are; those of the second line only where there are experts.
REQUIRED = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings',
            'intermediate_size', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
REQUIRED_OF_EXPERTS = ('num_experts_per_tok', 'moe_intermediate_size', 'first_k_dense_replace')
# Absent or null in some files; what the field then means.
OPTIONAL = {'q_lora_rank': 0, 'n_routed_experts': 0, 'n_shared_experts': 0, 'n_group': 1, 'topk_group': 1,
            'routed_scaling_factor': 1.0, 'num_nextn_predict_layers': 0, 'tie_word_embeddings': False,
            'rms_norm_eps': 1e-6, 'initializer_range': 0.02, 'aux_loss_alpha': ModelConfig.aux_loss_alpha}
ROUTERS = {'deepseek_v2': {'topk_method': 'greedy', 'scoring_func': 'softmax', 'norm_topk_prob': False},
           'deepseek_v3': {'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'norm_topk_prob': True}}
ARCHITECTURES = {'deepseek_v2': 'DeepseekV2ForCausalLM', 'deepseek_v3': 'DeepseekV3ForCausalLM'}
# Variants that the model does not have.
ONLY = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'moe_layer_freq': 1, 'rope_interleave': True}


def config_from_hf(values: dict) -> ModelConfig:
  """The ModelConfig of a parsed config.json, in the spelling of old files (rope_scaling, rope_theta) or of transformers
  5 (rope_parameters). Raises HFError for another kind of model, ConfigError for values no model can have."""
  kind = values.get('model_type')
  if kind not in ROUTERS:
    raise HFError(f'config.json: model_type={kind!r} is unknown; use one of {", ".join(map(repr, ROUTERS))}')
  for key, only in ONLY.items():
    if values.get(key) not in (None, only):
      raise HFError(f'config.json: {key}={values[key]!r} is not supported; only {only!r} is')
  given = {key: value for key, value in values.items() if value is not None}
  fields = {key: given.get(key, default) for key, default in (OPTIONAL | ROUTERS[kind]).items()}
  required = REQUIRED + (REQUIRED_OF_EXPERTS if fields['n_routed_experts'] else ())
  absent = [key for key in required if key not in given]
  if absent:
    raise HFError(f'config.json lacks {", ".join(absent)}')
  fields |= {key: given[key] for key in required}
  theta, scaling = _rope(given)
  kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
  for key, value in (fields | {'rope_theta': theta}).items():
    allowed = (float, int) if kinds[key] is float else kinds[key]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[key] is not bool):
      raise HFError(f'config.json: {key}={value!r} is no {kinds[key].__name__}')
  config = ModelConfig(attention='mla', rope_theta=theta, rope_scaling=scaling, **fields)
  config.validate()
  return config


def _rope(values: dict) -> tuple[float, RopeScaling]:
  rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
  if not isinstance(rope, dict):
    raise HFError(f'config.json: rope scaling {rope!r} is no JSON object')
  theta = rope.get('rope_theta', values.get('rope_theta', 10000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return theta, RopeScaling()
  if kind != 'yarn' or rope.get('attention_factor') is not None or rope.get('truncate') is False:
    raise HFError(f"config.json: rope scaling {rope} is not supported; only type 'yarn' without attention_factor and "
                  'truncate=false is')
  if 'factor' not in rope:
    raise HFError(f'config.json: rope scaling {rope} lacks factor')
  # Without mscale_all_dim the softmax keeps its scale: m(0) = 1.
  fields = [field.name for field in dataclasses.fields(RopeScaling)]
  given = {key: rope[key] for key in fields if rope.get(key) is not None}
  defaults = {'mscale_all_dim': 0.0, 'original_max_position_embeddings': values['max_position_embeddings']}
  for key, value in given.items():
    if isinstance(value, bool) or not isinstance(value, (float, int)):
      raise HFError(f'config.json: rope scaling {key}={value!r} is no number')
  return theta, RopeScaling(**defaults | given)


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
  """config.json that says the same to old readers (rope_scaling, rope_theta, torch_dtype) and to transformers 5
  (rope_parameters, dtype), and to us. Raises HFError where neither published kind of model computes what ours does."""
  c = config
  if c.attention != 'mla':
    raise HFError(f'model.attention={c.attention!r} has no DeepSeek layout; only latent attention (mla) can be saved')
  kind = _kind(c)
  written = {key: getattr(c, key) for key in (*REQUIRED, *REQUIRED_OF_EXPERTS, *OPTIONAL, *ROUTERS[kind])}
  if not c.n_routed_experts:
    written['first_k_dense_replace'] = c.num_hidden_layers  # every reader asks for the layers from here on
  written['q_lora_rank'] = c.q_lora_rank or None
  rope = _rope_to_hf(c.rope_scaling)
  return dict(
      architectures=[ARCHITECTURES[kind]], model_type=kind, dtype=dtype, torch_dtype=dtype, attention_bias=False,
      attention_dropout=0.0, hidden_act='silu', moe_layer_freq=1, num_key_value_heads=c.num_attention_heads,
      use_cache=True, **written, rope_theta=c.rope_theta,
      rope_scaling=rope | dict(type='yarn') if c.rope_scaling.enabled else None,
      rope_parameters=rope | dict(rope_theta=c.rope_theta))


def _rope_to_hf(scaling: RopeScaling) -> dict:
  if not scaling.enabled:
    return dict(rope_type='default')
  rope = dict(rope_type='yarn') | dataclasses.asdict(scaling)
  if not (scaling.mscale and scaling.mscale_all_dim):
    # Readers take one factor without the other, or a 0, each in a way of its own; without both all compute m(1), 0.
    if (scaling.mscale, scaling.mscale_all_dim) != (1, 0):
      raise HFError(f'model.rope_scaling.mscale={scaling.mscale} with mscale_all_dim={scaling.mscale_all_dim} means '
                    'different things to different readers; only 1 with 0, or both above 0, can be saved')
    del rope['mscale'], rope['mscale_all_dim']
  return rope


def _kind(c: ModelConfig) -> str:
  """The published model_type that computes what this config says."""
  if not c.n_routed_experts or c.topk_method == 'noaux_tc':
    fixed, kind = ({} if not c.n_routed_experts else dict(scoring_func='sigmoid')), 'deepseek_v3'
  else:
    fixed, kind = dict(scoring_func='softmax', norm_topk_prob=False), 'deepseek_v2'
    if c.num_nextn_predict_layers:
      raise HFError(f'model.topk_method={c.topk_method!r} is of deepseek_v2, which has no MTP layers; use noaux_tc, or '
                    'num_nextn_predict_layers=0')
  for key, value in fixed.items():
    if getattr(c, key) != value:
      raise HFError(f'model.{key}={getattr(c, key)!r} with topk_method={c.topk_method!r} is no published model: '
                    f'{kind} has {value!r}')
  return kind

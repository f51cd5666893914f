"""config.json of published models: to our ModelConfig and back. DeepSeek-V2 and -V3; Llama, Qwen2 and Mistral, which
are our grouped-query attention with dense layers; and 'mla_jax', a DeepSeek-V3 with what only this project has (no norm
on the latent, attention biases, a rope width with repeated frequencies), under a name that makes others refuse it.
"""

import dataclasses
import logging
import math

from mla_jax.checkpoint.block_fp8 import BLOCK
from mla_jax.checkpoint.tensor_files import HFError
from mla_jax.config import ModelConfig, RopeScaling

log = logging.getLogger(__name__)

# Read as they are; those of the second line only where there are experts.
REQUIRED = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings',
            'intermediate_size', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
REQUIRED_OF_EXPERTS = ('num_experts_per_tok', 'moe_intermediate_size', 'first_k_dense_replace')
# Absent or null in some files; what the field then means.
OPTIONAL = {'q_lora_rank': 0, 'n_routed_experts': 0, 'n_shared_experts': 0, 'n_group': 1, 'topk_group': 1,
            'routed_scaling_factor': 1.0, 'num_nextn_predict_layers': 0, 'tie_word_embeddings': False,
            'rms_norm_eps': 1e-6, 'initializer_range': 0.02, 'aux_loss_alpha': ModelConfig.aux_loss_alpha}
OURS = {'latent_norm': True, 'attention_bias': False, 'rope_repeats': 1}  # read and written for 'mla_jax' alone
ROUTERS = {'deepseek_v2': {'topk_method': 'greedy', 'scoring_func': 'softmax', 'norm_topk_prob': False},
           'deepseek_v3': {'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'norm_topk_prob': True}}
ROUTERS['mla_jax'] = ROUTERS['deepseek_v3']
GROUPED = ('llama', 'qwen2', 'mistral')
REQUIRED_OF_GROUPED = REQUIRED[:6]
ARCHITECTURES = {'deepseek_v2': 'DeepseekV2ForCausalLM', 'deepseek_v3': 'DeepseekV3ForCausalLM',
                 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
# Variants that the model does not have.
ONLY = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'moe_layer_freq': 1, 'rope_interleave': True,
        'use_sliding_window': False}


def config_from_hf(values: dict) -> ModelConfig:
  """The ModelConfig of a parsed config.json, in the spelling of old files (rope_scaling, rope_theta) or of transformers
  5 (rope_parameters). Raises HFError for another kind of model, ConfigError for values no model can have."""
  kind = values.get('model_type')
  if kind not in (*ROUTERS, *GROUPED):
    known = ', '.join(map(repr, (*ROUTERS, *GROUPED)))
    raise HFError(f'config.json: model_type={kind!r} is unknown; use one of {known}')
  given = {key: value for key, value in values.items() if value is not None}
  for key, only in ONLY.items():
    if given.get(key, only) != only and not (kind == 'mla_jax' and key in OURS):
      raise HFError(f'config.json: {key}={values[key]!r} is not supported; only {only!r} is')
  if kind in GROUPED:
    required, optional = REQUIRED_OF_GROUPED, _optional_of_grouped(kind, given)
  else:
    optional = OPTIONAL | ROUTERS[kind] | (OURS if kind == 'mla_jax' else {})
    required = REQUIRED + (REQUIRED_OF_EXPERTS if given.get('n_routed_experts') else ())
  fields = {key: given.get(key, default) for key, default in optional.items()}
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
    if isinstance(value, float) and not math.isfinite(value):
      raise HFError(f'config.json: {key}={value!r} is not finite')
  if theta <= 0:
    raise HFError(f'config.json: rope_theta={theta} is not above 0')
  config = ModelConfig(attention='gqa' if kind in GROUPED else 'mla', rope_theta=theta, rope_scaling=scaling, **fields)
  config.validate()
  return config


def _optional_of_grouped(kind: str, given: dict) -> dict:
  heads, width = given.get('num_attention_heads'), given.get('hidden_size')
  # What is no number, or missing, is said by those who read it.
  width = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else 0
  if kind == 'mistral' and given.get('sliding_window'):
    log.warning('config.json: sliding_window=%s is not kept: every position is seen', given['sliding_window'])
  return {'num_key_value_heads': heads, 'head_dim': width, 'attention_bias': kind == 'qwen2',
          **{key: OPTIONAL[key] for key in ('tie_word_embeddings', 'rms_norm_eps', 'initializer_range')}}


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
    if isinstance(value, bool) or not isinstance(value, (float, int)) or not math.isfinite(value):
      raise HFError(f'config.json: rope scaling {key}={value!r} is no number')
  return theta, RopeScaling(**defaults | given)


def fp8_block(values: dict) -> tuple[int, int] | None:
  """The size of FP8's blocks, from config.json; None: it says nothing of FP8."""
  said = values.get('quantization_config')
  if not said:
    return None
  block = said.get('weight_block_size') if isinstance(said, dict) else None
  if (not isinstance(said, dict) or said.get('quant_method') != 'fp8' or said.get('fmt', 'e4m3') != 'e4m3'
      or not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block)):
    raise HFError(f"config.json: quantization_config {said} is not supported; only quant_method 'fp8', fmt 'e4m3' with "
                  'a weight_block_size is')
  return tuple(block)


def scale_format(values: dict) -> str:
  """What config.json calls the format of FP8's scales: one of `SCALE_FORMATS`."""
  return 'ue8m0' if values['quantization_config'].get('scale_fmt') == 'ue8m0' else 'float32'


def config_to_hf(config: ModelConfig, dtype: str, fp8: str | None = None, block=BLOCK) -> dict:
  """config.json that says the same to old readers (rope_scaling, rope_theta, torch_dtype) and to transformers 5
  (rope_parameters, dtype), and to us. `fp8`: the format of the scales of a directory with FP8 in blocks of `block`.
  Raises HFError where no published kind of model computes what ours does."""
  c, kind = config, _kind(config)
  if kind in GROUPED:
    keys = (*REQUIRED_OF_GROUPED, 'tie_word_embeddings', 'rms_norm_eps', 'initializer_range')
    special = dict(num_key_value_heads=c.kv_heads, head_dim=c.qk_head_dim)
  else:
    keys = (*REQUIRED, *REQUIRED_OF_EXPERTS, *OPTIONAL, *ROUTERS[kind], *(OURS if kind == 'mla_jax' else ()))
    special = dict(num_key_value_heads=c.num_attention_heads, moe_layer_freq=1, q_lora_rank=c.q_lora_rank or None,
                   attention_bias=c.attention_bias)
    if not c.n_routed_experts:
      special['first_k_dense_replace'] = c.num_hidden_layers  # every reader asks for the layers from here on
  if fp8:
    special['quantization_config'] = dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic',
                                          weight_block_size=list(block))
    special['quantization_config'] |= dict(scale_fmt='ue8m0') if fp8 == 'ue8m0' else {}
  rope = _rope_to_hf(c.rope_scaling)
  return dict(
      model_type=kind, **(dict(architectures=[ARCHITECTURES[kind]]) if kind in ARCHITECTURES else {}), dtype=dtype,
      torch_dtype=dtype, attention_dropout=0.0, hidden_act='silu', use_cache=True,
      **{key: getattr(c, key) for key in keys} | special, rope_theta=c.rope_theta,
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
  if c.attention != 'mla':
    if c.n_routed_experts or c.num_nextn_predict_layers:
      raise HFError(f'model.attention={c.attention!r} with experts or MTP modules is no published model; only dense '
                    'layers, or latent attention (mla), can be saved')
    return 'qwen2' if c.attention_bias else 'llama'
  if any(getattr(c, key) != default for key, default in OURS.items()):
    return 'mla_jax'
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

"""Every setting of a model and a run, as dataclasses that can check themselves.

Model fields carry the names of the published config.json files, so a row of the papers' tables can be read off a
config. Two differences, because a command line can't write None: `q_lora_rank = 0` means no query compression and
`rope_scaling.factor = 1` means no YaRN.
"""

import dataclasses
import difflib
import math

ATTENTIONS = ('mla', 'gqa', 'mqa', 'mha')
TOPK_METHODS = ('greedy', 'group_limited_greedy', 'noaux_tc')
SCORING = ('softmax', 'sigmoid')
REMAT = ('none', 'full', 'dots')
DTYPES = ('float32', 'bfloat16')
SOURCES = ('stdlib', 'site-packages', 'text', 'jsonl', 'arrayrecord')


class ConfigError(ValueError):
  """A setting that can't work; its message is one line that says what to change."""


def _require(ok: bool, message: str):
  if not ok:
    raise ConfigError(message)


def _one_of(name: str, value, allowed):
  _require(value in allowed, f'{name}={value!r} is unknown; use one of {", ".join(map(repr, allowed))}')


def _at_least(section, prefix: str, **limits):
  for name, limit in limits.items():
    value = getattr(section, name)
    _require(value >= limit, f'{prefix}.{name}={value} is below {limit}; use at least {limit}')


def _positive(section, prefix: str, **examples):
  for name, example in examples.items():
    value = getattr(section, name)
    _require(value > 0, f'{prefix}.{name}={value} is not positive; use e.g. {example}')


@dataclasses.dataclass
class RopeScaling:
  """YaRN (arXiv 2309.00071) as the DeepSeek checkpoints set it. factor 1 switches it off."""

  factor: float = 1.0
  original_max_position_embeddings: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  @property
  def enabled(self) -> bool:
    return self.factor != 1.0

  def attention_factor(self, mscale: float) -> float:
    """m(a) = 1 + 0.1 a ln(factor): how much longer contexts sharpen the softmax."""
    return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass
class ModelConfig:
  """The network. Widths are numbers of features, counts are numbers of modules."""

  vocab_size: int = 264
  hidden_size: int = 256
  num_hidden_layers: int = 4
  max_position_embeddings: int = 4096
  tie_word_embeddings: bool = False
  rms_norm_eps: float = 1e-6
  initializer_range: float = 0.006

  attention: str = 'mla'  # 'mla' is the paper's; 'gqa', 'mqa' and 'mha' are what it is compared with
  num_attention_heads: int = 4
  q_lora_rank: int = 0  # 0: queries come straight from the hidden state
  kv_lora_rank: int = 64
  qk_nope_head_dim: int = 32
  qk_rope_head_dim: int = 16
  v_head_dim: int = 32
  num_key_value_heads: int = 0  # gqa only
  head_dim: int = 0  # gqa, mqa, mha: width of queries, keys and values; 0 = v_head_dim
  attention_bias: bool = False  # on queries, keys and values (mla: on the latent and the shared key)
  latent_norm: bool = True  # mla: RMSNorm on the key-value latent; without it grouped-query attention is a special case
  rope_repeats: int = 1  # mla: the rope width holds each frequency this often
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)

  intermediate_size: int = 1024
  first_k_dense_replace: int = 1
  n_routed_experts: int = 0  # 0: every layer is dense
  n_shared_experts: int = 0
  num_experts_per_tok: int = 2
  moe_intermediate_size: int = 256
  n_group: int = 1
  topk_group: int = 1
  topk_method: str = 'noaux_tc'
  scoring_func: str = 'sigmoid'
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0
  aux_loss_alpha: float = 1e-4  # sequence-wise balance loss, V2's (softmax) or V3's (sigmoid) form; 0 = none

  num_nextn_predict_layers: int = 0  # depth of multi-token prediction

  @property
  def num_dense_layers(self) -> int:
    first = self.first_k_dense_replace if self.n_routed_experts else self.num_hidden_layers
    return min(first, self.num_hidden_layers)

  @property
  def num_moe_layers(self) -> int:
    return self.num_hidden_layers - self.num_dense_layers

  @property
  def num_routers(self) -> int:
    """Main MoE layers, then the MTP modules: each has a router and a selection bias of its own."""
    return self.num_moe_layers + (self.num_nextn_predict_layers if self.n_routed_experts else 0)

  @property
  def uses_selection_bias(self) -> bool:
    return self.num_routers > 0 and self.topk_method == 'noaux_tc'

  @property
  def qk_head_dim(self) -> int:
    if self.attention == 'mla':
      return self.qk_nope_head_dim + self.qk_rope_head_dim
    return self.head_dim or self.v_head_dim

  @property
  def kv_heads(self) -> int:
    """Key-value heads of the attentions MLA is compared with."""
    return {'mqa': 1, 'mha': self.num_attention_heads}.get(self.attention, self.num_key_value_heads)

  @property
  def cache_width(self) -> int:
    """Numbers a layer caches for one token."""
    if self.attention == 'mla':
      return self.kv_lora_rank + self.qk_rope_head_dim
    return 2 * self.kv_heads * self.qk_head_dim

  @property
  def softmax_scale(self) -> float:
    scale = self.qk_head_dim**-0.5
    if self.attention == 'mla' and self.rope_scaling.enabled:
      scale *= self.rope_scaling.attention_factor(self.rope_scaling.mscale_all_dim) ** 2
    return scale

  def validate(self):
    _at_least(self, 'model', vocab_size=2, hidden_size=1, num_hidden_layers=1, num_attention_heads=1,
              max_position_embeddings=1, intermediate_size=1, first_k_dense_replace=0, n_routed_experts=0,
              n_shared_experts=0, num_nextn_predict_layers=0, q_lora_rank=0, v_head_dim=1, aux_loss_alpha=0,
              initializer_range=0)
    _positive(self, 'model', rope_theta=10000, rms_norm_eps=1e-6)
    _one_of('model.attention', self.attention, ATTENTIONS)
    if self.attention == 'mla':
      _at_least(self, 'model', kv_lora_rank=1, qk_nope_head_dim=1, qk_rope_head_dim=2)
      _require(self.qk_rope_head_dim % 2 == 0,
               f'model.qk_rope_head_dim={self.qk_rope_head_dim} is odd, but RoPE turns pairs; use an even width')
      _at_least(self, 'model', rope_repeats=1)
      _require(self.qk_rope_head_dim % (2 * self.rope_repeats) == 0,
               f'model.qk_rope_head_dim={self.qk_rope_head_dim} is not divisible by 2 * rope_repeats='
               f'{2 * self.rope_repeats}; use a multiple of it')
      _require(not (self.attention_bias and self.q_lora_rank),
               f'model.attention_bias=True with q_lora_rank={self.q_lora_rank} is not supported; use q_lora_rank=0')
    else:
      _require(self.qk_head_dim % 2 == 0,
               f'model.head_dim={self.qk_head_dim} is odd, but RoPE turns pairs; use an even width')
      _require(self.kv_heads >= 1 and self.num_attention_heads % self.kv_heads == 0,
               f'model.num_key_value_heads={self.kv_heads} does not divide num_attention_heads='
               f'{self.num_attention_heads}; use a divisor of it')
      _require(not self.rope_scaling.enabled,
               f"model.rope_scaling.factor={self.rope_scaling.factor} is for model.attention='mla' alone; use 1")
    _at_least(self.rope_scaling, 'model.rope_scaling', factor=1, original_max_position_embeddings=1)
    if not self.n_routed_experts:
      return
    _at_least(self, 'model', num_experts_per_tok=1, moe_intermediate_size=1, n_group=1, topk_group=1)
    _one_of('model.topk_method', self.topk_method, TOPK_METHODS)
    _one_of('model.scoring_func', self.scoring_func, SCORING)
    _require(self.n_routed_experts % self.n_group == 0,
             f'model.n_routed_experts={self.n_routed_experts} is not divisible by n_group={self.n_group}; '
             'use a multiple of it')
    _require(self.topk_group <= self.n_group,
             f'model.topk_group={self.topk_group} is above n_group={self.n_group}; use at most n_group')
    in_reach = self.n_routed_experts if self.topk_method == 'greedy' else (
        self.n_routed_experts // self.n_group * self.topk_group)
    _require(self.num_experts_per_tok <= in_reach,
             f'model.num_experts_per_tok={self.num_experts_per_tok} is above the {in_reach} experts a token can reach; '
             'use fewer, or more groups (topk_group)')
    if self.topk_method == 'noaux_tc':
      _require(self.n_group == 1 or self.n_routed_experts // self.n_group >= 2,
               f'model.n_group={self.n_group} leaves one expert a group, but noaux_tc ranks groups by their best two; '
               'use fewer groups')


@dataclasses.dataclass
class MeshConfig:
  """How many devices each axis of the mesh has. One axis may be -1: all devices the others leave."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1

  def validate(self, model: ModelConfig):
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      _require(size == -1 or size >= 1, f'mesh.{name}={size} is no size; use 1 or more, or -1 for what is left')
      _require(name not in ('tensor', 'context') or size == 1,
               f'mesh.{name}={size} is not supported yet; use mesh.{name}=1 and data, fsdp or expert')
    _require(list(sizes.values()).count(-1) <= 1, f'mesh has several axes of size -1 ({sizes}); leave one at most')
    experts = model.n_routed_experts
    if self.expert > 1:
      _require(experts > 0, f'mesh.expert={self.expert}, but the model has no routed experts; use mesh.expert=1')
      near = experts // self.expert * self.expert
      _require(experts % self.expert == 0,
               f'n_routed_experts={experts} is not divisible by mesh axis expert={self.expert}; '
               f'use {near or self.expert} or {near + self.expert}, or another --config.mesh.expert')


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW and its schedule. Lengths and times are in tokens seen, so that they survive a change of batch size."""

  learning_rate: float = 2.2e-4
  warmup_tokens: int = 0  # linear from 0
  constant_until_tokens: int = 0  # held at learning_rate until here; 0: the cosine begins after the warm-up
  cosine_until_tokens: int = 0  # reaches end_learning_rate here and stays; 0: no decay
  end_learning_rate: float = 0.0
  final_from_tokens: int = 0  # from here final_learning_rate; 0: never
  final_learning_rate: float = 0.0
  step_decay_at_tokens: tuple[int, ...] = ()  # V2: the rate is multiplied by step_decay_factor at each of these
  step_decay_factor: float = 0.316
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # matrices only: no decay on norms and biases
  clip_norm: float = 1.0
  moment_dtype: str = 'float32'

  def validate(self):
    _positive(self, 'optimizer', learning_rate=2.2e-4, clip_norm=1.0, epsilon=1e-8)
    _at_least(self, 'optimizer', warmup_tokens=0, constant_until_tokens=0, cosine_until_tokens=0, end_learning_rate=0,
              final_from_tokens=0, final_learning_rate=0, weight_decay=0, step_decay_factor=0)
    _require(all(isinstance(at, int | float) and at >= 0 for at in self.step_decay_at_tokens),
             f'optimizer.step_decay_at_tokens={self.step_decay_at_tokens} are no numbers of tokens; use 0 or more')
    for name in ('beta1', 'beta2'):
      value = getattr(self, name)
      _require(0 <= value < 1, f'optimizer.{name}={value} is outside [0, 1); use e.g. 0.9')
    _one_of('optimizer.moment_dtype', self.moment_dtype, DTYPES)
    start = max(self.warmup_tokens, self.constant_until_tokens)
    _require(not self.cosine_until_tokens or self.cosine_until_tokens > start,
             f'optimizer.cosine_until_tokens={self.cosine_until_tokens} is not after the constant part '
             f'({start} tokens); use more, or 0 for no decay')


@dataclasses.dataclass
class TrainingConfig:
  """The run. Batch sizes are sequences; intervals are steps."""

  steps: int = 1000
  batch_size: int = 16
  sequence_length: int = 256
  gradient_accumulation: int = 1  # micro-batches a step; losses and gradients equal one large batch's
  batch_ramp_start: int = 0  # first batch size; 0: no ramp
  batch_ramp_increment: int = 0
  batch_ramp_tokens: int = 0  # the full batch size is reached after this many tokens
  seed: int = 0
  log_interval: int = 10
  eval_interval: int = 250
  eval_batches: int = 8
  checkpoint_interval: int = 500
  keep_checkpoints: int = 2
  compute_dtype: str = 'bfloat16'  # master weights are float32 always
  remat: str = 'none'  # what the backward pass recomputes: none, full (all of a layer), dots (all but matmuls)
  # Compile every layer on its own: takes longer, and saves the copies into and out of a loop's stacked arrays.
  unroll_layers: bool = False
  mtp_loss_weight: float = 0.3
  mtp_loss_switch_tokens: int = 0  # from here mtp_loss_weight_after; 0: never
  mtp_loss_weight_after: float = 0.1
  bias_update_speed: float = 1e-3  # of the routers' selection bias, a step
  bias_freeze_tokens: int = 0  # from here the bias stands still; 0: never

  def validate(self):
    _at_least(self, 'training', steps=1, batch_size=1, sequence_length=2, gradient_accumulation=1, batch_ramp_start=0,
              batch_ramp_tokens=0, log_interval=1, eval_interval=1, eval_batches=1, checkpoint_interval=1,
              keep_checkpoints=1, mtp_loss_weight=0, mtp_loss_weight_after=0, bias_update_speed=0, seed=0,
              mtp_loss_switch_tokens=0, bias_freeze_tokens=0)
    _one_of('training.compute_dtype', self.compute_dtype, DTYPES)
    _one_of('training.remat', self.remat, REMAT)
    _require(self.batch_size % self.gradient_accumulation == 0,
             f'training.batch_size={self.batch_size} is not divisible by '
             f'gradient_accumulation={self.gradient_accumulation}; use a multiple of it')
    if self.batch_ramp_start:
      _at_least(self, 'training', batch_ramp_increment=1, batch_ramp_tokens=1)
      for name in ('batch_ramp_start', 'batch_ramp_increment'):
        value = getattr(self, name)
        _require(value % self.gradient_accumulation == 0,
                 f'training.{name}={value} is not divisible by gradient_accumulation={self.gradient_accumulation}; '
                 'use a multiple of it')
      _require(self.batch_ramp_start <= self.batch_size,
               f'training.batch_ramp_start={self.batch_ramp_start} is above batch_size={self.batch_size}; use less')


@dataclasses.dataclass
class DataConfig:
  """What the model reads. `path` is a file or a folder, for every source but stdlib and site-packages."""

  source: str = 'stdlib'
  path: str = ''
  text_key: str = 'text'  # jsonl and arrayrecord: the field that holds the document
  tokenizer: str = 'byte'  # or the path of a Hugging Face tokenizer.json
  held_out_fraction: float = 0.05  # of files (documents), by a hash of their name
  fim_rate: float = 0.0  # share of documents rearranged prefix-suffix-middle
  piece_bytes: int = 0  # documents longer than this are cut at line ends into pieces that are shuffled apart; 0 = never
  mask_documents: bool = True  # attention stays within a document
  shuffle_seed: int = 0

  def validate(self):
    _one_of('data.source', self.source, SOURCES)
    _require(bool(self.path) or self.source in ('stdlib', 'site-packages'),
             f'data.path is empty, but data.source={self.source!r} reads files; set --config.data.path')
    _require(0 <= self.held_out_fraction < 1,
             f'data.held_out_fraction={self.held_out_fraction} is outside [0, 1); use e.g. 0.05')
    _require(self.piece_bytes == 0 or self.piece_bytes >= 64,
             f'data.piece_bytes={self.piece_bytes} is below 64; use 0 (never cut) or at least 64')
    _require(0 <= self.fim_rate <= 1, f'data.fim_rate={self.fim_rate} is outside [0, 1]; use e.g. 0.1')


@dataclasses.dataclass
class Config:
  """A run: what `configs/*.py` return and `config.json` records."""

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def validate(self):
    """Raises ConfigError, one line, at the first setting that can't work."""
    self.model.validate()
    self.training.validate()
    self.optimizer.validate()
    self.data.validate()
    self.mesh.validate(self.model)
    for key, value in leaf_keys(self).items():
      _require(not isinstance(value, float) or math.isfinite(value), f'{key}={value} is not finite; use a number')
    limit = self.model.max_position_embeddings
    _require(self.training.sequence_length <= limit,
             f'training.sequence_length={self.training.sequence_length} is above the model\'s '
             f'max_position_embeddings={limit}; use at most {limit}')
    return self


def to_dict(config) -> dict:
  return dataclasses.asdict(config)


def from_dict(kind, values: dict, prefix: str = ''):
  """Rebuilds a dataclass from `to_dict`'s output; an unknown key is an error that names the nearest right ones."""
  _require(isinstance(values, dict), f'{prefix.rstrip(".") or "config"}={values!r} is no JSON object of settings')
  fields = {field.name: field for field in dataclasses.fields(kind)}
  arguments = {}
  for key, value in values.items():
    _require(key in fields, unknown_key(prefix + key, [prefix + name for name in fields]))
    nested = fields[key].type if dataclasses.is_dataclass(fields[key].type) else None
    if nested:
      value = from_dict(nested, value, f'{prefix}{key}.')
    arguments[key] = tuple(value) if isinstance(value, list) else value
  return kind(**arguments)


def unknown_key(key: str, known) -> str:
  """The one line for a key that does not exist: names the nearest right ones."""
  leaf = {name.rpartition('.')[2]: name for name in known}
  near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
  near += [leaf[n] for n in difflib.get_close_matches(key.rpartition('.')[2], leaf, n=3, cutoff=0.6)]
  near = list(dict.fromkeys(near))
  hint = f'did you mean {" or ".join(near[:3])}?' if near else f'the keys here are {", ".join(sorted(known)[:12])}'
  return f'{key} is no setting; {hint}'


def leaf_keys(config, prefix: str = '') -> dict:
  """All settings as {'model.hidden_size': value}: what a command line can set."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    nested = dataclasses.is_dataclass(value)
    out |= leaf_keys(value, f'{prefix}{field.name}.') if nested else {prefix + field.name: value}
  return out

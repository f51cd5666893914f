"""DeepSeek-V2: 236B parameters (21B active). arXiv 2405.04434, section 3.1.

Command:  python train.py --config=configs/deepseek_v2.py --workdir=gs://...
Hardware: a pod; not run yet. What is tested: its parameter count, and its layers at small widths against another
          implementation (tests/golden). Of its three balance losses the expert-level one is here.
"""

from mla_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainingConfig

WARMUP_STEPS, SEQUENCE, TOKENS = 2000, 4096, 8_100 * 10**9


def model() -> ModelConfig:
  return ModelConfig(
      vocab_size=102400, hidden_size=5120, num_hidden_layers=60, max_position_embeddings=163840,
      num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
      v_head_dim=128, rope_theta=10000.0,
      rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
      intermediate_size=12288, first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2,
      num_experts_per_tok=6, moe_intermediate_size=1536, n_group=8, topk_group=3, topk_method='group_limited_greedy',
      scoring_func='softmax', norm_topk_prob=False, routed_scaling_factor=16.0, aux_loss_alpha=0.003,
      initializer_range=0.006)


def get_config() -> Config:
  pretrained = model()
  pretrained.rope_scaling = RopeScaling()  # YaRN came after, for 32K
  return Config(
      model=pretrained,
      training=TrainingConfig(steps=218_000, batch_size=9216, sequence_length=SEQUENCE, batch_ramp_start=2304,
                              batch_ramp_increment=1152, batch_ramp_tokens=225 * 10**9, remat='full'),
      optimizer=OptimizerConfig(
          learning_rate=2.4e-4, warmup_tokens=WARMUP_STEPS * 2304 * SEQUENCE,
          step_decay_at_tokens=(TOKENS * 6 // 10, TOKENS * 9 // 10), step_decay_factor=0.316),
      data=DataConfig(source='arrayrecord', path='data/pretraining', tokenizer='data/tokenizer.json',
                      mask_documents=False),
      mesh=MeshConfig(data=-1, fsdp=32, expert=16))

"""DeepSeek-V3: 671B parameters (37B active), 682.6B with its MTP module. arXiv 2412.19437, section 4.2.

Command:  python train.py --config=configs/deepseek_v3.py --workdir=gs://...
Hardware: a pod; not run yet. What is tested: its parameter count, and its layers at small widths against another
          implementation (tests/golden).
"""

from mla_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainingConfig

WARMUP_STEPS, SEQUENCE = 2000, 4096


def model() -> ModelConfig:
  return ModelConfig(
      vocab_size=129280, hidden_size=7168, num_hidden_layers=61, max_position_embeddings=163840,
      num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
      v_head_dim=128, rope_theta=10000.0,
      rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
      intermediate_size=18432, first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1,
      num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8, topk_group=4, topk_method='noaux_tc',
      scoring_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.5, aux_loss_alpha=1e-4,
      num_nextn_predict_layers=1, initializer_range=0.006)


def get_config() -> Config:
  # Pre-training at 4K has no YaRN; the published config.json has the one of the 128K model.
  pretrained = model()
  pretrained.rope_scaling = RopeScaling()
  return Config(
      model=pretrained,
      training=TrainingConfig(
          steps=235_000, batch_size=15360, sequence_length=SEQUENCE, batch_ramp_start=3072, batch_ramp_increment=1536,
          batch_ramp_tokens=469 * 10**9, remat='full', mtp_loss_weight=0.3, mtp_loss_switch_tokens=10**13,
          mtp_loss_weight_after=0.1, bias_update_speed=1e-3, bias_freeze_tokens=143 * 10**11),
      optimizer=OptimizerConfig(
          learning_rate=2.2e-4, warmup_tokens=WARMUP_STEPS * 3072 * SEQUENCE, constant_until_tokens=10**13,
          cosine_until_tokens=143 * 10**11, end_learning_rate=2.2e-5, final_from_tokens=14_633 * 10**9,
          final_learning_rate=7.3e-6, moment_dtype='bfloat16'),
      data=DataConfig(source='arrayrecord', path='data/pretraining', tokenizer='data/tokenizer.json', fim_rate=0.1,
                      mask_documents=False),
      mesh=MeshConfig(data=-1, fsdp=64, expert=16))

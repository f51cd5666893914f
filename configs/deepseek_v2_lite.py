"""DeepSeek-V2-Lite: 15.7B parameters (2.4B active). arXiv 2405.04434, appendix B.

Command:  python train.py --config=configs/deepseek_v2_lite.py --workdir=gs://...
Hardware: 64 chips or more; not run yet. What is tested: its parameter count, and its layers at small widths against
          another implementation (tests/golden). configs/h200_3b.py has its widths on one GPU.
"""

from mla_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainingConfig

WARMUP_STEPS, SEQUENCE, BATCH, TOKENS = 2000, 4096, 4608, 5_700 * 10**9


def model() -> ModelConfig:
  return ModelConfig(
      vocab_size=102400, hidden_size=2048, num_hidden_layers=27, max_position_embeddings=163840,
      num_attention_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
      v_head_dim=128, rope_theta=10000.0,
      rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
      intermediate_size=10944, first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2,
      num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1, topk_group=1, topk_method='greedy',
      scoring_func='softmax', norm_topk_prob=False, routed_scaling_factor=1.0, aux_loss_alpha=0.001,
      initializer_range=0.006)


def get_config() -> Config:
  pretrained = model()
  pretrained.rope_scaling = RopeScaling()  # YaRN came after, for 32K
  return Config(
      model=pretrained,
      training=TrainingConfig(steps=TOKENS // (BATCH * SEQUENCE), batch_size=BATCH, sequence_length=SEQUENCE,
                              remat='full'),
      optimizer=OptimizerConfig(
          learning_rate=4.2e-4, warmup_tokens=WARMUP_STEPS * BATCH * SEQUENCE,
          step_decay_at_tokens=(TOKENS * 8 // 10, TOKENS * 9 // 10), step_decay_factor=0.316),
      data=DataConfig(source='arrayrecord', path='data/pretraining', tokenizer='data/tokenizer.json',
                      mask_documents=False),
      mesh=MeshConfig(data=-1, fsdp=8, expert=8))

"""The demo: a DeepSeek-V3 in small, on the Python standard library's own source, bytes as tokens.

Command:  make demo, or python train.py --config=configs/tiny.py --workdir=runs/demo
Hardware: two CPU cores
Result:   held-out loss 1.531 nats a byte after 2.05M tokens (a trigram table reaches 1.89), teacher-forced MTP
          acceptance 0.784; two to three minutes of training at 13,000 to 16,000 tokens/s (make's environment)
"""

from mla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig

BATCH, SEQUENCE, STEPS = 8, 256, 1000


def get_config() -> Config:
  tokens = BATCH * SEQUENCE * STEPS
  return Config(
      model=ModelConfig(
          vocab_size=264, hidden_size=128, num_hidden_layers=4, max_position_embeddings=2048,
          num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
          v_head_dim=32, intermediate_size=384, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1,
          num_experts_per_tok=2, moe_intermediate_size=128, n_group=4, topk_group=2, routed_scaling_factor=2.5,
          # About 1 / sqrt(2 width), chosen with the rate from six short runs by their held-out loss.
          num_nextn_predict_layers=1, initializer_range=0.06),
      training=TrainingConfig(
          steps=STEPS, batch_size=BATCH, sequence_length=SEQUENCE, log_interval=10, eval_interval=250, eval_batches=16,
          checkpoint_interval=500, compute_dtype='float32', unroll_layers=True, bias_update_speed=5e-3),
      optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=tokens // 20, cosine_until_tokens=tokens,
                                end_learning_rate=3e-5),
      # Pieces, so that a short run meets many files.
      data=DataConfig(source='stdlib', piece_bytes=2048))

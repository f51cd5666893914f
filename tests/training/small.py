"""A model small enough to compile in seconds that has every part: dense and MoE layers, groups, bias, MTP."""

import dataclasses

import numpy as np

from mla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig

MODEL = ModelConfig(
    vocab_size=264, hidden_size=32, num_hidden_layers=2, max_position_embeddings=128, num_attention_heads=2,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=48,
    first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
    n_group=4, topk_group=2, aux_loss_alpha=0.01, num_nextn_predict_layers=1, initializer_range=0.2)


def config(**training) -> Config:
  settings = dict(steps=4, batch_size=8, sequence_length=24, log_interval=1, eval_interval=4, eval_batches=1,
                  checkpoint_interval=2, compute_dtype='float32')
  return Config(model=dataclasses.replace(MODEL), training=TrainingConfig(**settings | training),
                optimizer=OptimizerConfig(learning_rate=1e-2), data=DataConfig(source='text', path='unset'))


def batch(rows: int, length: int, seed: int = 0) -> dict:
  """Rows of several documents and, in the last one, padding: uneven on purpose."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (rows, length + 1)), axis=1).astype(np.int32)
  segments[-1, length // 2:] = 0
  starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
  return dict(tokens=rng.integers(0, 256, (rows, length + 1)).astype(np.int32), segments=segments,
              positions=(np.arange(length + 1) - starts).astype(np.int32))

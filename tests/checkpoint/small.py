"""What the tests of Hugging Face directories share: a small model with every kind of layer, and exact comparison."""

from pathlib import Path

import jax
import numpy as np

from mla_jax.axes import is_variable
from mla_jax.checkpoint import tensor_files
from mla_jax.config import ModelConfig
from mla_jax.model import transformer

GOLDEN = Path(__file__).parents[1] / 'golden'
# Wider than a block, and not by whole blocks; the smallest model with every kind of layer.
WIDE = ModelConfig(
    vocab_size=40, hidden_size=136, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=130, kv_lora_rank=132,
    qk_nope_head_dim=40, qk_rope_head_dim=28, v_head_dim=66, intermediate_size=150, first_k_dense_replace=1,
    n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, moe_intermediate_size=129,
    num_nextn_predict_layers=1)


def stored_tensors(folder) -> dict[str, np.ndarray]:
  stored = tensor_files.scan(folder)  # safetensors' own reader for NumPy has no FP8
  with tensor_files.Reader(stored) as reader:
    return {name: reader.read(name) for name in stored}


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def random_model(config: ModelConfig, dtype=np.float32, seed: int = 0):
  random = np.random.default_rng(seed)
  _, params, buffers = transformer.abstract(config)
  return tuple(jax.tree.map(lambda v: random.standard_normal(v.shape).astype(dtype), tree, is_leaf=is_variable)
               for tree in (params, buffers))

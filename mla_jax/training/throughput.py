"""Arithmetic of a training step, and what fraction of a chip's peak it uses."""

import jax

from mla_jax.config import ModelConfig
from mla_jax.model import transformer

# Dense bf16 FLOP/s a device, from the vendors' data sheets; the first name found in `device_kind` counts.
PEAK_FLOPS = {
    'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'B200': 2250e12,
    'TPU7x': 1154e12, 'v6': 918e12, 'v5p': 459e12, 'v5 lite': 197e12, 'v5e': 197e12, 'v4': 275e12,
}  # a TPU7x chip is two devices


def peak_flops() -> float | None:
  """Of one device; None where it is unknown, a CPU for instance."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def flops_per_token(config: ModelConfig, length: int) -> float:
  """Forward and backward, recomputation not counted: 6 a weight that a token meets, and causal attention's half."""
  c = config
  weights = transformer.count_parameters(c) - c.num_routers * c.n_routed_experts * c.uses_selection_bias
  weights -= c.vocab_size * c.hidden_size * (not c.tie_word_embeddings)  # an embedding is looked up, not multiplied
  idle = c.num_routers * (c.n_routed_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size
  head_again = c.num_nextn_predict_layers * c.vocab_size * c.hidden_size
  layers = c.num_hidden_layers + c.num_nextn_predict_layers
  value_width = c.v_head_dim if c.attention == 'mla' else c.qk_head_dim
  attention = 3 * layers * c.num_attention_heads * length * (c.qk_head_dim + value_width)
  return 6 * (weights - idle + head_again) + attention

"""DeepSeek-V2 and -V3 with multi-token prediction in float64 NumPy, one token and one head at a time, straight from the
papers' equations and on published weights as they are stored. Slow, and meant to be checkable by eye.

No jax and no torch here: record.py and tests/model/test_golden.py hold it against what transformers computes.
"""

import math

import numpy as np


class Oracle:
  """config: a parsed config.json of transformers 5. weights: published name -> float64 array."""

  def __init__(self, config: dict, weights: dict):
    self.config = config
    self.weights = weights
    self.margin = math.inf  # smallest gap between a chosen and a rejected score: above rounding, or nothing is decided

  def main(self, tokens):
    """(hidden states after the final norm [T, D], logits [T, W]) of one sequence."""
    x = self.weights['model.embed_tokens.weight'][tokens]
    for layer in range(self.config['num_hidden_layers']):
      x = self.block(f'model.layers.{layer}.', x, moe=layer >= self.config['first_k_dense_replace'])
    x = self.norm(x, 'model.norm.weight')
    return x, self.logits(x)

  def module(self, depth, hidden, tokens):
    """Module `depth` (1 is the first) from the hidden states of the module before it, or of the main model: pairs
    position i with token i + depth. Returns (hidden after its norm, logits), each of T - depth positions."""
    prefix = f'model.layers.{self.config["num_hidden_layers"] + depth - 1}.'
    rows = []
    for i in range(len(tokens) - depth):
      embedding = self.norm(self.weights['model.embed_tokens.weight'][tokens[i + depth]], prefix + 'enorm.weight')
      joined = np.concatenate([embedding, self.norm(hidden[i], prefix + 'hnorm.weight')])
      rows.append(self.weights[prefix + 'eh_proj.weight'] @ joined)
    x = self.norm(self.block(prefix, np.stack(rows), moe=True), prefix + 'shared_head.norm.weight')
    return x, self.logits(x)

  def logits(self, x):
    tied = self.config['tie_word_embeddings']
    return x @ self.weights['model.embed_tokens.weight' if tied else 'lm_head.weight'].T

  def norm(self, x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.weights[name]

  def block(self, prefix, x, moe):
    x = x + self.attention(prefix + 'self_attn.', self.norm(x, prefix + 'input_layernorm.weight'))
    h = self.norm(x, prefix + 'post_attention_layernorm.weight')
    if moe:
      return x + np.stack([self.experts(prefix + 'mlp.', token) for token in h])
    return x + np.stack([self.mlp(prefix + 'mlp.', token) for token in h])

  def mlp(self, prefix, token):
    gate = self.weights[prefix + 'gate_proj.weight'] @ token
    up = self.weights[prefix + 'up_proj.weight'] @ token
    return self.weights[prefix + 'down_proj.weight'] @ (gate / (1 + np.exp(-gate)) * up)

  def experts(self, prefix, token):
    c = self.config
    logits = self.weights[prefix + 'gate.weight'] @ token
    v3 = c['model_type'] == 'deepseek_v3'
    scores = 1 / (1 + np.exp(-logits)) if v3 else np.exp(logits) / np.exp(logits).sum()
    ranked = scores + self.weights[prefix + 'gate.e_score_correction_bias'] if v3 else scores
    reachable = list(range(len(scores)))
    if v3 or c['topk_method'] == 'group_limited_greedy':
      groups = np.split(np.arange(len(scores)), c['n_group'])
      worth = [sum(sorted(ranked[g])[-2:]) if v3 else max(ranked[g]) for g in groups]
      best = self.best(worth, c['topk_group'])
      reachable = [e for g in best for e in groups[g]]
    chosen = [reachable[i] for i in self.best([ranked[e] for e in reachable], c['num_experts_per_tok'])]
    total = sum(scores[e] for e in chosen) if v3 and c['norm_topk_prob'] else 1.0
    out = self.mlp(prefix + 'shared_experts.', token)
    for e in chosen:
      out = out + scores[e] / total * c['routed_scaling_factor'] * self.mlp(f'{prefix}experts.{e}.', token)
    return out

  def best(self, values, count):
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if count < len(order):
      self.margin = min(self.margin, values[order[count - 1]] - values[order[count]])
    return order[:count]

  def attention(self, prefix, x):
    c, w = self.config, self.weights
    nope, rope, rank, value = c['qk_nope_head_dim'], c['qk_rope_head_dim'], c['kv_lora_rank'], c['v_head_dim']
    turn = self.rotations(len(x))
    latent = x @ w[prefix + 'kv_a_proj_with_mqa.weight'].T
    compressed = self.norm(latent[:, :rank], prefix + 'kv_a_layernorm.weight')
    rope_key = as_complex(latent[:, rank:]) * turn
    if c['q_lora_rank'] is None:
      queries = x @ w[prefix + 'q_proj.weight'].T
    else:
      q = self.norm(x @ w[prefix + 'q_a_proj.weight'].T, prefix + 'q_a_layernorm.weight')
      queries = q @ w[prefix + 'q_b_proj.weight'].T
    out = []
    for head in range(c['num_attention_heads']):
      query = queries[:, head * (nope + rope):(head + 1) * (nope + rope)]
      query_rope = as_complex(query[:, nope:]) * turn
      up = w[prefix + 'kv_b_proj.weight'][head * (nope + value):(head + 1) * (nope + value)]
      keys, values = compressed @ up[:nope].T, compressed @ up[nope:].T
      rows = []
      for t in range(len(x)):
        scores = keys[:t + 1] @ query[t, :nope] + (rope_key[:t + 1] * query_rope[t].conj()).real.sum(-1)
        weights = np.exp(self.scale() * scores - (self.scale() * scores).max())
        rows.append(weights / weights.sum() @ values[:t + 1])
      out.append(np.stack(rows))
    return np.concatenate(out, -1) @ w[prefix + 'o_proj.weight'].T

  def scale(self):
    yarn = self.config['rope_parameters']
    plain = (self.config['qk_nope_head_dim'] + self.config['qk_rope_head_dim']) ** -0.5
    return plain * sharpening(yarn, 'mscale_all_dim') ** 2 if yarn['rope_type'] == 'yarn' else plain

  def rotations(self, length):
    """exp(i angle) of every position and pair, with YaRN's magnitude."""
    yarn = self.config['rope_parameters']
    width, theta = self.config['qk_rope_head_dim'], yarn['rope_theta']
    frequencies, magnitude = [theta ** (-2 * pair / width) for pair in range(width // 2)], 1.0
    if yarn['rope_type'] == 'yarn':
      magnitude = sharpening(yarn, 'mscale') / sharpening(yarn, 'mscale_all_dim')
      frequencies = yarn_frequencies(frequencies, theta, yarn)
    return magnitude * np.exp(1j * np.arange(length)[:, None] * np.array(frequencies))


def as_complex(x):
  """Published pairs are neighbours: (x0, x1), (x2, x3), ..."""
  return x[:, 0::2] + 1j * x[:, 1::2]


def sharpening(yarn, key):
  return 0.1 * yarn[key] * math.log(yarn['factor']) + 1


def yarn_frequencies(frequencies, theta, yarn):
  """Each pair's frequency by how often it turns within the original context: often, kept; seldom, divided by the
  factor; between, blended along the pair's number (DeepSeek's reading of arXiv 2309.00071, section 3.2)."""
  def pair_turning(times):
    # times = original * theta^(-pair / pairs) / 2 pi, solved for the pair
    return len(frequencies) * math.log(yarn['original_max_position_embeddings'] / (2 * math.pi * times), theta)

  first = max(math.floor(pair_turning(yarn['beta_fast'])), 0)
  last = min(math.ceil(pair_turning(yarn['beta_slow'])), 2 * len(frequencies) - 1)
  out = []
  for pair, frequency in enumerate(frequencies):
    stretched = min(max((pair - first) / (last - first), 0), 1)
    out.append((1 - stretched) * frequency + stretched * frequency / yarn['factor'])
  return out

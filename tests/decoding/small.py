"""Random models that draft well enough to be accepted and badly enough to be rejected, and what decoding is checked
against: the whole text run anew for every token, without a cache."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.axes import is_variable
from mla_jax.config import ModelConfig, from_dict, to_dict
from mla_jax.decoding.engine import Decoder
from mla_jax.model import transformer

MODEL = ModelConfig(
    vocab_size=11, hidden_size=32, num_hidden_layers=2, max_position_embeddings=96, num_attention_heads=2,
    kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=32,
    first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16)
PROMPTS = [[3], [1, 2], [4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4], [0] * 17]
LENGTH = 48  # of the texts the oracle runs
NOISE = 0.25  # 0.2 drafts almost always well, 0.4 almost never


def config(depth: int, **changes) -> ModelConfig:
  return dataclasses.replace(MODEL, num_nextn_predict_layers=depth, **changes)


def weights(c: ModelConfig, seed: int):
  """(params, buffers). The next token is mostly the newest one's successor, for the main model and the modules alike
  (modules pass the embedding on); blocks disturb that by context."""
  random = np.random.default_rng(seed)
  _, params, buffers = transformer.abstract(c)

  def fill(path, variable):
    name = path[-1].key
    values = random.standard_normal(variable.shape).astype(np.float32)
    if name.startswith(('norm', 'bias')):
      return ('norm' in name) + 0.1 * values
    if name == 'wjoin_ZD':
      return np.eye(*variable.shape[-2:], dtype=np.float32) + 0.05 * values
    return (1 if name == 'embedding_WD' else NOISE) * values

  params, buffers = (jax.tree_util.tree_map_with_path(fill, tree, is_leaf=is_variable) for tree in (params, buffers))
  params['head_WD'] = np.roll(params['embedding_WD'], 1, axis=0)
  return params, buffers


def decoder(depth: int, seed: int, **changes) -> Decoder:
  c = config(depth, **changes)
  return Decoder(c, *weights(c, seed), np.float32)


def run(d: Decoder, prompts=PROMPTS, **options):
  r = d.start(prompts, **options)
  while not r.finished:
    r.advance()
  return r


def new_tokens(r) -> list[list[int]]:
  return [r.new(row).tolist() for row in range(len(r.done))]


@functools.cache
def _oracle(config_json: str, drafts: int):
  """Logits of the main model at every position, and at every position n the drafts of tokens n + 1 .. n + drafts, for
  a text of which all tokens are known: draft j is what decoding must draft if those before it were accepted."""
  graph = transformer.abstract(from_dict(ModelConfig, json.loads(config_json))).graph

  @jax.jit
  def forward(params, buffers, tokens_BS):
    model = nnx.merge(graph, params, buffers)
    shape, modules = tokens_BS.shape, model.config.num_nextn_predict_layers
    ones_BS, positions_BS = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1]), shape)

    def module(d, x_BSD):
      ahead_BS = jnp.pad(tokens_BS, ((0, 0), (0, d)))[:, d:]
      return model.mtp_hidden(d, x_BSD, ahead_BS, positions_BS, ones_BS, ones_BS > 0)[0]

    hidden_BSD, _ = model.hidden(tokens_BS)
    if not drafts:
      return model.logits(hidden_BSD), None
    depths = [hidden_BSD]
    for d in range(1, modules + 1):
      depths.append(module(d, depths[-1]))

    def drafts_at(n):
      out = [depths[d][:, n - 1] for d in range(1, min(modules, drafts) + 1)]
      x_BSD = depths[modules - 1]
      for j in range(modules + 1, drafts + 1):
        place = n - 1 + j - modules
        x_BSD = x_BSD.at[:, place].set(out[-1])
        out.append(module(modules, x_BSD)[:, place])
      return model.logits(jnp.stack(out, axis=1)).argmax(-1)

    return model.logits(hidden_BSD), jax.lax.map(drafts_at, jnp.arange(shape[1]))  # of n = 0: nothing

  return forward


def oracle(d: Decoder, tokens_BS, drafts: int = 0):
  """(logits [B, S, W], drafts [position, B, drafts])."""
  with jax.default_matmul_precision('highest'):
    out = _oracle(json.dumps(to_dict(d.config)), drafts)(d.params, d.buffers, np.asarray(tokens_BS, np.int32))
  return jax.tree.map(np.asarray, out)


def greedy(d: Decoder, prompts, count: int):
  """(new tokens, their logits), the whole text run anew for each."""
  rows = [list(prompt) for prompt in prompts]
  logits = [[] for _ in prompts]
  for _ in range(count):
    logits_BSW, _ = oracle(d, [row + [0] * (LENGTH - len(row)) for row in rows])
    for b, row in enumerate(rows):
      logits[b].append(logits_BSW[b, len(row) - 1])
      row.append(int(logits[b][-1].argmax()))
  return [row[-count:] for row in rows], np.array(logits)

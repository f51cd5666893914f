"""The decode loop's body: the main model verifies a row's drafts, then the MTP modules draft again (V3 report,
section 2.2; arXiv 2211.17192 for the acceptance rule). Plain decoding is the same round with no drafts.

Where n is the position of a row's newest token, which the main model has not seen yet:
  verify   one cached call over [t_n, draft n+1 .. n+k]; a drafts are accepted and one more token is the main model's.
  propose  module d at position p takes module d - 1's hidden state there (module 1 the main model's) and token p + d.
           At p = n' - 1 (n' is the newest position now) it gives draft n' + d. Drafts past the last module come from
           re-applying it at the next positions to its own hidden state.
A cache entry that was made from a rejected draft lies past the row's length, where no query sees it, until it is
overwritten; those of modules d > 1 reach back d - 1 positions, so their window begins that much earlier.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.decoding.sampling import ACCEPT, DRAFT, TOKEN, Sampling, distribution, draw, uniform
from mla_jax.model.cache import Cache, empty_cache
from mla_jax.model.transformer import Transformer


class Plan(NamedTuple):
  """What a decode program is compiled for."""

  drafts: int  # verified a round; 0: plain decoding
  sampled: bool  # False: every row is greedy
  alternatives: int  # most probable tokens recorded beside each new one
  form: str  # of attention while decoding: 'absorbed' or 'expanded'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
  """Of the rounds so far, over rows that were not done. T is the draft's place."""

  rounds: jax.Array  # verifications
  tokens: jax.Array  # new tokens they gave
  tried_T: jax.Array  # drafts whose place got a token
  accepted_T: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A batch of sequences while they grow. A is the number of alternatives."""

  cache: Cache
  tokens_BS: jax.Array  # known tokens, then the drafts
  logprob_BS: jax.Array  # of the new tokens, before temperature and filters
  other_ids_BSA: jax.Array
  other_logprobs_BSA: jax.Array
  length_B: jax.Array  # known tokens
  end_B: jax.Array  # length that max_new_tokens allows
  done_B: jax.Array
  sampling: Sampling
  eos: jax.Array  # ids of the tokens that end a row; -1: none
  trail_BTD: jax.Array  # main hidden states of the depth - 1 positions before the newest
  q_BTW: jax.Array  # distributions the drafts were sampled from; empty when all rows are greedy
  tally: Tally


def verify(p_BUW, q_BTW, draft_BT, seed_B, position_B):
  """Accepts draft x with probability min(1, p(x) / q(x)) while all before it were; then one token from the
  normalised (p - q)+ at the first rejection, or from p after the last draft. Each token is distributed as p.

  position_B is the first draft's. Returns (accepted drafts [B], tokens [B, U = T + 1], of which accepted + 1 count)."""
  drafts = draft_BT.shape[1]
  slot_U = jnp.arange(drafts + 1)
  uniform_BT = uniform(seed_B, position_B[:, None] + slot_U[:drafts], ACCEPT)
  p_BT, q_BT = (jnp.take_along_axis(x[:, :drafts], draft_BT[..., None], axis=-1)[..., 0] for x in (p_BUW, q_BTW))
  accepted_B = jnp.cumprod(uniform_BT * q_BT < p_BT, axis=1).sum(1).astype(jnp.int32)
  q_BUW = jnp.pad(q_BTW, ((0, 0), (0, 1), (0, 0)))  # nothing was drafted there: the rest of p is p
  p_BW, q_BW = (jnp.take_along_axis(x, accepted_B[:, None, None], axis=1)[:, 0] for x in (p_BUW, q_BUW))
  rest_BW = jnp.maximum(p_BW - q_BW, 0)
  # Where rounding alone kept p from covering q, nothing is left of p - q.
  rest_BW = jnp.where(rest_BW.sum(-1, keepdims=True) > 0, rest_BW, p_BW)
  last_B = draw(rest_BW, seed_B, position_B + accepted_B, TOKEN)
  return accepted_B, jnp.where(slot_U < accepted_B[:, None], jnp.pad(draft_BT, ((0, 0), (0, 1))), last_B[:, None])


def verify_greedy(logits_BUW, draft_BT):
  """As `verify` for rows that take the argmax."""
  best_BU = logits_BUW.argmax(-1).astype(jnp.int32)
  return jnp.cumprod(best_BU[:, :-1] == draft_BT, axis=1).sum(1).astype(jnp.int32), best_BU


def prefill(model: Transformer, plan: Plan, tokens_BS, length_B, end_B, sampling: Sampling, eos, window: int,
            dtype) -> State:
  """Runs prompts of up to `window` tokens (left-aligned in tokens_BS), chooses the first new token, drafts."""
  config, (batch, capacity) = model.config, tokens_BS.shape
  cache = empty_cache(config, batch, capacity, dtype, mtp=plan.drafts > 0)
  hidden_BTD, cache = model.cached(_take(tokens_BS, length_B - window, window), cache, length_B, length_B,
                                   form='expanded', fresh=True)
  width = config.vocab_size if plan.sampled else 0
  others = (batch, capacity, plan.alternatives)
  count = jnp.zeros((), jnp.int32)
  state = State(
      cache=cache, tokens_BS=tokens_BS, logprob_BS=jnp.zeros(tokens_BS.shape, jnp.float32),
      other_ids_BSA=jnp.zeros(others, jnp.int32), other_logprobs_BSA=jnp.zeros(others, jnp.float32),
      length_B=length_B, end_B=end_B, done_B=jnp.zeros(batch, bool), sampling=sampling, eos=eos,
      trail_BTD=hidden_BTD[:, :0], q_BTW=jnp.zeros((batch, 0, width), jnp.float32),
      tally=Tally(count, count, *jnp.zeros((2, plan.drafts), jnp.int32)))
  state, _ = _accept(model, plan, state, hidden_BTD[:, -1:])
  return _propose(model, plan, state, hidden_BTD, length_B, form='expanded', fresh=True)


def decode_round(model: Transformer, plan: Plan, state: State) -> State:
  """One verification and the next drafts. Rows that are done stay as they are."""
  before_B = state.length_B
  inputs_BU = _take(state.tokens_BS, before_B - 1, plan.drafts + 1)
  hidden_BUD, cache = model.cached(inputs_BU, state.cache, before_B + plan.drafts, form=plan.form)
  state, accepted_B = _accept(model, plan, dataclasses.replace(state, cache=cache), hidden_BUD)
  new_B = state.length_B - before_B
  slot_T = jnp.arange(plan.drafts)
  tried_BT = slot_T < new_B[:, None]
  tally = Tally(rounds=(new_B > 0).sum(dtype=jnp.int32), tokens=new_B.sum(dtype=jnp.int32),
                tried_T=tried_BT.sum(0, dtype=jnp.int32),
                accepted_T=(tried_BT & (slot_T < accepted_B[:, None])).sum(0, dtype=jnp.int32))
  state = dataclasses.replace(state, tally=jax.tree.map(jnp.add, state.tally, tally))
  return _propose(model, plan, state, jnp.concatenate([state.trail_BTD, hidden_BUD], axis=1), before_B + plan.drafts,
                  form=plan.form, fresh=False)


def _accept(model: Transformer, plan: Plan, state: State, hidden_BUD) -> tuple[State, jax.Array]:
  """Adds tokens to the rows: as many drafts as are accepted of the U - 1 verified, which come second, and one more."""
  with jax.named_scope('decode/verify'):
    logits_BUW = model.logits(hidden_BUD)
    drafts = logits_BUW.shape[1] - 1
    draft_BT = _take(state.tokens_BS, state.length_B, drafts)
    if plan.sampled:
      accepted_B, new_BU = verify(distribution(logits_BUW, state.sampling), state.q_BTW, draft_BT,
                                  state.sampling.seed_B, state.length_B)
    else:
      accepted_B, new_BU = verify_greedy(logits_BUW, draft_BT)
  with jax.named_scope('decode/accept'):
    slot_U = jnp.arange(drafts + 1)
    ends_BU = (new_BU[..., None] == state.eos).any(-1)
    first_end_B = jnp.where(ends_BU.any(1), ends_BU.argmax(1), drafts)
    count_B = jnp.minimum(jnp.minimum(accepted_B, first_end_B) + 1, state.end_B - state.length_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    kept_BU = slot_U < count_B[:, None]
    length_B = state.length_B + count_B
    place_BU = jnp.where(kept_BU, state.length_B[:, None] + slot_U, state.tokens_BS.shape[1])  # past the end: dropped
    logprob_BUW = jax.nn.log_softmax(logits_BUW, axis=-1)
    other_logprobs_BUA, other_ids_BUA = jax.lax.top_k(logprob_BUW, plan.alternatives)

    def put(x_BS, new_BU):
      return x_BS.at[jnp.arange(len(x_BS))[:, None], place_BU].set(new_BU, mode='drop')

    state = dataclasses.replace(
        state, tokens_BS=put(state.tokens_BS, new_BU),
        logprob_BS=put(state.logprob_BS, jnp.take_along_axis(logprob_BUW, new_BU[..., None], axis=-1)[..., 0]),
        other_ids_BSA=put(state.other_ids_BSA, other_ids_BUA),
        other_logprobs_BSA=put(state.other_logprobs_BSA, other_logprobs_BUA),
        length_B=length_B, done_B=state.done_B | (length_B >= state.end_B) | (ends_BU & kept_BU).any(1))
    return state, accepted_B


def _propose(model: Transformer, plan: Plan, state: State, hidden_BTD, window_end_B, *, form: str,
             fresh: bool) -> State:
  """Drafts the next tokens. hidden_BTD are main hidden states of the T positions before window_end_B; those from a
  row's newest position on are of rejected drafts."""
  if not plan.drafts:
    return state
  with jax.named_scope('decode/propose'):
    modules = model.config.num_nextn_predict_layers
    length = hidden_BTD.shape[1]
    start_B = window_end_B - length
    slot_B = state.length_B - 2 - start_B  # of the position before the newest
    trail = min(modules, plan.drafts) - 1
    trail_BTD = _take(hidden_BTD, slot_B - trail + 1, trail)
    batch, width = len(state.length_B), model.config.vocab_size if plan.sampled else 0
    q_BTW = jnp.zeros((batch, plan.drafts, width), jnp.float32)

    def draft(d, hidden_B1D, tokens_BS, q_BTW):
      """Chooses draft d from the hidden state that predicts it."""
      logits_B1W, place_B = model.logits(hidden_B1D), state.length_B + d - 1
      if plan.sampled:
        p_B1W = distribution(logits_B1W, state.sampling)
        q_BTW = jax.lax.dynamic_update_slice_in_dim(q_BTW, p_B1W, d - 1, axis=1)
        draft_B = draw(p_B1W[:, 0], state.sampling.seed_B, place_B, DRAFT)
      else:
        draft_B = logits_B1W[:, 0].argmax(-1).astype(jnp.int32)
      return tokens_BS.at[jnp.arange(batch), place_B].set(draft_B), q_BTW

    def reapply(d, carry):
      cache, tokens_BS, q_BTW, hidden_B1D = carry
      position_B = state.length_B - 2 + d - modules
      hidden_B1D, cache = model.mtp_cached(modules, hidden_B1D, _take(tokens_BS, position_B + modules, 1), cache,
                                           position_B + 1, form=plan.form)
      return cache, *draft(d, hidden_B1D, tokens_BS, q_BTW), hidden_B1D

    cache, tokens_BS = state.cache, state.tokens_BS
    for d in range(1, trail + 2):
      hidden_BTD, cache = model.mtp_cached(d, hidden_BTD, _take(tokens_BS, start_B + d, length), cache, window_end_B,
                                           jnp.minimum(window_end_B, length), form=form, fresh=fresh)
      last_B1D = _take(hidden_BTD, slot_B, 1)
      tokens_BS, q_BTW = draft(d, last_B1D, tokens_BS, q_BTW)
    if plan.drafts > modules:
      cache, tokens_BS, q_BTW, _ = jax.lax.fori_loop(modules + 1, plan.drafts + 1, reapply,
                                                     (cache, tokens_BS, q_BTW, last_B1D))
    return dataclasses.replace(state, tokens_BS=tokens_BS, cache=cache, trail_BTD=trail_BTD, q_BTW=q_BTW)


def _take(x_BS, start_B, count: int):
  """x[b, start_b : start_b + count], its first or last entry where that is outside."""
  index_BT = start_B[:, None] + jnp.arange(count)
  return jnp.take_along_axis(x_BS, index_BT.reshape(*index_BT.shape, *(1,) * (x_BS.ndim - 2)), axis=1, mode='clip')

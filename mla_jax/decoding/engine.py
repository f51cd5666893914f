"""The host's side of decoding: shapes, compilation, time. The device runs many rounds a call, so the host looks in a
few times a second, to stream, to find stop strings, to end."""

import contextlib
import dataclasses
import functools
import json
import operator
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.config import ConfigError, ModelConfig, from_dict, to_dict
from mla_jax.decoding import speculative
from mla_jax.decoding.sampling import make_sampling, per_row
from mla_jax.decoding.speculative import Plan, State
from mla_jax.model.attention import FORMS
from mla_jax.model.cache import bytes_per_token
from mla_jax.model.layers import cast
from mla_jax.model.transformer import abstract

SECONDS_A_CALL = 0.1  # what a device call aims at: short for a reader, long beside the host's part
MAX_ROUNDS_A_CALL = 256
EOS_IDS = 4  # a multiple of them has room in a program, which does not depend on their number then
SPECULATIVE = ('auto', 'on', 'off')


@dataclasses.dataclass(frozen=True)
class Stats:
  """Of one call, over all its rows. Compilation is in compile_seconds alone: programs are compiled before the clock of
  the others starts. Rates are None where nothing was measured."""

  new_tokens: int  # those returned
  tokens_per_second: float | None  # tokens after each row's first, over the time from the first tokens to the end
  time_to_first_token: float  # seconds: prefill of all prompts, their first tokens and the first drafts
  acceptance_rate: list[float | None]  # entry i: accepted at draft i, over drafts i whose predecessors all were
  tokens_per_step: float | None  # new tokens a verification
  cache_bytes_per_token: dict[str, int]  # 'main': the main model's layers; 'with_mtp'
  peak_memory: int | None  # bytes on the device since the process began; None on CPU
  compile_seconds: float


@functools.cache
def _graph(config_json: str):
  return abstract(from_dict(ModelConfig, json.loads(config_json))).graph


class Program:
  """A jitted function that is compiled apart from its first call, once for each set of shapes and static arguments."""

  def __init__(self, function, **options):
    self._jitted, self._compiled = jax.jit(function, **options), {}

  def prepare(self, *args, **static):
    """(compiled function, shapes of its result)."""
    leaves, tree = jax.tree.flatten(args)
    key = (tree, *((x.shape, x.dtype) for x in leaves), *static.values())
    if key not in self._compiled:
      lowered = self._jitted.lower(*args, **static)
      self._compiled[key] = lowered.compile(), lowered.out_info
    return self._compiled[key]


@functools.cache
def _programs(config_json: str, plan: Plan) -> tuple[Program, Program]:
  """(prefill, rounds), shared by all decoders of models with this config."""

  def prefill(params, buffers, *args, window, dtype):
    return speculative.prefill(nnx.merge(_graph(config_json), params, buffers), plan, *args, window, dtype)

  def rounds(params, buffers, state: State, count):
    model = nnx.merge(_graph(config_json), params, buffers)

    def going(carry):
      i, state = carry
      return (i < count) & ~state.done_B.all()

    def body(carry):
      i, state = carry
      return i + 1, speculative.decode_round(model, plan, state)

    return jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state))[1]

  return Program(prefill, static_argnames=('window', 'dtype')), Program(rounds, donate_argnames='state')


def round_up(n: int) -> int:
  """A length that programs are compiled for: few different ones, at most a quarter (or 256) more than asked for."""
  step = max(256, 1 << max(n.bit_length() - 3, 0))
  return -(-n // step) * step


def prompt_window(n: int) -> int:
  return max(16, 1 << (n - 1).bit_length())


def whole_number(name: str, value) -> int:
  try:
    return operator.index(value)
  except TypeError:
    raise ConfigError(f'{name}={value!r} is no whole number; use one') from None


class Decoder:
  """A model ready to decode: weights in the dtype they compute in. float32 computes at highest precision."""

  def __init__(self, config: ModelConfig, params, buffers, dtype):
    self.config, self.dtype = config, jnp.dtype(dtype)
    self.config_json = json.dumps(to_dict(config))
    self.params, self.buffers = jax.device_put((cast(params, self.dtype), buffers))

  @property
  def graph(self):
    return _graph(self.config_json)

  def precision(self):
    return jax.default_matmul_precision('highest') if self.dtype == jnp.float32 else contextlib.nullcontext()

  def start(self, prompts: list[list[int]], *, max_new_tokens=128, eos_ids: Sequence[int] = (),
            speculative='auto', draft_tokens: int | None = None, attention='absorbed', logprobs: int = 0,
            **sampling) -> 'Run':
    """Checks everything, then runs the prompts. A token of `eos_ids` ends its row. max_new_tokens and what
    `make_sampling` takes may be given a row. Raises ConfigError, one line."""
    c = self.config
    if not prompts:
      raise ConfigError('there is no prompt; give at least one')
    limits = per_row('max_new_tokens', max_new_tokens, len(prompts), np.int32)
    if limits.min() < 1:
      raise ConfigError(f'max_new_tokens={limits.min()} is below 1; use at least 1')
    prompts = [self.check_tokens(f'prompt {i}', prompt) for i, prompt in enumerate(prompts)]
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
      if prompt.ndim != 1:
        raise ConfigError(f'prompt {i} has shape {list(prompt.shape)}; give a list of token ids')
      if len(prompt) + limit > c.max_position_embeddings:
        raise ConfigError(f'prompt {i} has {len(prompt)} tokens, which with max_new_tokens={limit} is more than the '
                          f"model's max_position_embeddings={c.max_position_embeddings}; use a shorter prompt or fewer")
    settings = make_sampling(len(prompts), **sampling)
    if attention not in FORMS:
      raise ConfigError(f'attention={attention!r} is unknown; use one of {", ".join(map(repr, FORMS))}')
    logprobs = whole_number('logprobs', logprobs)
    if not 0 <= logprobs <= c.vocab_size:
      raise ConfigError(f'logprobs={logprobs} is outside 0 to vocab_size={c.vocab_size}; use e.g. 5')
    plan = Plan(self._drafts(speculative, draft_tokens), bool((settings.temperature_B > 0).any()), logprobs, attention)
    return Run(self, plan, prompts, limits, settings, eos_ids)

  def check_tokens(self, name: str, tokens) -> np.ndarray:
    """As int32. Raises ConfigError where there is none, or one that the model doesn't know."""
    try:
      tokens = np.asarray(tokens)
    except ValueError:
      raise ConfigError(f'{name} holds lists of different lengths; give plain token ids') from None
    if not tokens.size:
      raise ConfigError(f'{name} is empty; give at least one token')
    if not np.issubdtype(tokens.dtype, np.integer):
      raise ConfigError(f'{name} holds {tokens.flat[0]!r}, which is no token id; use whole numbers')
    wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
    if wrong.size:
      raise ConfigError(f'{name} has token id {wrong[0]}, but the vocabulary has 0 to {self.config.vocab_size - 1}; '
                        'use the tokenizer the model was trained with')
    return tokens.astype(np.int32)

  def _drafts(self, speculative: str, draft_tokens: int | None) -> int:
    modules = self.config.num_nextn_predict_layers
    if speculative not in SPECULATIVE:
      raise ConfigError(f'speculative={speculative!r} is unknown; use one of {", ".join(map(repr, SPECULATIVE))}')
    if draft_tokens is not None and whole_number('draft_tokens', draft_tokens) < 1:
      raise ConfigError(f"draft_tokens={draft_tokens} is below 1; use at least 1, or speculative='off'")
    if speculative == 'on' and not modules:
      raise ConfigError("speculative='on' drafts with MTP modules, but the model has num_nextn_predict_layers=0; use "
                        "'auto' or 'off'")
    return 0 if speculative == 'off' or not modules else draft_tokens or modules


class Run:
  """A batch while it grows: `advance()` until `finished`; `new(row)` at any time."""

  def __init__(self, decoder: Decoder, plan: Plan, prompts, limits, sampling, eos_ids: Sequence[int]):
    self.decoder, self.plan, self.eos_ids = decoder, plan, list(eos_ids)
    self.prompt_lengths = np.array([len(p) for p in prompts], np.int32)
    ends = (self.prompt_lengths + limits).astype(np.int32)
    capacity = round_up(int(ends.max()) + plan.drafts)
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
      row[:len(prompt)] = prompt
    eos = np.full(-(-max(len(self.eos_ids), 1) // EOS_IDS) * EOS_IDS, -1, np.int32)
    eos[:len(self.eos_ids)] = self.eos_ids
    args = (decoder.params, decoder.buffers, tokens_BS, self.prompt_lengths, ends, sampling, eos)
    static = dict(window=prompt_window(int(self.prompt_lengths.max())), dtype=decoder.dtype)
    prefill, rounds = _programs(decoder.config_json, plan)
    began = time.perf_counter()
    with decoder.precision():
      run_prefill, state = prefill.prepare(*args, **static)
      self._rounds, _ = rounds.prepare(decoder.params, decoder.buffers, state, np.int32(0))
    self.compile_seconds = time.perf_counter() - began
    began = time.perf_counter()
    self.state = run_prefill(*args)
    self._fetch()
    self.time_to_first_token = time.perf_counter() - began
    self.decode_seconds, self._count = 0.0, 1

  @property
  def finished(self) -> bool:
    return bool(self.done.all())

  def advance(self):
    """Runs rounds for about SECONDS_A_CALL, or until every row is done."""
    began = time.perf_counter()
    self.state = self._rounds(self.decoder.params, self.decoder.buffers, self.state, np.int32(self._count))
    self._fetch()
    seconds = time.perf_counter() - began
    self.decode_seconds += seconds
    self._count = int(np.clip(self._count * SECONDS_A_CALL / seconds, 1, min(4 * self._count, MAX_ROUNDS_A_CALL)))

  def stop(self, row: int):
    """Ends a row from outside."""
    self.done[row] = True
    self.state = dataclasses.replace(self.state, done_B=jnp.array(self.done))  # a copy: the state is donated

  def new(self, row: int) -> np.ndarray:
    """The ids of a row's new tokens so far; one that ended it is the last."""
    return self.tokens_BS[row, self.prompt_lengths[row]:self.lengths[row]]

  def scores(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each row, over its new tokens: their log-probabilities [T], and the most probable tokens' ids and
    log-probabilities [T, plan.alternatives]."""
    # Whole arrays: slicing on the device would compile a program a slice.
    arrays = jax.tree.map(np.array, (self.state.logprob_BS, self.state.other_ids_BSA, self.state.other_logprobs_BSA))
    return [tuple(x[row, start:end] for x in arrays)
            for row, (start, end) in enumerate(zip(self.prompt_lengths, self.lengths, strict=True))]

  def stats(self, new_tokens: int) -> Stats:
    config, tally = self.decoder.config, jax.device_get(self.state.tally)
    memory = jax.local_devices()[0].memory_stats() or {}
    return Stats(
        new_tokens=new_tokens,
        tokens_per_second=_ratio(new_tokens - len(self.done), self.decode_seconds),
        time_to_first_token=self.time_to_first_token,
        acceptance_rate=[_ratio(a, t) for a, t in zip(tally.accepted_T, tally.tried_T, strict=True)],
        tokens_per_step=_ratio(tally.tokens, tally.rounds),
        cache_bytes_per_token={'main': bytes_per_token(config, self.decoder.dtype, mtp=False),
                               'with_mtp': bytes_per_token(config, self.decoder.dtype, mtp=True)},
        peak_memory=memory.get('peak_bytes_in_use'),
        compile_seconds=self.compile_seconds)

  def _fetch(self):
    # Copies: on CPU these would be views of buffers that the next call donates.
    state = self.state
    self.tokens_BS, self.lengths, self.done = map(np.array, (state.tokens_BS, state.length_B, state.done_B))


def _ratio(part, whole) -> float | None:
  return float(part / whole) if whole else None

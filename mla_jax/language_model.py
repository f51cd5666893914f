"""LanguageModel: load a run or a Hugging Face directory, then generate, stream, score."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.checkpoint import carried, hugging_face, store
from mla_jax.checkpoint.agreement import weight_dtype
from mla_jax.checkpoint.tensor_files import HFError, read_json
from mla_jax.config import ConfigError, ModelConfig
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.decoding.engine import Decoder, Run, Stats

_NO_TOKENIZER = ('this model has no tokenizer.json beside it, so it takes and gives token ids alone; '
                 'add the file, or pass lists of ids and no stop strings')
PROMPT_CONTEXT = 8  # tokens of the prompt that a streaming tokenizer sees first: spaces and characters can go on


@dataclasses.dataclass(frozen=True)
class Completion:
  """What one prompt got. Log-probabilities are natural, of the model's distribution before temperature and filters."""

  text: str | None  # None without a tokenizer; a stop string and what follows are cut off
  tokens: list[int]  # up to the one that ended it, included
  logprobs: list[float]
  finish_reason: str  # 'stop': end of text or a stop string; 'length': max_new_tokens
  alternatives: list[dict[int, float]]  # at each token the `logprobs` most probable ones


class Completions(list):
  """One Completion a prompt, in order, and `stats` of the whole call."""

  def __init__(self, completions, stats: Stats):
    super().__init__(completions)
    self.stats = stats


class LanguageModel:

  def __init__(self, config: ModelConfig, params, buffers, tokenizer: Tokenizer | None = None, dtype=None):
    """`dtype` None: that of the embedding in `params`. Raises ConfigError where weights can't have it."""
    self.config, self.tokenizer = config, tokenizer
    self.tokenizer_folder: Path | None = None  # whose files `save_hf` carries over; None: the tokenizer's own
    self.eos_ids = [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]  # each ends a text
    dtype = weight_dtype(params['embedding_WD'].dtype if dtype is None else dtype)
    self.decoder = Decoder(config, params, buffers, dtype)
    self._logits = jax.jit(self._compute_logits)
    self._mtp_logits = jax.jit(self._compute_mtp_logits)

  @classmethod
  def load(cls, path: str | Path, dtype=None, fp8: str = 'dequantise') -> 'LanguageModel':
    """From a workdir of train.py (its newest checkpoint) or a Hugging Face directory, which it tells apart by
    config.json. `dtype` None: as stored; 'float32' computes at highest precision. `fp8`: 'keep' leaves FP8 weights of a
    Hugging Face directory so in memory, and computes the same with them. A missing tokenizer is no error until text is
    asked for. Raises ConfigError, one line."""
    path, dtype = Path(path).expanduser(), weight_dtype(dtype)
    try:
      stored = read_json(path / 'config.json')
    except HFError as error:
      raise ConfigError(f'{path} holds no readable config.json ({error}); '
                        'give a workdir of train.py or a Hugging Face model directory') from None
    if 'training' in stored:
      if fp8 != 'dequantise':
        raise ConfigError(f'fp8={fp8} is for Hugging Face directories; {path} is a workdir of train.py, which has no '
                          'FP8 weights; leave it out')
      config, params, buffers = store.read_run(path)
      config, tokenizer = config.model, path / 'tokenizer'
    else:
      config, params, buffers = hugging_face.load(
          path, dtype, place=jax.sharding.SingleDeviceSharding(jax.devices()[0]), fp8=fp8)
      tokenizer = path
    found = (tokenizer / 'tokenizer.json').is_file()
    lm = cls(config, params, buffers, load_tokenizer(tokenizer) if found else None, dtype)
    lm.tokenizer_folder, lm.eos_ids = tokenizer, lm.eos_ids or carried.end_ids(tokenizer)
    return lm

  def generate(self, prompts, *, stop: str | Sequence[str] = (), **options) -> Completions:
    """Continues prompts: a text, a list of token ids, or a list of these. Texts get the tokenizer's beginning-of-text
    token in front; ids are taken as they are.

    stop: strings that end a row. Other options, and their defaults (one value, or one a prompt, for all up to seed):
    max_new_tokens=128, temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, seed=0; speculative='auto' (drafts
    where the model has MTP modules), draft_tokens=None (their number), attention='absorbed' | 'expanded' while
    decoding, logprobs=0 (alternatives a token). A row depends on its own prompt, settings and seed, not on the others.

    Raises ConfigError, one line. `.stats` leaves compilation out of every rate."""
    several = _as_list(prompts)
    one = several and all(isinstance(token, int | np.integer) for token in several) and not np.isscalar(prompts)
    run, texts = self._start([several] if one else several, stop, options)
    _read(run, texts)
    while not run.finished:
      run.advance()
      _read(run, texts)
    return _finish(run, texts)

  def stream(self, prompt, *, stop: str | Sequence[str] = (), **options) -> 'Stream':
    """As `generate` for one prompt, in pieces of text as they are decided."""
    if self.tokenizer is None:
      raise ConfigError(_NO_TOKENIZER)
    return Stream(*self._start([prompt], stop, options))

  def logits(self, tokens_BT) -> jax.Array:
    """Of the token after each position, float32 [B, T, vocabulary], all tokens given (teacher forcing)."""
    return self._run(self._logits, tokens_BT)

  def mtp_logits(self, tokens_BT) -> jax.Array:
    """Float32 [depth, B, T, vocabulary]: [d - 1, :, t] is module d predicting token t + 1 + d. Its last d positions
    are NaN: they would need tokens that are not there. Raises ConfigError where the model has no MTP modules."""
    if not self.config.num_nextn_predict_layers:
      raise ConfigError('the model has no MTP modules (num_nextn_predict_layers=0); use logits')
    return self._run(self._mtp_logits, tokens_BT)

  def save_hf(self, path: str | Path, dtype=None, fp8: str | None = None):
    """Writes a Hugging Face directory, MTP layers and tokenizer included, that transformers and vLLM read too.
    `dtype` None: weights as they are held here, which is exact. `fp8`: 'float32' or 'ue8m0', the format of the scales;
    the matrices that DeepSeek publishes in FP8 become so. Weights kept in FP8 are written as they were read. Raises
    ConfigError, one line."""
    with tempfile.TemporaryDirectory() as folder:
      if self.tokenizer_folder is None and self.tokenizer is not None:
        self.tokenizer.save(folder)
      hugging_face.save(path, self.config, self.decoder.params, self.decoder.buffers, dtype=dtype, fp8=fp8,
                        tokenizer=self.tokenizer_folder or folder)

  def _run(self, function, tokens_BT):
    tokens_BT = self.decoder.check_tokens('tokens', tokens_BT)
    if tokens_BT.ndim != 2:
      raise ConfigError(f'tokens have shape {list(tokens_BT.shape)}; give [batch, length]')
    limit = self.config.max_position_embeddings
    if tokens_BT.shape[1] > limit:
      raise ConfigError(f"tokens are {tokens_BT.shape[1]} long, above the model's max_position_embeddings={limit}; "
                        'give shorter texts')
    with self.decoder.precision():
      return function(self.decoder.params, self.decoder.buffers, tokens_BT)

  def _compute_logits(self, params, buffers, tokens_BT):
    return nnx.merge(self.decoder.graph, params, buffers)(tokens_BT)[0]

  def _compute_mtp_logits(self, params, buffers, tokens_BT):
    model, (batch, length) = nnx.merge(self.decoder.graph, params, buffers), tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
    one_BT = jnp.ones((batch, length), jnp.int32)
    hidden_BTD, _ = model.hidden(tokens_BT)
    out = []
    for d in range(1, self.config.num_nextn_predict_layers + 1):
      ahead_BT = jnp.pad(tokens_BT, ((0, 0), (0, d)))[:, d:]
      hidden_BTD, _ = model.mtp_hidden(d, hidden_BTD, ahead_BT, positions_BT, one_BT, one_BT > 0)
      known_T1 = (jnp.arange(length) < length - d)[:, None]
      out.append(jnp.where(known_T1, model.logits(hidden_BTD), jnp.nan))
    return jnp.stack(out)

  def _start(self, prompts, stop, options) -> tuple[Run, list['Text']]:
    stops = [] if stop is None else _as_list(stop)
    for text in stops:
      if not isinstance(text, str):
        raise ConfigError(f'stop has {text!r}, which is no text; use strings')
    if '' in stops:
      raise ConfigError("stop has '', which every text contains; use at least one character")
    needs_text = stops or any(isinstance(p, str) for p in prompts)
    if needs_text and self.tokenizer is None:
      raise ConfigError(_NO_TOKENIZER)
    ids = [self._encode(i, p) if isinstance(p, str) else p for i, p in enumerate(prompts)]
    run = self.decoder.start(ids, eos_ids=self.eos_ids, **options)
    return run, [Text(self.tokenizer, prompt, stops) for prompt in ids]

  def _encode(self, i: int, prompt: str) -> list[int]:
    if not prompt:
      raise ConfigError(f'prompt {i} is empty; give some text')
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise ConfigError(f'prompt {i} is no valid text (character {error.start} is half a surrogate pair); '
                        'give UTF-8') from None
    bos = self.tokenizer.bos_id
    return ([] if bos is None else [bos]) + self.tokenizer.encode(prompt)


class Stream:
  """Iterates over pieces of text. After the last one, `completions` is what `generate` would have returned."""

  def __init__(self, run: Run, texts: list['Text']):
    self._run, self._texts = run, texts
    self.completions: Completions | None = None

  def __iter__(self) -> Iterator[str]:
    run, (text,) = self._run, self._texts
    while True:
      _read(run, [text])
      if piece := text.take():
        yield piece
      if run.finished:
        break
      run.advance()
    self.completions = _finish(run, [text])


class Text:
  """The text of a row as its tokens come, up to the first stop string."""

  def __init__(self, tokenizer: Tokenizer | None, prompt, stops: list[str]):
    self.tokens: list[int] = []
    self.text = None if tokenizer is None else ''
    self.stopped = self.finished = False  # found a stop string; will not change any more
    self._stops, self._taken = stops, 0
    self._stream = None if tokenizer is None else tokenizer.stream()
    if self._stream is not None:
      context = [int(token) for token in prompt[-PROMPT_CONTEXT:]]
      # The prompt's own text, of which the tokenizer may hold some back until the first new token.
      self._skip = len(tokenizer.decode(context).rstrip('\ufffd')) - len(self._stream.push(context))

  def push(self, ids: list[int]):
    """Takes new tokens. Those after the one that completes a stop string are dropped."""
    if self._stream is None:
      self.tokens += ids
      return
    for token in ids:
      self.tokens.append(token)
      self._add(self._stream.push([token]))
      if self.stopped:
        break

  def finish(self):
    """No more tokens will come: what the tokenizer held back is text too."""
    if self._stream is not None and not self.finished:
      self._add(self._stream.finish())
    self.finished = True

  def take(self) -> str:
    """What has become certain since the last call: not what may be the beginning of a stop string."""
    end = len(self.text)
    if not self.finished:
      end = min((end - n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
                default=end)
    piece, self._taken = self.text[self._taken:end], end
    return piece

  def _add(self, piece: str):
    piece, self._skip = piece[self._skip:], max(0, self._skip - len(piece))
    known = len(self.text)
    self.text += piece
    # A stop string may begin in the text that was there before.
    places = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stops]
    places = [place for place in places if place >= 0]
    if places:
      self.text, self.stopped, self.finished = self.text[:min(places)], True, True


def _read(run: Run, texts: list[Text]):
  """Hands the rows' new tokens to their texts, and ends rows whose text has a stop string."""
  for row, text in enumerate(texts):
    if text.finished:
      continue
    text.push(run.new(row)[len(text.tokens):].tolist())
    if run.done[row]:
      text.finish()
    elif text.stopped:
      run.stop(row)


def _finish(run: Run, texts: list[Text]) -> Completions:
  out = []
  for text, scores in zip(texts, run.scores(), strict=True):
    logprobs, *others = (x[:len(text.tokens)].tolist() for x in scores)
    alternatives = [dict(zip(*pair, strict=True)) for pair in zip(*others, strict=True)]
    stopped = text.stopped or text.tokens[-1] in run.eos_ids
    out.append(Completion(text.text, text.tokens, logprobs, 'stop' if stopped else 'length', alternatives))
  return Completions(out, run.stats(sum(len(completion.tokens) for completion in out)))


def _as_list(values) -> list:
  """One text or several things -> several. What is neither becomes one, for its check to refuse."""
  if isinstance(values, jax.Array):
    values = np.asarray(values)  # whose numbers are numbers, not arrays
  try:
    return [values] if isinstance(values, str) else list(values)
  except TypeError:
    return [values]

"""Where does a mixture-of-experts layer spend its time, forward and backward?

    python -m benchmarks.moe_layer [--tokens=32768] [--trace=/tmp/trace]

At DeepSeek-V2-Lite's widths in bfloat16 (on a CPU a small layer in float32): the router, the sort and the routed
experts of the model itself, mla_jax.model.moe.MixtureOfExperts without its shared experts, which are a dense network.
Gradients go to the tokens, the router and both weights of the experts, and to the balance loss.

One JSON line a stage: the stage alone, as a jitted function of its own on the layer's data, its milliseconds and share
of the whole layer, the least bytes it moves or its FLOPs, the rate it reached, and the milliseconds predicted for an
H200 (4.3 TB/s; products at 600 TFLOP/s, to the weights 590). Stages of direction `other` are no part of the layer: ways
that were not taken. Then a line each for forward alone and for forward and backward:

  matmuls_over_whole = time of the grouped matmuls / time of the whole layer,

the part of the throughput its matmuls alone would allow; once with the matmuls as measured here and, on a GPU, once at
the rates above (matmuls_at_rates_over_whole; our target is 0.75). A layer is compiled as one program,
so that its stages alone may add up to more than the whole, or less.

--trace writes a profile and prints the time of each kernel of the whole, forward and backward.
"""

import collections
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import timing
from mla_jax.config import ModelConfig
from mla_jax.model import experts, layers, moe
from pallas_kernels import grouped_matmul, swiglu, swiglu_gradients
from pallas_kernels.grouped_matmul import registry

TOKENS = flags.DEFINE_integer('tokens', 0, 'In sequences of 4096; 0: 32768 on an accelerator, 512 on a CPU')
TRACE = flags.DEFINE_string('trace', '', 'Folder for a profile of the whole layer, whose kernels are then printed')

BYTES_A_SECOND, FLOPS, FLOPS_TO_WEIGHTS = 4.3e12, 600e12, 590e12
WIDTHS = {True: dict(hidden_size=2048, n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408),
          False: dict(hidden_size=128, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=64)}


class Stage(NamedTuple):
  name: str
  direction: str  # 'forward', 'backward', or 'other'
  run: object
  operands: tuple
  bytes: float = 0.0  # least that must be read and written
  flops: float = 0.0
  flops_a_second: float = FLOPS

  @property
  def predicted(self) -> float:
    """Seconds on one H200."""
    return self.flops / self.flops_a_second if self.flops else self.bytes / BYTES_A_SECOND


class Layer:
  """The model's layer with random weights, and its data after each stage."""

  def __init__(self, tokens: int, large: bool):
    self.config = c = ModelConfig(n_shared_experts=0, scoring_func='softmax', topk_method='greedy',
                                  norm_topk_prob=False, aux_loss_alpha=0.001, **WIDTHS[large])
    c.validate()
    length = min(tokens, 4096)
    if tokens % length:
      raise SystemExit(f'--tokens={tokens} is no multiple of 4096; use one, or less than 4096')
    dtype = jnp.bfloat16 if large else jnp.float32
    graph, params = nnx.split(moe.MixtureOfExperts(c, jax.random.key(0)))
    self.params = layers.cast(nnx.to_pure_dict(params), dtype)
    keys = jax.random.split(jax.random.key(1))
    self.x_BTD, self.dy_BTD = (jax.random.normal(k, (tokens // length, length, c.hidden_size), dtype) for k in keys)
    self.bias_E = jnp.zeros(c.n_routed_experts)
    self.valid_BT = jnp.ones(self.x_BTD.shape[:2], bool)

    def forward(params, x_BTD, bias_E, valid_BT):
      return nnx.merge(graph, params)(x_BTD, bias_E, valid_BT)

    def both(params, x_BTD, bias_E, valid_BT, dy_BTD):
      out, pull = jax.vjp(lambda *x: forward(*x, bias_E, valid_BT), params, x_BTD)
      out, dy_BTD = jax.lax.optimization_barrier((out, dy_BTD))  # as in a model, no gradient comes before the result
      cotangent = moe.Balance(jnp.zeros(c.n_routed_experts), jnp.float32(c.aux_loss_alpha))
      return out, pull((dy_BTD, cotangent))

    self.forward, self.both = jax.jit(forward), jax.jit(both)
    self.inputs = self.params, self.x_BTD, self.bias_E, self.valid_BT
    wi_ED2F = self.params['wi_ED2F'].reshape(*self.params['wi_ED2F'].shape[:2], -1)
    self.implementation = registry.best(self.x_BTD.reshape(-1, c.hidden_size), wi_ED2F).name

  def stages(self):
    """Each with the results of those before it."""
    c, router_DE = self.config, self.params['router_DE']
    wi_ED2F = self.params['wi_ED2F'].reshape(*self.params['wi_ED2F'].shape[:2], -1)
    wo_EFD, dtype = self.params['wo_EFD'], self.x_BTD.dtype
    count, chosen, width, hidden = c.n_routed_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size
    tokens, size = self.valid_BT.size, dtype.itemsize
    rows = tokens * chosen
    token_bytes, row_bytes, f_bytes = tokens * width * size, rows * width * size, rows * hidden * size
    score_bytes = tokens * count * 4
    product = 2 * rows * width * hidden  # the down projection's; gate and up are two

    def out(stage):
      return jax.block_until_ready(stage.run(*stage.operands))

    def stage(name, direction, run, *operands, **cost):
      return Stage(name, direction, jax.jit(run), operands, **cost)

    scores_of = functools.partial(moe.scores, scoring=c.scoring_func)
    yield (s := stage('route: scores', 'forward', scores_of, self.x_BTD, router_DE, bytes=token_bytes + score_bytes))
    scores_BTE = out(s)
    yield (s := stage('route: choose', 'forward', functools.partial(moe.choose, config=c), scores_BTE, self.bias_E,
                      bytes=score_bytes + 4 * rows))
    ids_BTX = out(s)
    yield (s := stage('route: weigh', 'forward', functools.partial(moe.weigh, config=c), scores_BTE, ids_BTX,
                      bytes=score_bytes + 8 * rows))
    weights_BTX = out(s)
    yield stage('route: balance', 'forward', functools.partial(moe.balance, config=c), scores_BTE, ids_BTX,
                self.valid_BT, bytes=score_bytes + 4 * rows)

    def flat(x):
      return x.reshape(-1, x.shape[-1])

    x_TD, dy_TD, ids_TX, weights_TX = map(flat, (self.x_BTD, self.dy_BTD, ids_BTX, weights_BTX))
    yield (s := stage('sort', 'forward', lambda ids: experts.sort(ids, 0, count), ids_TX, bytes=12 * rows))
    routes = out(s)
    yield (s := stage('spread', 'forward', experts.spread, x_TD, routes, bytes=2 * row_bytes))
    rows_MD = out(s)
    yield stage('spread, number by number', 'other', spread_numbers, x_TD, routes, bytes=2 * row_bytes)

    def product_of(lhs, rhs, routes):
      return grouped_matmul(lhs, rhs, routes.sizes_E, zero_tail=False)

    def gradient_of(argument):
      return lambda lhs, rhs, dy, routes: jax.vjp(lambda *x: product_of(*x, routes), lhs, rhs)[1](dy)[argument]

    yield (s := stage('matmul: gate and up', 'forward', product_of, rows_MD, wi_ED2F, routes, flops=2 * product))
    h_M2F = out(s)
    yield (s := stage('activate', 'forward', lambda h, w, r: swiglu(h, experts.weights_of_rows(w, r)), h_M2F,
                      weights_TX, routes, bytes=3 * f_bytes))
    activated_MF = out(s)
    yield (s := stage('matmul: down', 'forward', product_of, activated_MF, wo_EFD, routes, flops=product))
    y_MD = out(s)
    yield stage('collect', 'forward', experts.collect, y_MD, routes, bytes=row_bytes + token_bytes)
    yield stage('collect, weighted, of [T, X, D]', 'other', weighted_sum, y_MD, weights_TX, routes,
                bytes=row_bytes + token_bytes)

    yield (s := stage('collect, gradient', 'backward', experts.spread, dy_TD, routes, bytes=2 * row_bytes))
    dy_MD = out(s)
    yield (s := stage('matmul: down, to lhs', 'backward', gradient_of(0), activated_MF, wo_EFD, dy_MD, routes,
                      flops=product))
    da_MF = out(s)
    yield stage('matmul: down, to weights', 'backward', gradient_of(1), activated_MF, wo_EFD, dy_MD, routes,
                flops=product, flops_a_second=FLOPS_TO_WEIGHTS)
    def again(implementation):
      return lambda h, w, r, da: swiglu_gradients(h, experts.weights_of_rows(w, r), da, implementation=implementation)

    yield (s := stage('activate again and its gradient', 'backward', again(None), h_M2F, weights_TX, routes, da_MF,
                      bytes=6 * f_bytes))
    dh_M2F = out(s)[1]
    sample = h_M2F[:1024], experts.weights_of_rows(weights_TX, routes)[:1024], da_MF[:1024]
    ours, theirs = (swiglu_gradients(*sample, implementation=name) for name in (None, 'reference'))
    timing.print_line(check='swiglu_gradients against its reference, 1024 rows', relative_errors=[
        timing.relative_error(a, b) for a, b in zip(ours, theirs, strict=True)])
    yield stage('activate again and its gradient, by XLA', 'other', again('xla'), h_M2F, weights_TX, routes, da_MF,
                bytes=6 * f_bytes)
    yield (s := stage('matmul: gate and up, to lhs', 'backward', gradient_of(0), rows_MD, wi_ED2F, dh_M2F, routes,
                      flops=2 * product))
    drows_MD = out(s)
    yield stage('matmul: gate and up, to weights', 'backward', gradient_of(1), rows_MD, wi_ED2F, dh_M2F, routes,
                flops=2 * product, flops_a_second=FLOPS_TO_WEIGHTS)
    yield stage('spread, gradient', 'backward', experts.collect, drows_MD, routes, bytes=row_bytes + token_bytes)
    yield stage('spread, gradient by autodiff', 'other', scatter_add, x_TD, drows_MD, routes,
                bytes=row_bytes + token_bytes)

    def route_gradient(x_BTD, router_DE, ids_BTX, valid_BT, dweights_BTX):
      """Of scores, weights and balance loss; choices are given, for they have no gradient."""
      def run(x_BTD, router_DE):
        scores_BTE = scores_of(x_BTD, router_DE)
        return moe.weigh(scores_BTE, ids_BTX, c), moe.balance(scores_BTE, ids_BTX, valid_BT, c).loss

      return jax.vjp(run, x_BTD, router_DE)[1]((dweights_BTX, jnp.float32(c.aux_loss_alpha)))

    yield stage('route, gradient with its scores again', 'backward', route_gradient, self.x_BTD, router_DE,
                ids_BTX, self.valid_BT, weights_BTX, bytes=3 * token_bytes + 2 * score_bytes)


def spread_numbers(x_TD, routes):
  """As on a CPU: XLA's gather of the numbers as they are."""
  return x_TD.at[routes.choice_M // routes.place_TX.shape[1]].get(mode='promise_in_bounds')


def weighted_sum(y_MD, weights_TX, routes):
  y_TXD = y_MD[routes.place_TX.reshape(-1)].reshape(*routes.place_TX.shape, -1)
  return (y_TXD.astype(jnp.float32) * weights_TX[..., None]).sum(1).astype(y_MD.dtype)


def scatter_add(x_TD, drows_MD, routes):
  return jax.vjp(lambda x_TD: x_TD[routes.choice_M // routes.place_TX.shape[1]], x_TD)[1](drows_MD)


def measure(stage: Stage, launches: int) -> float:
  return timing.median_seconds(stage.run, stage.operands, launches=launches, repeats=3)


def print_kernels(layer: Layer, folder: str, steps: int = 5):
  """Milliseconds a step of what the profiler saw on the device, the longest first."""
  operands = *layer.inputs, layer.dy_BTD
  jax.block_until_ready(layer.both(*operands))
  with jax.profiler.trace(folder):
    for _ in range(steps):
      out = layer.both(*operands)
    jax.block_until_ready(out)
  file = max(pathlib.Path(folder).rglob('*.xplane.pb'), key=lambda f: f.stat().st_mtime)
  nanoseconds, calls = collections.Counter(), collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    if not plane.name.startswith('/device:'):
      continue
    for line in plane.lines:
      if line.name.startswith('Stream'):
        for event in line.events:
          nanoseconds[event.name] += event.duration_ns
          calls[event.name] += 1
  if not nanoseconds:
    print(f'no kernels in {file}: only a GPU reports them')
  for name, total in nanoseconds.most_common(60):
    timing.print_line(kernel=name[:120], ms=total / steps / 1e6, calls=calls[name] / steps)


def main(_):
  large = jax.default_backend() != 'cpu'
  launches = 20 if large else 3
  tokens = TOKENS.value or (32768 if large else 512)
  layer = Layer(tokens, large)
  c = layer.config
  common = dict(benchmark='moe_layer', hardware=timing.hardware(), implementation=layer.implementation,
                shape=f'T{tokens} D{c.hidden_size} E{c.n_routed_experts} X{c.num_experts_per_tok} '
                      f'F{c.moe_intermediate_size} {layer.x_BTD.dtype}')
  whole = {
      'forward': timing.median_seconds(layer.forward, layer.inputs, launches=launches),
      'forward and backward': timing.median_seconds(layer.both, (*layer.inputs, layer.dy_BTD),
                                                    launches=launches)}
  seconds, predicted = collections.Counter(), collections.Counter()
  for stage in layer.stages():
    taken = measure(stage, launches)
    rate = dict(tflops=stage.flops / taken / 1e12) if stage.flops else dict(
        gigabytes=stage.bytes / 1e9, tbytes_a_second=stage.bytes / taken / 1e12)
    timing.print_line(**common, stage=stage.name, direction=stage.direction, ms=taken * 1e3,
                      share_of_whole=taken / whole['forward and backward'], **rate,
                      **(dict(predicted_ms=stage.predicted * 1e3) if large else {}))
    kind = 'matmuls' if stage.flops else 'rest'
    seconds[stage.direction, kind] += taken
    predicted[stage.direction, kind] += stage.predicted
  for direction, taken in whole.items():
    parts = direction.split(' and ')
    sums, rates = ({kind: sum(times[part, kind] for part in parts) for kind in ('matmuls', 'rest')}
                   for times in (seconds, predicted))
    fields = dict(matmuls_at_rates_ms=rates['matmuls'] * 1e3, predicted_ms=sum(rates.values()) * 1e3,
                  matmuls_at_rates_over_whole=rates['matmuls'] / taken,
                  copy_tbytes_a_second=timing.copy_limit() / 1e12) if large else {}
    timing.print_line(**common, whole=direction, ms=taken * 1e3, stages_ms=sum(sums.values()) * 1e3,
                      matmuls_ms=sums['matmuls'] * 1e3, matmuls_over_whole=sums['matmuls'] / taken, **fields)
  if TRACE.value:
    print_kernels(layer, TRACE.value)


if __name__ == '__main__':
  app.run(main)

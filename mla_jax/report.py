"""A run's pictures: `python -m mla_jax.report WORKDIR` writes WORKDIR/report.html and WORKDIR/report/*.png.

The page is one file: its pictures are SVG inside it, it loads nothing and runs nothing. It reads config.json and
metrics.jsonl alone, so it can be made while the run goes on.
"""

import dataclasses
import html
import io
import json
import math
import pathlib
import re
import sys

import matplotlib
import numpy as np
from absl import app, logging
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from mla_jax.checkpoint.store import read_config
from mla_jax.config import Config, ConfigError
from mla_jax.files import read_records
from mla_jax.model.transformer import count_parameters

# Okabe and Ito's colours, told apart by colour-blind people; lines differ in shape as well.
BLUE, ORANGE, GREEN, GRAY, INK = '#0072B2', '#D55E00', '#009E73', '#8A9099', '#1F2328'
STYLE = {
    'font.family': 'DejaVu Sans', 'font.size': 9.5, 'axes.labelsize': 9.5, 'legend.fontsize': 9.5,
    'text.color': INK, 'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK,
    'axes.edgecolor': GRAY, 'axes.linewidth': 0.8, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.color': '#E6E8EB', 'grid.linewidth': 0.8, 'axes.axisbelow': True,
    'lines.linewidth': 1.6, 'lines.markersize': 4.5, 'legend.frameon': False, 'figure.facecolor': 'white',
    'svg.fonttype': 'none', 'svg.hashsalt': 'mla_jax',
}
SIZE = (4.6, 3.2)  # inches; shown 360 to 540 pixels wide, where 9.5 points are 10 to 15 pixels
POINTS, COLUMNS = 400, 160  # a longer line or heatmap shows means over groups of neighbouring records


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says about its run. `records` are the objects of metrics.jsonl, in order."""

  name: str
  config: Config
  records: list[dict]

  def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that hold a finite number there."""
    pairs = [(r['step'], r[field]) for r in self.records
             if isinstance(r.get(field), (int, float)) and math.isfinite(r[field])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, float), np.array(values, float)

  def last(self, field: str) -> float | None:
    values = self.series(field)[1]
    return values[-1] if values.size else None

  def violations(self) -> tuple[np.ndarray, np.ndarray]:
    """(steps, violation [records, routers]): max load / mean - 1 of every router."""
    rows = [(r['step'], r['layer_violations']) for r in self.records
            if len(r.get('layer_violations') or ()) == self.config.model.num_routers > 0]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps, float), np.array(values, float)


def read_run(workdir: str | pathlib.Path) -> Run:
  """Raises ConfigError, one line, where `workdir` is no run. A line that is no record (the last one of a killed run
  may be torn) is left out, and said."""
  workdir = pathlib.Path(workdir)
  config, file = read_config(workdir), workdir / 'metrics.jsonl'
  if not file.exists():
    raise ConfigError(f'{file} does not exist, so there is nothing to draw; train in {workdir} or name another run')
  records = []
  for number, line, record in read_records(file):
    if record is None:
      logging.warning('%s line %d is no record and is left out: %.60r', file, number, line)
    else:
      records.append(record)
  return Run(workdir.resolve().name, config, records)


def grouped(values, limit: int, reduce=np.add):
  """`reduce` (a ufunc; add gives means) over groups of neighbours along axis 0, so that at most `limit` remain."""
  starts = np.arange(0, len(values), max(1, -(-len(values) // limit)))
  sizes = np.diff([*starts, len(values)]).reshape(-1, *[1] * (values.ndim - 1))
  return reduce.reduceat(values, starts, axis=0) / (sizes if reduce is np.add else 1)


def _axes(run: Run, rows: int = 1, **grid):
  """A figure with `rows` axes above each other over the run's steps."""
  figure = Figure(figsize=SIZE, layout='constrained')
  axes = figure.subplots(rows, 1, sharex=True, squeeze=False, **grid)[:, 0]
  axes[-1].set_xlabel('step')
  axes[-1].set_xlim(0, run.last('step') * 1.02)
  axes[-1].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
  axes[-1].xaxis.set_major_formatter(EngFormatter(sep=''))
  return figure, *axes


def _line(axis, steps, values, color, label=None, **how):
  """The line of means; where it stands for more points than it has, over a band from their least to their greatest."""
  x = grouped(steps, POINTS)
  if len(x) < len(steps):
    axis.fill_between(x, grouped(values, POINTS, np.minimum), grouped(values, POINTS, np.maximum), color=color,
                      alpha=0.25, linewidth=0)
  axis.plot(x, grouped(values, POINTS), color=color, label=label, marker='o' if len(x) == 1 else None, **how)


def _logarithmic(axis):
  """A logarithmic y axis with plain numbers on it, about three to seven whatever its range."""
  axis.set_yscale('log')
  low, high = axis.get_ylim()
  decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
    ticks = np.outer(decades, digits).ravel()
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    if len(ticks) <= 7:
      break
  if len(ticks) < 3:
    ticks = MaxNLocator(5).tick_values(low, high)
  axis.set_yticks(ticks)
  axis.yaxis.set_minor_locator(NullLocator())
  axis.yaxis.set_major_formatter('{x:.4g}')
  axis.set_ylim(low, high)


def draw_loss(run: Run) -> Figure | None:
  main, mtp, held_out = run.series('main_loss'), run.series('mtp_loss'), run.series('held_out_loss')
  balance = run.series('balance_loss')
  if not main[0].size and not held_out[0].size:
    return None
  has_balance = balance[1].any()
  figure, axis, *small = _axes(run, 1 + has_balance, **(dict(height_ratios=[4, 1]) if has_balance else {}))
  if main[0].size:
    _line(axis, *main, BLUE, 'main, training')
  if run.config.model.num_nextn_predict_layers and mtp[0].size:
    _line(axis, *mtp, ORANGE, 'MTP, training', linestyle=(0, (4, 1.5)))
  if held_out[0].size:
    axis.plot(*held_out, color=INK, marker='o', linestyle='none', label='main, held out')
  # Losses fall by an order of magnitude at once and by percents for the rest of the run: a logarithmic axis shows both.
  _logarithmic(axis)
  axis.set_ylabel('loss (nats a token)')
  axis.legend()
  if small:
    _line(small[0], *balance, GREEN)
    small[0].set_ylabel('balance')
    small[0].ticklabel_format(axis='y', scilimits=(-2, 2), useMathText=True)
    small[0].yaxis.set_major_locator(MaxNLocator(2))
    small[0].set_ylim(0, balance[1].max() * 1.15)
  return figure


def draw_learning_rate(run: Run) -> Figure | None:
  series = run.series('learning_rate')
  if not series[0].size:
    return None
  figure, axis = _axes(run)
  _line(axis, *series, BLUE)
  axis.set_ylabel('learning rate')
  axis.ticklabel_format(axis='y', scilimits=(-2, 2), useMathText=True)
  axis.set_ylim(0, series[1].max() * 1.05 or 1)
  return figure


def draw_gradient_norm(run: Run) -> Figure | None:
  series = run.series('grad_norm')
  if not series[0].size:
    return None
  figure, axis = _axes(run)
  _line(axis, *series, BLUE, 'before clipping')
  clip = run.config.optimizer.clip_norm
  axis.axhline(clip, color=ORANGE, linestyle=(0, (4, 1.5)), linewidth=1.2, label=f'clipped to {clip:g}')
  _logarithmic(axis)
  axis.set_ylabel('global gradient norm')
  axis.legend()
  return figure


def draw_expert_load(run: Run) -> Figure | None:
  steps, violation_SL = run.violations()
  if not steps.size:
    return None
  m = run.config.model
  steps, violation_SL = grouped(steps, COLUMNS), grouped(violation_SL, COLUMNS)
  middle = (steps[1:] + steps[:-1]) / 2
  half = middle[0] - steps[0] if middle.size else 0.5
  edges = np.array([steps[0] - half, *middle, 2 * steps[-1] - (middle[-1] if middle.size else steps[-1] - half)])
  figure, axis = _axes(run)
  axis.grid(visible=False)
  # The first steps can be far out of balance; the scale ends where 98% of the cells lie, so that the rest shows.
  top = max(np.nanpercentile(violation_SL, 98), 1e-3) if np.isfinite(violation_SL).any() else 1.0
  image = axis.pcolormesh(edges, np.arange(m.num_routers + 1) - 0.5, violation_SL.T, cmap='Blues',
                          norm=Normalize(0, top), rasterized=True)
  beyond = np.nanmax(violation_SL, initial=0) > top
  figure.colorbar(image, ax=axis, label='max load / mean − 1', aspect=28, pad=0.03,
                  extend='max' if beyond else 'neither')
  every = -(-m.num_moe_layers // 9)
  mtp = range(m.num_moe_layers, m.num_routers)
  rows = np.arange(0, m.num_moe_layers - every // 2 * bool(mtp), max(every, 1))
  axis.set_yticks([*rows, *mtp], [*map(str, rows + m.num_dense_layers), *[f'MTP {i + 1}' for i in range(len(mtp))]])
  axis.invert_yaxis()
  if mtp and rows.size:
    axis.axhline(m.num_moe_layers - 0.5, color=INK, linewidth=1.2)
  axis.set_ylabel('layer')
  return figure


def draw_acceptance(run: Run) -> Figure | None:
  series = run.series('held_out_mtp_acceptance')
  if not series[0].size:
    return None
  figure, axis = _axes(run)
  axis.plot(*series, color=BLUE, marker='o')
  step, value = series[0][-1], series[1][-1]
  axis.annotate(f'{value:.1%}', (step, value), xytext=(0, 8), textcoords='offset points', ha='right', color=INK)
  axis.set_ylim(0, 1)
  axis.yaxis.set_major_formatter(PercentFormatter(1))
  axis.set_ylabel('accepted at the first draft position')
  return figure


def draw_throughput(run: Run) -> Figure | None:
  rate, mfu = run.series('tokens_per_second'), run.series('mfu')
  if not rate[0].size:
    return None
  figure, axis, *small = _axes(run, 2 if mfu[0].size else 1)
  _line(axis, *rate, BLUE)
  axis.set_ylim(0, rate[1].max() * 1.1)
  axis.yaxis.set_major_formatter(EngFormatter(sep=''))
  axis.set_ylabel('tokens/s')
  if small:
    _line(small[0], *mfu, GREEN)
    small[0].set_ylim(0, mfu[1].max() * 1.1)
    small[0].yaxis.set_major_formatter(lambda share, _: f'{100 * share:.3g}%')
    small[0].set_ylabel('MFU, of bf16 peak')
  return figure


# File name: title, picture, what one sees, what is said in its place.
PICTURES = {
    'loss': ('Loss', draw_loss,
             'Cross-entropy; for MTP the mean over its modules, before its weight. Balance loss: as it enters the '
             'total.', 'No loss is logged yet.'),
    'expert_load': ('Expert load', draw_expert_load,
                    'How far the busiest expert of each router is above the mean load: 0 is balanced, 1 is twice the '
                    'mean.', 'No load of a router is logged yet.'),
    'mtp_acceptance': ('MTP acceptance', draw_acceptance,
                       'Share of held-out positions where the first MTP module’s argmax equals the main model’s at the '
                       'next position, teacher-forced.', 'No evaluation of an MTP module yet.'),
    'throughput': ('Throughput', draw_throughput,
                   'Trained tokens a second over all devices; compilation, evaluation and checkpoints left out.',
                   'No rate is logged yet.'),
    'learning_rate': ('Learning rate', draw_learning_rate, 'As the schedule set it.',
                      'No learning rate is logged yet.'),
    'gradient_norm': ('Gradient norm', draw_gradient_norm, 'Over all weights, logarithmic axis.',
                      'No gradient norm is logged yet.'),
}


def svg(figure: Figure, name: str) -> str:
  """The figure as an <svg> element whose ids are its own among several in one page."""
  file = io.StringIO()
  figure.savefig(file, format='svg', dpi=200, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
  text = file.getvalue()
  return re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', text[text.index('<svg'):])


def _short(count: float) -> str:
  """1234567 -> 1.23M"""
  for size, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if count >= 0.9995 * size:
      return f'{count / size:.3g}{unit}'
  return f'{count:.0f}'


def describe(run: Run) -> str:
  """The network in one line."""
  m = run.config.model
  parts = [f'{m.num_hidden_layers} layers of width {m.hidden_size}']
  if m.attention == 'mla':
    parts.append(f'MLA with {m.num_attention_heads} heads, latent {m.kv_lora_rank} + rope {m.qk_rope_head_dim}')
  else:
    parts.append(f'{m.attention.upper()} with {m.num_attention_heads} heads, {m.kv_heads} for keys and values')
  if m.n_routed_experts:
    parts.append(f'{m.n_routed_experts} experts, {m.num_experts_per_tok} chosen + {m.n_shared_experts} shared')
  if depth := m.num_nextn_predict_layers:
    parts.append(f'{depth} MTP module{"s" * (depth > 1)}')
  return ' · '.join([*parts, f'vocabulary {m.vocab_size:,}'])


def facts(run: Run) -> dict[str, tuple[str, str]]:
  """The numbers on top of the page: name, value, unit or explanation."""
  tokens, rate = run.last('tokens'), run.series('tokens_per_second')[1]
  steps = run.config.training.steps
  loss, acceptance, skipped = (run.last(f) for f in ('held_out_loss', 'held_out_mtp_acceptance', 'skipped_steps'))
  out = {
      'Held-out loss': ('–' if loss is None else f'{loss:.3f}', 'nats a token'),
      'MTP acceptance': ('–' if acceptance is None else f'{acceptance:.1%}', 'first draft position'),
      'Parameters': (_short(count_parameters(run.config.model)), 'MTP modules included'),
      'Tokens seen': ('–' if tokens is None else _short(tokens), f'{run.last("step") or 0:,.0f} of {steps:,} steps'),
      'Throughput': (_short(np.median(rate)) if rate.size else '–', 'tokens/s, median'),
  }
  if skipped:
    out['Steps skipped'] = f'{skipped:,.0f}', 'gradient not finite'
  return out


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: training report</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ margin: 0 auto; max-width: 1180px; padding: 28px 20px; box-sizing: border-box; background: #f6f7f8;
    color: #1f2328; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
  h1 {{ font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }}
  h2 {{ font-size: 17px; margin: 0 0 8px; }}
  p {{ margin: 6px 0 0; }}
  .model, figcaption {{ color: #4d5560; }}
  dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0; }}
  dl div, figure, details {{ background: white; border: 1px solid #dfe2e6; border-radius: 8px; }}
  dl div {{ padding: 10px 14px; }}
  dt {{ font-size: 13px; color: #4d5560; }}
  dd {{ margin: 0; font-size: 21px; font-weight: 600; line-height: 1.3; }}
  dd small {{ display: block; font-size: 13px; font-weight: normal; color: #4d5560; }}
  main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }}
  figure {{ margin: 0; padding: 14px 16px; }}
  figure svg {{ display: block; width: 100%; height: auto; }}
  figcaption {{ font-size: 14px; margin-top: 8px; }}
  details {{ margin-top: 16px; padding: 12px 16px; }}
  summary {{ cursor: pointer; font-weight: 600; }}
  pre {{ overflow-x: auto; font-size: 13px; line-height: 1.4; }}
  @media (max-width: 600px) {{ body {{ padding: 16px 10px; }} figure {{ padding: 12px 8px; }} h1 {{ font-size: 23px; }}
    dl {{ grid-template-columns: 1fr 1fr; gap: 8px; }} dl div:last-child:nth-child(odd) {{ grid-column: span 2; }} }}
</style>
</head>
<body>
<h1>{name}</h1>
<p class="model">{model}</p>
<dl>
{facts}
</dl>
<main>
{pictures}
</main>
<details><summary>Resolved config</summary><pre>{config}</pre></details>
</body>
</html>
"""


def write(workdir: str | pathlib.Path) -> pathlib.Path:
  """Draws the run in `workdir`; returns the path of its report.html. Raises ConfigError where it is no run."""
  run, workdir = read_run(workdir), pathlib.Path(workdir)
  folder = workdir / 'report'
  folder.mkdir(exist_ok=True)
  figures = []
  with matplotlib.rc_context(STYLE):
    for name, (title, draw, caption, absent) in PICTURES.items():
      figure, png = draw(run), folder / f'{name}.png'
      if figure is None:
        png.unlink(missing_ok=True)
        figures.append(f'<figure><h2>{title}</h2><figcaption>{absent}</figcaption></figure>')
        continue
      figure.savefig(png, dpi=200)
      picture = svg(figure, name).replace('<svg ', f'<svg role="img" aria-label="{title}. {caption}" ', 1)
      figures.append(f'<figure><h2>{title}</h2>{picture}<figcaption>{caption}</figcaption></figure>')
  tiles = [f'<div><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>'
           for name, (value, unit) in facts(run).items()]
  config = json.dumps(dataclasses.asdict(run.config), indent=2)
  page = workdir / 'report.html'
  page.write_text(PAGE.format(name=html.escape(run.name), model=html.escape(describe(run)), facts='\n'.join(tiles),
                              pictures='\n'.join(figures), config=html.escape(config)), encoding='utf-8')
  return page


def main(argv: list[str]) -> int:
  if len(argv) != 2:
    print('usage: python -m mla_jax.report WORKDIR', file=sys.stderr)
    return 2
  try:
    print(write(argv[1]))
  except (ConfigError, OSError) as e:
    print(f'report: error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  app.run(main)

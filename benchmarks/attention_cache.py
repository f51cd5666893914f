"""How many bytes does attention cache for a token? python -m benchmarks.attention_cache [--output=DIR]

Multi-head (MHA), grouped-query (GQA), multi-query (MQA) and multi-head latent attention (MLA) at the widths of
DeepSeek-V3, V2 and V2-Lite, and DeepSeek 67B. Two kinds of numbers, told apart in the column `source`:

  allocated  the bytes of the array that mla_jax/model/cache.py allocates for this attention, under jax.eval_shape
  computed   the bytes of the keys (192 wide) and values (128 wide) of all heads that MLA's expanded form makes from a
             token's latent; our multi-head attention has one width for both, so no cache of that shape is allocated

Bytes are bfloat16 unless a line says otherwise, of all main layers, MTP modules left out. Prints a table, a JSON line
a row and the published claims with what holds; writes attention_cache.png and attention_cache.jsonl to --output.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
from absl import app, flags
from matplotlib.figure import Figure

from configs import deepseek_v2, deepseek_v2_lite, deepseek_v3
from mla_jax.config import ModelConfig, RopeScaling
from mla_jax.model.attention import LatentAttention
from mla_jax.model.cache import bytes_per_token
from mla_jax.report import BLUE, GRAY, STYLE

DTYPE, BITS = jnp.bfloat16, 16
V3, V2, LITE, DENSE = 'DeepSeek-V3', 'DeepSeek-V2', 'DeepSeek-V2-Lite', 'DeepSeek 67B'
MHA, EXPANDED, GQA, MQA, MLA = 'MHA, 128 wide', 'MHA, 192 + 128 wide', 'GQA, 8 groups', 'MQA', 'MLA'


def deepseek_67b() -> ModelConfig:
  """arXiv 2401.02954, table 2: the dense model whose cache V2's report compares its own with."""
  return ModelConfig(vocab_size=102400, hidden_size=8192, num_hidden_layers=95, attention='gqa',
                     num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=22016)


def with_attention(config: ModelConfig, attention: str, kv_heads: int = 0) -> ModelConfig:
  """The same network with another attention, whose heads are as wide as MLA's values."""
  out = dataclasses.replace(config, attention=attention, num_key_value_heads=kv_heads, rope_scaling=RopeScaling())
  out.validate()
  return out


def expanded_bytes_per_token(config: ModelConfig) -> int:
  """Of the keys and values of all heads that `attend_expanded` makes from a latent, in all main layers."""
  def keys_and_values(c_C, kr_R):
    attention = LatentAttention(config, jax.random.key(0))
    k_NK = jnp.einsum('C,CNK->NK', c_C, attention.wuk_CNK[...].astype(DTYPE))
    v_NV = jnp.einsum('C,CNV->NV', c_C, attention.wuv_CNV[...].astype(DTYPE))
    return jnp.concatenate([k_NK, jnp.broadcast_to(kr_R, (k_NK.shape[0], *kr_R.shape))], axis=-1), v_NV

  arrays = jax.eval_shape(keys_and_values, jax.ShapeDtypeStruct((config.kv_lora_rank,), DTYPE),
                          jax.ShapeDtypeStruct((config.qk_rope_head_dim,), DTYPE))
  return config.num_hidden_layers * sum(x.size * x.dtype.itemsize for x in arrays)


def measure() -> list[dict]:
  """A row for each attention at each model's widths."""
  rows = []

  def add(model, attention, config, size, source='allocated'):
    rows.append(dict(benchmark='attention_cache', model=model, attention=attention, layers=config.num_hidden_layers,
                     heads=config.num_attention_heads, dtype=jnp.dtype(DTYPE).name, bytes_per_token=size,
                     source=source))

  for name, module in ((V3, deepseek_v3), (V2, deepseek_v2), (LITE, deepseek_v2_lite)):
    config = module.model()
    add(name, EXPANDED, config, expanded_bytes_per_token(config), 'computed')
    for attention, other in ((MHA, with_attention(config, 'mha')), (GQA, with_attention(config, 'gqa', 8)),
                             (MQA, with_attention(config, 'mqa')), (MLA, config)):
      add(name, attention, other, bytes_per_token(other, DTYPE, mtp=False))
  config = deepseek_67b()
  add(DENSE, GQA, config, bytes_per_token(config, DTYPE, mtp=False))
  return rows


@dataclasses.dataclass(frozen=True)
class Claim:
  """`text` as published, `computed` as the arrays have it."""

  text: str
  computed: str
  holds: bool

  def __str__(self):
    return f'{self.text}: computed {self.computed}: {"holds" if self.holds else "does not hold"}'


def check_claims(rows: list[dict]) -> list[Claim]:
  """Every published figure at the widths and bits that it may be meant for. It holds if it is what ours rounds to."""
  size = {(r['model'], r['attention']): r['bytes_per_token'] for r in rows}
  out = []

  for name, published in ((V3, 70272), (V2, 69120), (LITE, 31104)):
    out.append(Claim(f'{name} caches {published:,} bytes a token in bf16', f'{size[name, MLA]:,}',
                     size[name, MLA] == published))
  for name, expanded, plain in ((V3, '71', '57'), (V2, '71', '57'), (LITE, '8.9', '7.1')):
    for other, published, widths in ((EXPANDED, expanded, 'keys 192 and values 128 wide'),
                                     (MHA, plain, 'heads 128 wide')):
      ratio = size[name, other] / size[name, MLA]
      rounded = f'{ratio:.{1 if "." in published else 0}f}'
      out.append(Claim(f'MHA with {widths} costs {published}x MLA at {name}\'s widths, same bits', f'{ratio:.2f}x',
                       rounded == published))

  def share_of_mha(name):
    """Percent, against expanded keys and values, then against plain heads."""
    return [100 * size[name, MLA] / size[name, other] for other in (EXPANDED, MHA)]

  for name, low, high, digits in ((V3, 1.4, 1.8, 1), (V2, 1.4, 1.8, 1), (LITE, 11, 14, 0)):
    shares = share_of_mha(name)
    out.append(Claim(f'MLA is {low}-{high}% of MHA at {name}\'s widths, same bits',
                     f'{shares[0]:.2f}% (keys 192, values 128 wide) to {shares[1]:.2f}% (128 wide)',
                     [round(s, digits) for s in shares] == [low, high]))
  for name in (V3, V2, LITE):
    for share, widths in zip(share_of_mha(name), ('keys 192, values 128 wide', 'heads 128 wide'), strict=True):
      out.append(Claim(f'MLA is 5-13% of MHA (often quoted), {name}\'s widths, MHA with {widths}, same bits',
                       f'{share:.2f}%', 5 <= share <= 13))

  def cut(bits):
    return 100 * (1 - size[V2, MLA] * bits / BITS / size[DENSE, GQA])

  for published, bits in ((93.3, 6), (93.3, 16), (82.2, 16)):
    kept = 'allocated' if bits == BITS else 'the bf16 array\'s numbers at 6 bits each'
    out.append(Claim(f'V2\'s cache is {published}% smaller than DeepSeek 67B\'s (GQA, bf16), V2 at {bits} bits',
                     f'{cut(bits):.2f}% ({size[V2, MLA] * bits // BITS:,} of {size[DENSE, GQA]:,} bytes; {kept})',
                     round(cut(bits), 1) == published))
  return out


def table(rows: list[dict]) -> str:
  mla = {r['model']: r['bytes_per_token'] for r in rows if r['attention'] == MLA}
  lines = [f'{"model":<18}{"attention":<21}{"layers":>6}{"bytes a token, bf16":>21}{"times its MLA":>15}  source']
  for r in rows:
    times = f'{r["bytes_per_token"] / mla[r["model"]]:.2f}' if r['model'] in mla else '–'
    lines.append(f'{r["model"]:<18}{r["attention"]:<21}{r["layers"]:>6}{r["bytes_per_token"]:>21,}{times:>15}'
                 f'  {r["source"]}')
  return '\n'.join(lines)


def draw(rows: list[dict]) -> Figure:
  """Bars by model on one logarithmic axis: from 14 kB to 5 MB, a linear one would show two bars."""
  models = list(dict.fromkeys(r['model'] for r in rows))
  counts = [sum(r['model'] == m for r in rows) for m in models]
  figure = Figure(figsize=(7.2, 6.4), layout='constrained')
  for axis, model in zip(figure.subplots(len(models), 1, sharex=True, height_ratios=counts), models,
                         strict=True):
    own = [r for r in rows if r['model'] == model]
    bars = axis.barh([r['attention'] for r in own], [r['bytes_per_token'] for r in own],
                     color=[BLUE if r['attention'] == MLA else GRAY for r in own], height=0.72)
    for bar, row in zip(bars, own, strict=True):
      bar.set_hatch('///' if row['source'] == 'computed' else None)
      bar.set_edgecolor('white')
    axis.bar_label(bars, [f'{r["bytes_per_token"]:,}' for r in own], padding=4)
    axis.set_title(f'{model}, {own[0]["layers"]} layers', loc='left', fontsize=10, fontweight='bold')
    axis.set_xscale('log')
    axis.set_xlim(1e4, 2e7)
    axis.set_ylim(len(own) - 0.5, -0.5)
    axis.grid(visible=False, axis='y')
    axis.tick_params(axis='y', length=0)
    axis.minorticks_off()
  axis.set_xlabel('cache bytes a token, bf16 (logarithmic; hatched: computed, not allocated)')
  axis.set_xticks([1e4, 1e5, 1e6, 1e7], ['10 kB', '100 kB', '1 MB', '10 MB'])
  return figure


def run(folder: str | pathlib.Path):
  """Prints everything; writes the chart and the JSON lines to `folder`."""
  rows = measure()
  lines = [json.dumps(row) for row in rows]
  print(table(rows), *lines, *check_claims(rows), sep='\n')
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'attention_cache.jsonl').write_text(''.join(line + '\n' for line in lines))
  with matplotlib.rc_context(STYLE):
    draw(rows).savefig(folder / 'attention_cache.png', dpi=200)
  print(f'{folder / "attention_cache.png"} and .jsonl written')


if __name__ == '__main__':
  output = flags.DEFINE_string('output', 'runs/attention_cache', 'Where the chart and the JSON lines go')
  app.run(lambda _: run(output.value))

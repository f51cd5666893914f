"""The report of a run: what it shows, what it makes of records with gaps, and how it refuses."""

import json
import math
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from mla_jax import report
from mla_jax.config import Config, ConfigError, ModelConfig, OptimizerConfig, TrainingConfig, to_dict

ROUTERS = 4  # three MoE layers and the MTP module


def small_config():
  return Config(
      model=ModelConfig(
          vocab_size=264, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64,
          qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=512, first_k_dense_replace=1,
          n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=192,
          num_nextn_predict_layers=1),
      training=TrainingConfig(steps=800, batch_size=16, sequence_length=256),
      optimizer=OptimizerConfig(learning_rate=3e-3))


def synthetic_records(steps=800, interval=10, evaluate=200, mfu=None):
  """What hooks.Recorder would write of a run that went well."""
  random, peak, out = np.random.default_rng(0), 3e-3, []
  for step in range(interval, steps + 1, interval):
    done, noise = step / steps, random.normal(0, 0.02)
    main = 1.45 + 4.1 * math.exp(-step / 45) + 0.35 * math.exp(-step / 400) + noise
    violation = 1.2 * np.exp(-step / 120) + random.gamma(4, 0.05, ROUTERS)
    record = dict(
        step=step, tokens=step * 4096, loss=main + 0.3 * (main + 0.4), main_loss=main, mtp_loss=main + 0.4 + noise,
        balance_loss=4e-4 * (1 + violation.mean() / 4), grad_norm=0.4 + 3 * math.exp(-step / 30) + abs(noise),
        skipped_steps=0, learning_rate=peak * (20 * done if done < 0.05 else 0.55 + 0.45 * math.cos(math.pi * done)),
        tokens_per_second=None if step == interval else 11000 + random.normal(0, 300),
        step_seconds=None if step == interval else 0.37, mfu=mfu,
        max_violation=violation.max(), layer_violations=violation.round(4).tolist())
    if step % evaluate == 0:
      record |= dict(held_out_loss=main + 0.05, held_out_mtp_acceptance=0.72 * (1 - math.exp(-step / 250)))
    out.append(record)
  return out


def make_run(folder, records, config=None, tail=''):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(to_dict(config or small_config())))
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records) + tail)
  return folder


def as_run(records, config=None):
  return report.Run('x', config or small_config(), records)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(folder, page, records) of a whole run, written once; its name must not become markup."""
  records = synthetic_records()
  folder = make_run(tmp_path_factory.mktemp('runs') / 'demo <b> & co', records)
  path = report.write(folder)
  assert path == folder / 'report.html'
  return folder, path.read_text(), records


def tiles(page):
  return {k: (v, unit) for k, v, unit in re.findall(r'<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small></dd>', page)}


def test_page_tells_the_numbers_of_the_run(whole):
  _, page, records = whole
  rates = [r['tokens_per_second'] for r in records if r['tokens_per_second'] is not None]
  assert '<h1>demo &lt;b&gt; &amp; co</h1>' in page
  assert tiles(page) == {
      'Held-out loss': (f'{records[-1]["held_out_loss"]:.3f}', 'nats a token'),
      'MTP acceptance': (f'{100 * records[-1]["held_out_mtp_acceptance"]:.1f}%', 'first draft position'),
      'Parameters': ('4.93M', 'MTP modules included'),
      'Tokens seen': ('3.28M', '800 of 800 steps'),
      'Throughput': (f'{np.median(rates) / 1000:.3g}K', 'tokens/s, median')}
  assert '4 layers of width 192 · MLA with 4 heads, latent 64 + rope 16 · 8 experts, 2 chosen + 1 shared' in page
  details = page[page.index('<details>'):]
  for key, value in dict(kv_lora_rank=64, learning_rate=0.003, source='&quot;stdlib&quot;').items():
    assert f'&quot;{key}&quot;: {value}' in details


def test_page_is_one_file_with_six_pictures(whole):
  folder, page, _ = whole
  # Names of XML namespaces are no addresses; anything else that a browser would fetch or run is out.
  links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
  assert links
  assert all((a or b).startswith(('#', 'data:image/png')) for a, b in links)
  assert '<script' not in page
  assert '@import' not in page
  pictures = [ET.fromstring(svg) for svg in re.findall(r'<svg.*?</svg>', page, re.DOTALL)]
  assert [p.get('aria-label').partition('.')[0] for p in pictures] == [
      'Loss', 'Expert load', 'MTP acceptance', 'Throughput', 'Learning rate', 'Gradient norm']
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))
  used = set(re.findall(r'(?:href="|url\()#([^")]*)', page))
  assert used <= set(ids)
  said = [' '.join(''.join(e.itertext()).strip() for e in p.iter('{http://www.w3.org/2000/svg}text')) for p in pictures]
  for text, labels in zip(said, (('loss (nats a token)', 'main, held out', 'balance'), ('layer', 'MTP 1'),
                                 ('first draft position',), ('tokens/s',), ('learning rate',), ('clipped to 1',)),
                          strict=True):
    assert 'step' in text
    for label in labels:
      assert label in text
  for name in report.PICTURES:
    assert (folder / 'report' / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_curves_are_the_records():
  records = synthetic_records(mfu=0.4)
  run = as_run(records)
  steps = [r['step'] for r in records]
  with matplotlib.rc_context(report.STYLE):
    loss, balance = report.draw_loss(run).axes
    rate, mfu = report.draw_throughput(run).axes
    acceptance, = report.draw_acceptance(run).axes
  main, mtp, held_out = loss.lines
  np.testing.assert_allclose(main.get_xydata(), [(r['step'], r['main_loss']) for r in records])
  np.testing.assert_allclose(mtp.get_xydata(), [(r['step'], r['mtp_loss']) for r in records])
  evaluated = [r for r in records if 'held_out_loss' in r]
  np.testing.assert_allclose(held_out.get_xydata(), [(r['step'], r['held_out_loss']) for r in evaluated])
  np.testing.assert_allclose(balance.lines[0].get_xydata(), [(r['step'], r['balance_loss']) for r in records])
  np.testing.assert_allclose(rate.lines[0].get_xdata(), steps[1:])  # the first rate is null
  np.testing.assert_allclose(mfu.lines[0].get_ydata(), 0.4)
  np.testing.assert_allclose(acceptance.lines[0].get_xydata(),
                             [(r['step'], r['held_out_mtp_acceptance']) for r in evaluated])
  low, high = loss.get_ylim()
  assert low < min(r['main_loss'] for r in records)
  assert max(r['mtp_loss'] for r in records) < high


def test_heatmap_has_a_row_a_router_and_a_column_a_record():
  records = [r for r in synthetic_records() if r['step'] not in (30, 40, 500)]  # uneven intervals
  axis, bar = report.draw_expert_load(as_run(records)).axes
  mesh, = axis.collections
  drawn_LS = mesh.get_array()
  np.testing.assert_allclose(drawn_LS, np.transpose([r['layer_violations'] for r in records]))
  edges = mesh.get_coordinates()[0, :, 0]
  steps = [r['step'] for r in records]
  assert all(a < s < b for a, s, b in zip(edges[:-1], steps, edges[1:], strict=True))
  assert [t.get_text() for t in axis.get_yticklabels()] == ['1', '2', '3', 'MTP 1']
  assert 'max load / mean' in bar.get_ylabel()


def test_layer_labels_thin_out_and_keep_their_numbers():
  config = small_config()
  config.model.num_hidden_layers, config.model.first_k_dense_replace = 61, 3
  records = [dict(step=s, layer_violations=np.linspace(0, 1, 59).tolist()) for s in (1, 2)]
  axis = report.draw_expert_load(as_run(records, config)).axes[0]
  labels = {t.get_text(): tick for t, tick in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)}
  assert labels.pop('MTP 1') == 58
  assert 5 <= len(labels) <= 9
  assert all(int(text) - 3 == row <= 54 for text, row in labels.items())


def test_long_series_are_means_over_a_band():
  values = np.random.default_rng(1).normal(size=1003)
  sizes = [3] * 334 + [1]  # 1003 records in at most 400 groups of as few as possible
  groups = np.split(values, np.cumsum(sizes)[:-1])
  np.testing.assert_allclose(report.grouped(values, 400), [g.mean() for g in groups])
  np.testing.assert_allclose(report.grouped(values, 400, np.maximum), [g.max() for g in groups])
  np.testing.assert_allclose(report.grouped(np.stack([values, -values], 1), 400)[:, 1], [-g.mean() for g in groups])
  np.testing.assert_array_equal(report.grouped(values[:400], 400), values[:400])
  spiky = [dict(step=s, grad_norm=100.0 if s == 500 else 1.0) for s in range(1, 1004)]
  axis, = report.draw_gradient_norm(as_run(spiky)).axes
  assert axis.collections[0].get_datalim(axis.transData).y1 == 100  # a mean would hide a spike


def test_torn_and_foreign_lines_are_left_out_and_said(tmp_path, caplog):
  records = synthetic_records()[:3]
  records[1] |= dict(main_loss=float('nan'), grad_norm=float('inf'), learning_rate=None, layer_violations=None)
  del records[2]['mtp_loss']
  folder = make_run(tmp_path / 'torn', records, tail='[1]\n{"loss": 1}\n')
  with (folder / 'metrics.jsonl').open('ab') as file:
    file.write(b'\xff' + json.dumps(records[0])[:50].encode())
  with caplog.at_level('WARNING'):
    run = report.read_run(folder)
  assert [r['step'] for r in run.records] == [10, 20, 30]
  assert [re.search(r'line (\d)', m.getMessage())[1] for m in caplog.records] == ['4', '5', '6']
  assert run.series('main_loss')[0].tolist() == [10, 30]
  assert run.series('grad_norm')[0].tolist() == [10, 30]
  assert run.series('mtp_loss')[0].tolist() == [10, 20]
  assert run.series('learning_rate')[0].tolist() == [10, 30]
  assert run.violations()[0].tolist() == [10, 30]
  for _, draw, _, _ in report.PICTURES.values():
    draw(run)


def test_run_without_records_has_a_page_and_loses_old_pictures(tmp_path):
  folder = make_run(tmp_path / 'new', [])
  (folder / 'report').mkdir()
  (folder / 'report' / 'loss.png').write_bytes(b'of a run before')
  page = report.write(folder).read_text()
  assert '<svg' not in page
  assert page.count('logged yet') + page.count('No evaluation of an MTP module yet') == 6
  assert tiles(page)['Tokens seen'] == ('–', '0 of 800 steps')
  assert not list((folder / 'report').iterdir())


def test_dense_run_and_diverged_run(tmp_path):
  config = small_config()
  config.model.n_routed_experts = config.model.num_nextn_predict_layers = 0
  config.model.attention = 'mha'
  records = [dict(step=s, tokens=s, main_loss=2.0, mtp_loss=0.0, balance_loss=0.0, grad_norm=1.0, max_violation=None,
                  skipped_steps=7 * s) for s in (1, 2)]
  page = report.write(make_run(tmp_path / 'dense', records, config)).read_text()
  assert 'MHA with 4 heads, 4 for keys and values · vocabulary 264' in page
  assert 'balance</text>' not in page
  assert 'MTP, training' not in page
  assert 'No load of a router is logged yet.' in page
  assert tiles(page)['Steps skipped'] == ('14', 'gradient not finite')


@pytest.mark.parametrize(('missing', 'line'), [
    ('metrics.jsonl', r'metrics\.jsonl does not exist, so there is nothing to draw; .*'),
    ('config.json', r'config\.json does not exist, so .* is no run; train one there or name another')])
def test_folder_that_is_no_run_is_one_line(tmp_path, capsys, missing, line):
  folder = make_run(tmp_path / 'run', [])
  (folder / missing).unlink()
  with pytest.raises(ConfigError, match=line):
    report.write(folder)
  assert report.main(['report', str(folder)]) == 2
  assert re.fullmatch(rf'report: error: .*{line}\n', capsys.readouterr().err)
  assert not (folder / 'report.html').exists()
  assert not (folder / 'report').exists()


def test_command_line_says_how_to_use_it(capsys):
  assert report.main(['report']) == 2
  assert capsys.readouterr().err == 'usage: python -m mla_jax.report WORKDIR\n'


@pytest.mark.parametrize(('count', 'text'), [
    (0, '0'), (999, '999'), (1000, '1K'), (12345, '12.3K'), (999_950, '1M'), (4.93e6, '4.93M'), (671e9, '671B'),
    (14.8e12, '14.8T')])
def test_short_counts(count, text):
  assert report._short(count) == text


@pytest.mark.parametrize(('low', 'high'), [(1.48, 1.52), (0.9, 1.4), (1.2, 6.0), (0.05, 40.0), (1e-9, 1e6)])
def test_logarithmic_axes_have_readable_ticks(low, high):
  axis = matplotlib.figure.Figure().subplots()
  axis.set_ylim(low, high)
  report._logarithmic(axis)
  ticks = [t for t in axis.get_yticks() if low <= t <= high]
  assert 2 <= len(ticks) <= 20
  assert axis.get_ylim() == pytest.approx((low, high))

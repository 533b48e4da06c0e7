# SPDX-License-Identifier: Apache-2.0
"""Fits a device's efficiencies to measured tables, and says how well.

  python -m sarathi_jax.simulator.calibrate --tables=DIR --device=a100 \
      --output=a100.json
  python -m sarathi_jax.simulator.calibrate --tables=DIR --device=h100 --nofit

Tables are Vidur's CSVs whose names begin with that of the device. Errors are
shown by table, of the fit, and of a fit that saw no table of the same model.
With --nofit the device's efficiencies stay as they are: so is a device judged
whose tables were never seen. With several devices, each is also judged by
what was fitted to the first other one.

With --gpu_check, the tables are what scripts/gpu_check measured: of prefills
our engine's last layer computes what is sampled from only, which the model
counts whole, so efficiencies come out up to a layer's share too high. With
--artifact, they are Sarathi-Serve's artifact, whose whole steps show what its
host costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
import numpy as np
import rich.console
import rich.table
from scipy import optimize

from sarathi_jax import errors
from sarathi_jax.cli import deployment
from sarathi_jax.cli import mains
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import step_tables
from sarathi_jax.simulator import tables as tables_lib

FLAGS = flags.FLAGS
Hardware = hardware_lib.Hardware
Table = tables_lib.Table

# Kinds of tables -> the efficiencies that they tell. In this order: later
# ones take earlier ones as given.
_GROUPS: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
  (('linear',), ('gemm', 'memory', 'kernel_s')),
  (('elementwise',), ('elementwise',)),
  (('attention',), ('decode_attention', 'prefill_attention', 'attention_s')),
  (('all_reduce',), ('collective_s', 'nvlink', 'pcie')),
  (('send_recv, across nodes',), ('network',)),
)
# An outlier's pull grows with its error's root only, beyond this error.
_SOFT = 0.05


def define_flags() -> None:
  flags.DEFINE_string(
    'tables', None, "Folder of measured tables, Vidur's CSV files, to fit to."
  )
  flags.DEFINE_list(
    'device',
    ['a100'],
    'Devices whose tables to fit to: names '
    'in simulator/devices, or JSON files like those.',
  )
  flags.DEFINE_bool(
    'fit',
    True,
    'Fit the efficiencies. --nofit: only judge the device as it is.',
  )
  flags.DEFINE_string(
    'gpu_check',
    None,
    'A gpu_check.json, written by scripts/gpu_check, to fit to.',
  )
  flags.DEFINE_string(
    'artifact',
    None,
    "Folder with the tables of Sarathi-Serve's artifact to fit to.",
  )
  flags.DEFINE_string(
    'config',
    None,
    'Deployment that --gpu_check or --artifact measured: a file of configs/.',
  )
  flags.DEFINE_string(
    'output', None, 'File to write the fitted device to, as JSON.'
  )


def fit(hardware: Hardware, tables: Iterable[Table]) -> Hardware:
  """Fits the efficiencies that the tables tell; the others stay."""
  tables = list(tables)
  for kinds, fields in _GROUPS:
    chosen = [t for t in tables if t.kind in kinds]
    if chosen:
      hardware = _fit_fields(hardware, fields, chosen)
  return hardware


def _fit_fields(
  hardware: Hardware, fields: Sequence[str], tables: Sequence[Table]
) -> Hardware:
  """Fits some fields by least squares of logarithms; outliers pull less."""
  start = [getattr(hardware.efficiencies, f) for f in fields]

  def at(x: Any) -> Hardware:  # x: logarithms, so that all stay positive
    return hardware.with_efficiencies(
      **dict(zip(fields, np.exp(x).tolist(), strict=True))
    )

  # Tables weigh the same, however many rows they have.
  def residuals(x: Any) -> Any:
    here = at(x)
    return np.concatenate(
      [t.log_error(here) / np.sqrt(len(t.seconds)) * 30 for t in tables]
    )

  found = optimize.least_squares(
    residuals, np.log(start), loss='soft_l1', f_scale=_SOFT
  )
  return at(found.x)


def summary(
  hardware: Hardware, tables: Iterable[Table]
) -> dict[str, tables_lib.Spread]:
  """Returns kind of table -> median error, P90 error, rows."""
  kinds: dict[str, list[Any]] = {}
  for table in tables:
    kinds.setdefault(table.kind, []).append(table.error(hardware))
  return {
    kind: tables_lib.spread(np.concatenate(found))
    for kind, found in kinds.items()
  }


def leave_one_model_out(
  hardware: Hardware,
  tables: Sequence[Table],
) -> dict[str, dict[str, tables_lib.Spread]]:
  """Returns model -> errors on its tables of a fit that saw none of them."""
  models = sorted({t.model for t in tables if t.kind == 'linear'})
  if len(models) < 2:
    return {}
  return {
    model: summary(
      fit(hardware, [t for t in tables if t.model != model]),
      [t for t in tables if t.model == model],
    )
    for model in models
  }


def write(hardware: Hardware, path: str, source: str) -> None:
  """Writes a device's file."""
  fields = {'source': source, **dataclasses.asdict(hardware)}
  fields['efficiencies'] = {
    k: float(f'{v:.4g}') for k, v in fields['efficiencies'].items()
  }
  pathlib.Path(path).write_text(json.dumps(fields, indent=1) + '\n')


def _show(
  console: rich.console.Console,
  title: str,
  rows: Mapping[str, Mapping[str, tables_lib.Spread]],
) -> None:
  table = rich.table.Table(
    '', 'kind', 'median error', 'P90', 'rows', title=title
  )
  for name, found in rows.items():
    for kind, (median, p90, n) in found.items():
      table.add_row(name, kind, f'{median:.1%}', f'{p90:.1%}', f'{n:,}')
  console.print(table)


def _calibrate_tables(console: rich.console.Console) -> Hardware:
  devices = {name: hardware_lib.load(name) for name in FLAGS.device}
  read = {
    name: tables_lib.read(
      FLAGS.tables, pathlib.Path(name).stem.partition('_')[0], hw
    )
    for name, hw in devices.items()
  }
  fitted = {
    name: fit(hw, read[name]) if FLAGS.fit else hw
    for name, hw in devices.items()
  }
  for name, hw in fitted.items():
    tables = read[name]
    _show(
      console,
      f'{name}: {"fitted" if FLAGS.fit else "as it is"}',
      {'all': summary(hw, tables)} | {t.name: summary(hw, [t]) for t in tables},
    )
    if FLAGS.fit:
      _show(
        console,
        f'{name}: each model by a fit that did not see it',
        leave_one_model_out(devices[name], tables),
      )
      for other, source in fitted.items():
        if other != name:
          moved = dataclasses.replace(hw, efficiencies=source.efficiencies)
          _show(
            console,
            f'{name}, by the efficiencies of {other}',
            {'all': summary(moved, tables)},
          )
  return fitted[FLAGS.device[0]]


def _cost(host: hosts.Host) -> cost_model.CostModel:
  """Makes the cost model of what was measured: --config, on --device."""
  if not FLAGS.config:
    raise errors.ConfigError('config: must be given, what was measured.')
  read = deployment.read(FLAGS.config)
  return cost_model.CostModel(
    read.known_model(),
    hardware_lib.load(FLAGS.device[0]),
    tp=read.config.tp or 1,
    pp=read.config.pp,
    host=host,
  )


def _calibrate_host(console: rich.console.Console) -> None:
  cost = _cost(hosts.HOSTS['artifact'])
  steps = step_tables.read_artifact(FLAGS.artifact)
  fitted = step_tables.fit_host(cost, steps)
  _show(
    console,
    "Steps of the artifact, by the host's costs",
    {
      name: step_tables.summary(cost.with_host(host), steps)
      for name, host in (*hosts.HOSTS.items(), ('fitted', fitted))
    },
  )
  console.print(fitted)


def _calibrate_gpu(console: rich.console.Console) -> Hardware:
  cost = _cost(hosts.HOSTS['none'])
  steps = step_tables.read_gpu_check(FLAGS.gpu_check)
  fitted = step_tables.fit_efficiencies(cost, steps) if FLAGS.fit else cost
  _show(
    console,
    'Steps of gpu_check',
    {
      'as it was': step_tables.summary(cost, steps),
      'fitted': step_tables.summary(fitted, steps),
    },
  )
  return fitted.hardware


def main() -> None:
  sources = [n for n in ('tables', 'gpu_check', 'artifact') if FLAGS[n].value]
  if len(sources) != 1:
    raise app.UsageError('give one of --tables, --gpu_check, --artifact')
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 120
  )
  if FLAGS.artifact:
    _calibrate_host(console)
    return
  hardware = (
    _calibrate_tables(console) if FLAGS.tables else _calibrate_gpu(console)
  )
  for field, value in dataclasses.asdict(hardware.efficiencies).items():
    console.print(f'{field:>18} {value:.4g}')
  if FLAGS.output:
    write(
      hardware,
      FLAGS.output,
      f'Fitted to {FLAGS.device[0]}*.csv.'
      if FLAGS.tables
      else 'Fitted to scripts/gpu_check.',
    )


if __name__ == '__main__':
  mains.run(main, define_flags)

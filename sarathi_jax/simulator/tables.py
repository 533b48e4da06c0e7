# SPDX-License-Identifier: Apache-2.0
"""Reads measured tables, and models each row by its operator.

Vidur's CSVs (https://github.com/microsoft/vidur, MIT) are told apart by their
columns. A table is rows of shapes and seconds, and a function that predicts
the seconds of hardware whose efficiencies are to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import csv
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from sarathi_jax import errors
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import operators

Floats = npt.NDArray[np.float64]
Hardware = hardware_lib.Hardware
Spread = tuple[float, float, int]


def spread(relative_errors: npt.ArrayLike) -> Spread:
  """Returns the median and the P90 of some errors, and how many they are."""
  found = np.asarray(relative_errors)
  return float(np.median(found)), float(np.quantile(found, 0.9)), len(found)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
  """Measurements of one kind of operator.

  Attributes:
    name: the file's, and what of it this is.
    kind: 'linear', 'elementwise', 'attention', 'all_reduce', 'send_recv'.
    model: the model whose shapes these are, if it is one's.
    seconds: [n] measured.
    predict: makes [n] modelled seconds for a hardware.
  """

  name: str
  kind: str
  model: str
  seconds: Floats
  predict: Callable[[Hardware], Floats]

  def log_error(self, hardware: Hardware) -> Floats:
    """Returns [n] log(modelled / measured)."""
    return np.log(self.predict(hardware) / self.seconds)

  def error(self, hardware: Hardware) -> Floats:
    """Returns [n] |modelled / measured - 1|."""
    return np.abs(self.predict(hardware) / self.seconds - 1)


def read(folder: str, prefix: str, hardware: Hardware) -> list[Table]:
  """Reads all tables of a folder's CSV files whose names begin with `prefix`.

  What was measured across nodes counts only if the file is of machines wired
  like this one ('dgx' in its name or not): networks differ most.

  Raises:
    ConfigError: there is no such file, or one is of no kind that we know.
  """
  paths = sorted(pathlib.Path(folder).glob(f'{prefix}*.csv'))
  if not paths:
    raise errors.ConfigError(f'tables={folder!r}: has no file {prefix}*.csv.')
  switched = hardware.nvlink_group == hardware.devices_per_node
  return [
    table
    for path in paths
    for table in _read(path)
    if not table.kind.endswith('across nodes')
    or ('dgx' in path.stem) == switched
  ]


def _read(path: pathlib.Path) -> Iterator[Table]:
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  columns = set(rows[0]) if rows else set()
  if 'time_stats.mlp_up_proj.median' in columns:
    yield from _mlp(path.stem, rows)
  elif 'is_prefill' in columns:
    yield from _attention(path.stem, rows)
  elif 'collective' in columns:
    yield from _collectives(path.stem, rows)
  else:
    raise errors.ConfigError(
      f'{path.name}: columns={sorted(columns)[:8]}: none of the tables known, '
      'which are of MLPs, attention, all-reduces and transfers.'
    )


def _column(rows: Sequence[dict[str, str]], name: str) -> Floats:
  return np.array([float(row[name]) for row in rows])


def _seconds(rows: Sequence[dict[str, str]], operator: str) -> Floats:
  # Milliseconds to the microsecond; the fastest ones are rounded to 0.
  return np.maximum(_column(rows, f'time_stats.{operator}.median'), 5e-4) / 1e3


def _mlp(name: str, rows: list[dict[str, str]]) -> Iterator[Table]:
  heads, kv_heads, width, inner, tp, n = (
    _column(rows, c)
    for c in (
      'n_head',
      'n_kv_head',
      'n_embd',
      'n_expanded_embd',
      'num_tensor_parallel_workers',
      'num_tokens',
    )
  )
  gated = _column(
    [{'g': str(int(r['use_gated_mlp'] == 'True'))} for r in rows], 'g'
  )
  head = width / heads
  qkv = (heads / tp + 2 * np.maximum(1, kv_heads / tp)) * head
  shapes = {
    'attn_pre_proj': (width, qkv),
    'attn_post_proj': (width / tp, width),
    'mlp_up_proj': (width, (1 + gated) * inner / tp),
    'mlp_down_proj': (inner / tp, width),
  }
  for op, (k, m) in shapes.items():
    yield Table(
      name=f'{name} {op}',
      kind='linear',
      model=name,
      seconds=_seconds(rows, op),
      predict=functools.partial(operators.matmul, n=n, k=k, m=m),
    )
  moved = {  # numbers read and written, by token; a norm reads twice
    'input_layernorm': 3 * width,
    'mlp_act': (2 + gated) * inner / tp,
    'attn_rope': 2 * (heads + kv_heads) / tp * head,
  }
  for op, numbers in moved.items():
    yield Table(
      name=f'{name} {op}',
      kind='elementwise',
      model=name,
      seconds=_seconds(rows, op),
      predict=functools.partial(
        operators.elementwise, num_bytes=n * numbers * operators.BYTES
      ),
    )


def _attention(name: str, rows: list[dict[str, str]]) -> Iterator[Table]:
  width, heads, kv_heads, tp = (
    int(rows[0][c])
    for c in ('n_embd', 'n_q_head', 'n_kv_head', 'num_tensor_parallel_workers')
  )
  head = width // heads
  decodes = [r for r in rows if r['is_prefill'] == 'False']
  chunks = [r for r in rows if r['is_prefill'] == 'True']
  context = _column(decodes, 'batch_size') * _column(decodes, 'kv_cache_size')
  yield Table(
    name=f'{name} decode',
    kind='attention',
    model=name,
    seconds=_seconds(decodes, 'attn_decode'),
    predict=lambda hw: (
      hw.efficiencies.attention_s
      + operators.decode_attention(
        hw, context, 2 * kv_heads // tp * head * operators.BYTES
      )
    ),
  )
  tokens, before = (
    _column(chunks, c) for c in ('prefill_chunk_size', 'kv_cache_size')
  )
  yield Table(
    name=f'{name} prefill',
    kind='attention',
    model=name,
    seconds=_seconds(chunks, 'attn_prefill'),
    predict=lambda hw: (
      hw.efficiencies.attention_s
      + operators.prefill_attention(
        hw, tokens, before, heads // tp, head, operators.APPENDING
      )
    ),
  )


def _collectives(name: str, rows: list[dict[str, str]]) -> Iterator[Table]:
  groups: dict[tuple[int, int, int], list[dict[str, str]]] = {}
  for row in rows:
    groups.setdefault(
      (
        int(row['num_workers']),
        int(row['devices_per_node']),
        int(row['max_devices_per_node']),
      ),
      [],
    ).append(row)
  for (workers, per_node, most), group in groups.items():
    kind = group[0]['collective']
    size = _column(group, 'size')
    predict: Any = (
      (
        lambda hw, s=size, w=workers, p=per_node, m=most, n=name: (
          operators.all_reduce(hw, s, w, _link(hw, w, p, m, n))
        )
      )
      if kind == 'all_reduce'
      else (
        lambda hw, s=size, w=workers, p=per_node, m=most, n=name: (
          operators.send(hw, s, _link(hw, w, p, m, n))
        )
      )
    )
    across = '' if workers <= per_node else ', across nodes'
    yield Table(
      name=f'{name} {workers} workers{across}',
      model='',
      kind=kind + across,
      seconds=_seconds(group, kind),
      predict=predict,
    )


def _link(
  hardware: Hardware, workers: int, per_node: int, most: int, name: str
) -> str:
  """Returns the link of a group; a file's name may say how it is wired."""
  if workers > per_node:
    return 'network'
  group = hardware.nvlink_group
  if group > 1 and 'pairwise' in name:
    group = 2
  elif group > 1 and 'dgx' in name:
    group = most
  return 'nvlink' if workers <= group else 'pcie'

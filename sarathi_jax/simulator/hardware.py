# SPDX-License-Identifier: Apache-2.0
"""What a GPU and its machine are: facts, and what was fitted to measurements.

A device is a small JSON file: those in `devices/`, by name, or any path. If it
names a `gpu`, the facts of that come from `pallas_kernels.gpu_targets`, else
from the file. Its `efficiencies` are the only fitted numbers, eleven, written
by `calibrate`: fractions of what the hardware could do, and fixed times of
launches. A device that nobody measured takes those of another
(`efficiencies_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

from pallas_kernels import gpu_targets
from sarathi_jax import errors
from sarathi_jax import json_file

_FOLDER = pathlib.Path(__file__).parent / 'devices'
LINKS = ('nvlink', 'pcie', 'network')
_OPTIONAL = {'fp8_flops'}  # fields that a file may leave out, or null


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
  """How much of the hardware's limits is reached; all fitted.

  Attributes:
    gemm: fraction of the arithmetic rate, by a matmul of full tiles.
    memory: fraction of the memory's rate, by a matmul that is bound by it.
    elementwise: bytes that a processor reads and writes a cycle, in norms,
      activations and rotations.
    decode_attention: fraction of the memory's rate, by reading keys and values.
    prefill_attention: fraction of the arithmetic rate.
    kernel_s: the least time of a matmul, seconds.
    attention_s: the least time of a call of attention, seconds.
    collective_s: the least time of an all-reduce, seconds.
    nvlink, pcie, network: fraction of the link's rate, by all-reduces and
      transfers.
  """

  gemm: float
  memory: float
  elementwise: float
  decode_attention: float
  prefill_attention: float
  kernel_s: float
  attention_s: float
  collective_s: float
  nvlink: float
  pcie: float
  network: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
  """One kind of machine. Rates are per second and direction.

  Attributes:
    name: the device's name, for people.
    flops: dense 16-bit floating-point operations a second.
    fp8_flops: those of fp8 by fp8; None: it has none.
    memory_bytes: memory of one device.
    memory_rate: bytes a second.
    num_sms: processors of a device, which tiles of work are spread over.
    clock_hz: the processors' clock.
    devices_per_node: devices of one machine.
    nvlink_group: devices that NVLink joins; 1 for none.
    link_rates: bytes a second out of a device, by name of `LINKS`.
    message_s: the time of the smallest message between nodes, seconds.
    efficiencies: the fitted numbers.
  """

  name: str
  flops: float
  memory_bytes: float
  memory_rate: float
  num_sms: int
  clock_hz: float
  devices_per_node: int
  nvlink_group: int
  link_rates: Mapping[str, float]
  message_s: float
  efficiencies: Efficiencies
  fp8_flops: float | None = None

  def with_efficiencies(self, **values: float) -> Hardware:
    """Returns the same hardware with some efficiencies replaced."""
    return dataclasses.replace(
      self, efficiencies=dataclasses.replace(self.efficiencies, **values)
    )

  def link_within(self, first: int, last: int) -> str:
    """Returns the slowest link between the devices numbered [first, last]."""
    for link, size in (
      ('nvlink', self.nvlink_group),
      ('pcie', self.devices_per_node),
    ):
      if first // size == last // size:
        return link
    return 'network'

  def link_rate(self, link: str) -> float:
    """Returns the bytes a second that a link reaches."""
    efficiency: float = getattr(self.efficiencies, link)
    return self.link_rates[link] * efficiency

  def ring_rate(self, link: str) -> float:
    """Returns the bytes a second of rings whose slowest hop is a link.

    Where NVLink joins pairs, each device of a pair has a PCIe link of its own:
    rings in both directions leave the pair by both.
    """
    ways = self.nvlink_group if link == 'pcie' else 1
    return self.link_rate(link) * ways


def names() -> list[str]:
  """Returns the devices that come with the package."""
  return sorted(path.stem for path in _FOLDER.glob('*.json'))


def load(name: str) -> Hardware:
  """Loads a device by name, or by the path of its file.

  Raises:
    ConfigError: there is no such device, or the file is malformed.
  """
  path = _FOLDER / f'{name}.json'
  if name.endswith('.json'):
    path = pathlib.Path(name)
  if not path.is_file():
    raise errors.ConfigError(
      f'device={name!r}: must be one of {", ".join(names())}, or a JSON file '
      'like theirs.'
    )
  try:
    return from_dict(json_file.read(path), path.stem)
  except (ArithmeticError, AttributeError, RecursionError, TypeError) as error:
    raise errors.ConfigError(
      f'device={name!r}: something is of the wrong type: {error}.'
    ) from error


def from_dict(fields: Any, name: str) -> Hardware:
  """Makes the device that a file describes; ConfigError says what is wrong."""

  def fail(what: str) -> errors.ConfigError:
    return errors.ConfigError(f'device={name!r}: {what}.')

  if not isinstance(fields, dict):
    raise fail('must be an object')
  fields = {
    k: v
    for k, v in fields.items()
    if k != 'source' and not (k in _OPTIONAL and v is None)
  }
  gpu = fields.pop('gpu', None)
  if gpu is not None:
    if gpu not in gpu_targets.TARGETS:
      raise fail(
        f'gpu={gpu!r}: must be one of {", ".join(gpu_targets.TARGETS)}'
      )
    fields = _facts_of(gpu_targets.TARGETS[gpu]) | fields
  other = fields.pop('efficiencies_of', None)
  if other is not None:
    fields['efficiencies'] = dataclasses.asdict(load(other).efficiencies) | (
      fields.get('efficiencies', {})
    )
  for what, cls, part in (
    ('', Hardware, {'name': name, **fields}),
    ('efficiencies', Efficiencies, fields.get('efficiencies')),
  ):
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(part, dict) or set(part) | _OPTIONAL & known != known:
      wrong = sorted(known ^ (set(part or {}) | _OPTIONAL & known))
      raise fail(f'{what or "fields"} {", ".join(wrong)}: missing or unknown')
    for key, value in part.items():
      numbers = value.values() if key == 'link_rates' else [value]
      if key not in ('name', 'efficiencies') and not all(
        isinstance(v, (int, float)) and math.isfinite(v) and v > 0
        for v in numbers
      ):
        raise fail(f'{key}={value!r}: must be a finite number > 0')
  if set(fields['link_rates']) != set(LINKS):
    raise fail(f'link_rates must have {", ".join(LINKS)}')
  return Hardware(
    **{
      'name': name,
      **fields,
      'efficiencies': Efficiencies(**fields['efficiencies']),
    }
  )


def _facts_of(gpu: gpu_targets.GpuTarget) -> dict[str, float]:
  """Returns the fields of `Hardware` that are a GPU's."""
  facts = {
    'flops': gpu.matmul_flops,
    'memory_bytes': gpu.memory_bytes,
    'memory_rate': gpu.bandwidth,
    'num_sms': gpu.multiprocessors,
    'clock_hz': gpu.clock_ghz * 1e9,
    'fp8_flops': gpu.fp8_flops,
  }
  return {name: fact for name, fact in facts.items() if fact is not None}

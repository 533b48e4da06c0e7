# SPDX-License-Identifier: Apache-2.0
"""Devices: those that come along, links, and files of others."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from pallas_kernels import gpu_targets
from sarathi_jax import errors
from sarathi_jax.simulator import hardware


@pytest.mark.parametrize('name', hardware.names())
def test_devices_come_with_a_dozen_fitted_numbers_at_most(name: str) -> None:
  device = hardware.load(name)
  assert len(dataclasses.fields(device.efficiencies)) <= 12
  assert 0 < device.efficiencies.gemm < 1


@pytest.mark.parametrize('name', hardware.names())
def test_facts_of_gpus_are_those_that_kernels_are_compiled_for(
  name: str,
) -> None:
  device = hardware.load(name)
  gpu = gpu_targets.get(name.partition('_')[0])
  assert (device.memory_bytes, device.memory_rate, device.num_sms) == (
    gpu.memory_bytes,
    gpu.bandwidth,
    gpu.multiprocessors,
  )
  assert (device.flops, device.fp8_flops, device.clock_hz) == (
    gpu.matmul_flops,
    gpu.fp8_flops,
    gpu.clock_ghz * 1e9,
  )


@pytest.mark.parametrize(
  ('device', 'last', 'link'),
  [
    ('a100', 1, 'nvlink'),
    ('a100', 3, 'pcie'),
    ('a100', 7, 'network'),
    ('a100_dgx', 7, 'nvlink'),
    ('a40', 1, 'nvlink'),
    ('a40', 7, 'pcie'),
  ],
)
def test_a_group_is_as_slow_as_its_slowest_link(
  device: str, last: int, link: str
) -> None:
  assert hardware.load(device).link_within(0, last) == link


def test_rings_leave_a_pair_by_both_of_its_links() -> None:
  pairs, switched = (hardware.load(n) for n in ('a100', 'a100_dgx'))
  assert pairs.ring_rate('pcie') == 2 * pairs.link_rate('pcie')
  for link in ('nvlink', 'network'):
    assert pairs.ring_rate(link) == pairs.link_rate(link)
  assert switched.ring_rate('nvlink') == switched.link_rate('nvlink')


def _write(path: pathlib.Path, **changes: Any) -> str:
  fields = dataclasses.asdict(hardware.load('a100')) | changes
  path.write_text(
    json.dumps({k: v for k, v in fields.items() if v is not None})
  )
  return str(path)


def test_a_file_makes_a_device(tmp_path: pathlib.Path) -> None:
  path = _write(
    tmp_path / 'b200.json',
    name='B200',
    flops=2.25e15,
    efficiencies=None,
    efficiencies_of='a100',
  )
  device = hardware.load(path)
  assert device.flops == 2.25e15
  assert device.efficiencies == hardware.load('a100').efficiencies


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'flops': -1}, 'flops=-1: must be a finite number > 0'),
    ({'num_sms': None}, 'num_sms: missing or unknown'),
    ({'gpu': 'a41'}, "gpu='a41': must be one of a100, a40, h100"),
    ({'colour': 'green'}, 'colour: missing or unknown'),
    ({'efficiencies': {'gemm': 1}}, 'efficiencies .*memory.*: missing'),
    ({'link_rates': {'nvlink': 1}}, 'link_rates must have'),
  ],
)
def test_bad_files_are_refused(
  tmp_path: pathlib.Path, changes: dict, message: str
) -> None:
  with pytest.raises(errors.ConfigError, match=message):
    hardware.load(_write(tmp_path / 'bad.json', **changes))


def test_unknown_devices_name_the_known(tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.ConfigError, match='a100, a100_dgx, a40'):
    hardware.load('tpu')
  (tmp_path / 'x.json').write_text('{')
  with pytest.raises(errors.ConfigError, match='x'):
    hardware.load(str(tmp_path / 'x.json'))

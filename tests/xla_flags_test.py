# SPDX-License-Identifier: Apache-2.0
"""The flags that mains give XLA: known to it, and the user's come last."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from sarathi_jax import config
from sarathi_jax import xla_flags
from sarathi_jax.in_process import building

GRAPHS = '--xla_gpu_enable_command_buffer=+WHILE'
OURS = f'{GRAPHS} --xla_gpu_experimental_force_split_k=1'


@pytest.mark.parametrize(
  ('version', 'expected'),
  [
    ((0, 10, 1), ''),
    ((0, 10, 2), OURS),
    ((0, 11, 2), OURS),
    ((0, 12, 0), OURS),
    ((0, 13, 0), ''),
  ],
)
def test_flags_are_for_versions(
  version: tuple[int, ...], expected: str
) -> None:
  assert xla_flags.flags(version) == expected


@pytest.mark.parametrize('version', ['0.12.0.1', '0.10.2', '0.12.1.dev3'])
def test_versions_are_read(
  version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
  environ: dict[str, str] = {}
  xla_flags.set_environment(environ)
  assert environ == {
    'XLA_FLAGS': OURS,
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.95',
  }


def test_what_the_user_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.10.2')
  environ = {
    'XLA_FLAGS': '--xla_gpu_enable_command_buffer=',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5',
  }
  xla_flags.set_environment(environ)
  assert environ['XLA_FLAGS'] == f'{OURS} --xla_gpu_enable_command_buffer='
  assert environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.5'


@pytest.mark.parametrize(
  ('given', 'unset'),
  [
    ('', OURS),
    ('--xla_other=1', OURS),
    (OURS, ''),
    (
      '--xla_gpu_enable_command_buffer=',
      '--xla_gpu_experimental_force_split_k=1',
    ),
  ],
)
def test_what_nobody_set_is_told(
  given: str, unset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.10.2')
  assert xla_flags.unset({'XLA_FLAGS': given}) == unset


@pytest.mark.parametrize(
  ('platform', 'flags', 'is_warned'),
  [('gpu', '', True), ('gpu', OURS, False), ('cpu', '', False)],
)
def test_an_engine_on_a_gpu_warns_of_them(
  platform: str, flags: str, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Who embeds it has started JAX long before."""
  monkeypatch.setenv('XLA_FLAGS', flags)
  monkeypatch.setattr(
    building.device_runner, 'DeviceRunner', lambda *args, **kwargs: 'runner'
  )
  mesh: Any = types.SimpleNamespace(
    devices=types.SimpleNamespace(
      flat=[types.SimpleNamespace(platform=platform)]
    )
  )
  made: Any = functools.partial(
    building.build_runner,
    None,
    None,
    None,
    mesh,  # type: ignore[arg-type]
    config.EngineConfig(compilation_cache_dir=None),
    lambda *n: None,
  )
  if is_warned:
    with pytest.warns(RuntimeWarning, match='xla_gpu_enable_command_buffer'):
      assert made() == 'runner'
  else:
    assert made() == 'runner'


def _start(flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.numpy.ones(3).sum())'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    check=False,
  )


def test_xla_knows_them() -> None:
  """Also where there is no GPU; at a flag that it does not know, it ends."""
  environ: dict[str, str] = {}
  xla_flags.set_environment(environ)
  assert environ['XLA_FLAGS']
  assert _start(environ['XLA_FLAGS']).stdout == '3.0\n'
  assert 'Unknown flag' in _start('--xla_gpu_no_such_flag=1').stderr


@pytest.mark.parametrize(
  ('environ', 'num_devices', 'expected'),
  [
    ({}, 3, '--xla_force_host_platform_device_count=3'),
    ({}, 1, None),
    (
      {'XLA_FLAGS': '--x=1'},
      3,
      '--x=1 --xla_force_host_platform_device_count=3',
    ),
    (
      {'XLA_FLAGS': '--xla_force_host_platform_device_count=5'},
      3,
      '--xla_force_host_platform_device_count=5',
    ),
    ({'JAX_NUM_CPU_DEVICES': '2'}, 3, None),
  ],
)
def test_a_cpu_is_as_many_devices_as_are_asked_for(
  environ: dict[str, str], num_devices: int, expected: str | None
) -> None:
  """Unless the user said how many."""
  xla_flags.make_cpu_devices(environ, num_devices)
  assert environ.get('XLA_FLAGS') == expected

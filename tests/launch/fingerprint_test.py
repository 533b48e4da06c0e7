# SPDX-License-Identifier: Apache-2.0
"""Two processes that would not compute the same are told apart."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import pytest

from checkpoints_convert import convert
from sarathi_jax import opening
from sarathi_jax.launch import fingerprint
from sarathi_jax.models import parallel
from sarathi_jax.runner import joining
from sarathi_jax.runner import source_hash
from tests import tiny
from tests.checkpoints_convert import fake_checkpoint as fake


def differing(theirs: object, ours: object) -> list[str]:
  """Names of what differs, as it is told, after JSON."""
  assert isinstance(theirs, dict) and isinstance(ours, dict)
  told = joining.misfit(1, json.loads(json.dumps(theirs)), ours) or ''
  return [name for name in ours if f'{name} is ' in told]


@pytest.mark.parametrize(
  'fields',
  [
    dict(token_budget=16),
    dict(page_size=16),
    dict(num_pages=25),
    dict(tp=2),
    dict(kv_cache_dtype='int8'),
    dict(dtype='float16'),
    dict(max_model_len=32),
    dict(seed=1),
  ],
)
def test_a_configuration_that_differs_is_named(fields: dict[str, int]) -> None:
  ours = fingerprint.program(tiny.engine_config())
  theirs = fingerprint.program(tiny.engine_config(**fields))
  assert differing(theirs, ours) == [f'config.{name}' for name in fields]


def test_what_is_a_hosts_own_affair_differs_as_it_likes(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  ours = fingerprint.program(tiny.engine_config())
  monkeypatch.setenv(
    'XLA_FLAGS', '--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=3'
  )
  theirs = fingerprint.program(
    tiny.engine_config(compilation_cache_dir='/elsewhere')
  )
  assert differing(theirs, {**ours, 'XLA_FLAGS': ''}) == []


def test_versions_flags_and_code_are_named(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  config = tiny.engine_config()
  ours = fingerprint.program(config)
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
  monkeypatch.setattr(
    fingerprint.importlib.metadata, 'version', lambda name: f'{name} 9'
  )
  source_hash.source_hash.cache_clear()
  monkeypatch.setattr(source_hash, 'PACKAGES', ('pallas_kernels',))
  with jax.default_matmul_precision('highest'):
    theirs = fingerprint.program(config)
  source_hash.source_hash.cache_clear()
  assert set(differing(theirs, ours)) == {
    "jax's version",
    "jaxlib's version",
    'XLA_FLAGS',
    'jax_default_matmul_precision',
    "the code's hash",
  }


def _weights(folder: pathlib.Path, **options: object) -> dict[str, object]:
  return fingerprint.weights(
    opening.open_checkpoint(folder, folder / 'cache', **options)
  )


def test_copies_are_the_same_whatever_files_they_are_in(
  tmp_path: pathlib.Path,
) -> None:
  source = fake.llama(tmp_path / 'hf')
  convert.convert(source, tmp_path / 'one')
  convert.convert(
    source, tmp_path / 'two', parallelism=parallel.Parallelism(tp=2)
  )
  ours = _weights(tmp_path / 'one')
  assert differing(_weights(tmp_path / 'two'), ours) == []
  assert differing(_weights(source, convert=False), ours) == []


def test_other_weights_of_the_same_shapes_are_others(
  tmp_path: pathlib.Path,
) -> None:
  convert.convert(fake.llama(tmp_path / 'hf'), tmp_path / 'one')
  ours = _weights(tmp_path / 'one')
  file = tmp_path / 'one' / 'params' / 'layers.1.mlp.down' / '0.0'
  content = bytearray(file.read_bytes())
  content[-3] ^= 1
  file.write_bytes(content)
  assert differing(_weights(tmp_path / 'one'), ours) == ["the weights' hash"]


def test_another_model_is_told_by_its_fields(tmp_path: pathlib.Path) -> None:
  convert.convert(fake.llama(tmp_path / 'hf'), tmp_path / 'one')
  opened = opening.open_checkpoint(tmp_path / 'one', tmp_path)
  theirs = fingerprint.weights(
    opened._replace(
      metadata=dataclasses.replace(
        opened.metadata,
        model=dataclasses.replace(opened.metadata.model, norm_eps=0.5),
      )
    )
  )
  assert differing(theirs, fingerprint.weights(opened)) == [
    'checkpoint.norm_eps'
  ]

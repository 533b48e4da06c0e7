# SPDX-License-Identifier: Apache-2.0
"""The protocol says what the engine's types say, and is generated from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

from sarathi_jax import types
from sarathi_jax.engine import engine
from sarathi_jax.engine import state
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.protocols import sarathi_v1
from tests import sampling_fields
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[2]
GENERATED = [
  f'{name}{suffix}'
  for name in ('sarathi', 'open_inference')
  for suffix in ('_pb2.py', '_pb2.pyi', '_pb2_grpc.py')
]


def _names(message: type) -> set[str]:
  return {field.name for field in message.DESCRIPTOR.fields}


def _fields(cls: type) -> set[str]:
  return {field.name for field in dataclasses.fields(cls)}


def test_generated_code_is_up_to_date(tmp_path: pathlib.Path) -> None:
  assert importlib.metadata.version('grpcio-tools') == '1.81.1', (
    'scripts/gen_proto is for this version; see there'
  )
  subprocess.run(
    [ROOT / 'scripts' / 'gen_proto', tmp_path],
    check=True,
    env={**os.environ, 'PYTHON': sys.executable},
  )
  for name in GENERATED:
    path = f'sarathi_jax/server/{name}'
    assert (tmp_path / path).read_text() == (ROOT / path).read_text(), (
      f'{path} is stale: run scripts/gen_proto'
    )


def test_messages_have_the_fields_of_the_types() -> None:
  assert _names(pb.SamplingParams) == (
    _fields(types.SamplingParams) | {'fill_context'}
  )
  assert _names(pb.GetModelInfoResponse) == (
    _fields(engine.EngineInfo) | {'has_tokenizer'}
  )
  assert _names(pb.GetStatsResponse) == (
    _fields(state.EngineStats) | set(sarathi_v1.OWN_STATS)
  )
  assert _names(pb.RequestState) == _fields(state.RequestState)
  assert _names(pb.Timing) | {
    'num_prompt_tokens',
    'num_cached_tokens',
    'num_output_tokens',
  } == _fields(types.RequestMetrics)
  assert {
    name.removeprefix('FINISH_REASON_').lower()
    for name, _ in pb.FinishReason.items()
  } - {'unspecified'} == {reason.value for reason in types.FinishReason}


def test_every_sampling_field_arrives() -> None:
  sampling = types.SamplingParams(**sampling_fields.EXAMPLES)
  assert (
    sarathi_v1.sampling_of(pb.SamplingParams(**dataclasses.asdict(sampling)))
    == sampling
  )


def test_unset_sampling_is_the_default() -> None:
  assert sarathi_v1.sampling_of(pb.SamplingParams()) == types.SamplingParams()
  assert (
    sarathi_v1.sampling_of(pb.SamplingParams(fill_context=False))
    == types.SamplingParams()
  )
  assert (
    sarathi_v1.sampling_of(pb.SamplingParams(fill_context=True)).max_tokens
    is None
  )


def test_unset_sampling_is_what_the_model_recommends() -> None:
  info = fake.make_engine(
    default_sampling=dict(temperature=0.6, top_p=0.9)
  ).info
  assert sarathi_v1.sampling_of(
    pb.SamplingParams(temperature=0.0), info.sampling
  ) == types.SamplingParams(temperature=0.0, top_p=0.9)


def test_a_zero_that_was_set_is_not_taken_for_unset() -> None:
  assert sarathi_v1.sampling_of(
    pb.SamplingParams(temperature=0.0, seed=0, skip_special_tokens=False)
  ) == types.SamplingParams(temperature=0.0, seed=0, skip_special_tokens=False)


@pytest.mark.parametrize(
  'module',
  [
    'protocols.sarathi_v1',
    'protocols.vllm_engine',
    'protocols.open_inference',
    'server',
    'main',
  ],
)
def test_the_server_loads_no_jax(module: str) -> None:
  code = (
    f'import sys, sarathi_jax.server.{module}; '
    'print({"jax", "torch", "transformers"} & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == 'set()'


def test_the_client_loads_only_the_protocol_and_its_flags() -> None:
  code = (
    'import sys, sarathi_jax.client; print(sorted(m for m in sys.modules '
    'if m.startswith("sarathi_jax.") or m == "jax"))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == str(
    [
      'sarathi_jax.cli',
      'sarathi_jax.cli.mains',
      'sarathi_jax.cli.sampling_flags',
      'sarathi_jax.client',
      'sarathi_jax.config',
      'sarathi_jax.errors',
      'sarathi_jax.json_file',
      'sarathi_jax.page_groups',
      'sarathi_jax.sampling_fields',
      'sarathi_jax.sampling_params',
      'sarathi_jax.server',
      'sarathi_jax.server.sarathi_pb2',
      'sarathi_jax.server.sarathi_pb2_grpc',
      'sarathi_jax.structured_outputs',
    ]
  )

# SPDX-License-Identifier: Apache-2.0
"""Whole steps of quantized models, compiled: all products are by codes."""

from __future__ import annotations

import pathlib

import pytest

from sarathi_jax.launch import absent_gpus
from tests.pallas_kernels.aot import deployments_test
from tests.pallas_kernels.aot import matmul

_CONFIG = """
import dataclasses
from sarathi_jax import EngineConfig
from sarathi_jax.models import published
from sarathi_jax.models import quantization
DEVICE = '{device}'
def get_config():
  return EngineConfig(
    token_budget=512, max_num_seqs=64, max_model_len=4096, tp={tp})
def get_model():
  return dataclasses.replace(
    published.MODELS['{model}'], num_layers=2,
    quantization=quantization.Quantization({how}))
"""


def test_matrices_that_are_dequantized_are_named() -> None:
  """As XLA writes it; not what is within a launch, nor rows of a step."""
  text = """
%fused (p: s8[4096,6144]) -> bf16[16,6144] {
  %convert.1 = bf16[4096,6144]{1,0} convert(%p)
}

ENTRY %main {
  %p.1 = s8[4096,6144]{1,0} parameter(1)
  %p.2 = u8[2048,512]{1,0} parameter(2)
  %p.3 = bf16[4096,6144]{1,0} parameter(3)
  %fusion.1 = bf16[4096,6144]{1,0} fusion(%p.1), kind=kLoop
  %fusion.2 = f32[4096,512]{1,0} fusion(%p.2), kind=kLoop
  %fusion.3 = bf16[16,6144]{1,0} fusion(%p.1), kind=kCustom
"""
  assert absent_gpus.dequantized_problems(text, 64) == [
    '1 matrices bf16[4096,6144] of weights are dequantized in each step',
    '1 matrices f32[4096,512] of weights are dequantized in each step',
  ]
  assert not absent_gpus.dequantized_problems(text, 4096)


@matmul.needs_wheels
@pytest.mark.parametrize(
  'device,model,tp,how,tokens',
  [('h100', 'llama-3.1-8b', 2, "codes='int4', group=128, zeros=True", 64)],
)
def test_a_step_multiplies_by_codes(
  device: str,
  model: str,
  tp: int,
  how: str,
  tokens: int,
  tmp_path: pathlib.Path,
) -> None:
  check_step(device, model, tp, how, tokens, tmp_path)


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
  'device,model,tp,how,tokens',
  [
    ('a100', 'llama-3.1-8b', 2, "codes='int8'", 512),
    ('a40', 'llama-3.1-8b', 2, "codes='int8'", 64),
    ('a100', 'llama-3.1-8b', 1, "codes='int4', group=128", 512),
    ('a100', 'llama-3.1-8b', 1, "codes='fp8', group=128", 64),
    ('h100', 'qwen3-32b', 1, "codes='fp8'", 512),
  ],
)
def test_other_steps_multiply_by_codes(
  device: str,
  model: str,
  tp: int,
  how: str,
  tokens: int,
  tmp_path: pathlib.Path,
) -> None:
  check_step(device, model, tp, how, tokens, tmp_path)


def check_step(
  device: str, model: str, tp: int, how: str, tokens: int, folder: pathlib.Path
) -> None:
  """Compiles a step, of which no matrix is written as numbers."""
  config, path = folder / 'quantized.py', folder / 'plan.json'
  config.write_text(_CONFIG.format(device=device, model=model, tp=tp, how=how))
  flags = [f'--tokens={tokens}'] if tokens <= 64 else []
  found = deployments_test.planned(config, path, *flags)
  many = '_many' * (tokens > 64)
  ours = [k['name'] for k in found['step']['kernels'] if k['is_ours']]
  assert any(name.startswith(f'quantized_matmul{many}') for name in ours), ours

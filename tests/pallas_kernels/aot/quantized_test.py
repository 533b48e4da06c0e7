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
  model = published.MODELS['{model}']
  return dataclasses.replace(
    model, num_layers=2, window_layers=model.window_layers and (0,),
    quantization=quantization.Quantization({how}))
"""
# What gpt-oss is published with.
_EXPERTS = (
  "codes='mxfp4', group=32, kept=('lm_head', 'layers.*.attn.*',"
  " 'layers.*.moe.router')"
)


def test_matrices_that_are_dequantized_are_named() -> None:
  """As XLA writes it; not what is within a launch, nor rows of a step."""
  text = """HloModule step
%fused.1 (p: s8[4096,6144]) -> bf16[4096,6144] {
  %convert.1 = bf16[4096,6144]{1,0} convert(%p)
}

%body (p.4: u8[8,2048,768]) -> bf16[16,768] {
  %p.4 = u8[8,2048,768]{2,1,0} parameter(0)
  %fusion.4 = f32[1,4096,768]{2,1,0} fusion(%p.4), kind=kLoop, calls=%fused.2
}

ENTRY %main (p.1: s8[4096,6144]) -> bf16[16,6144] {
  %p.1 = s8[4096,6144]{1,0} parameter(1)
  %p.2 = u8[2048,512]{1,0} parameter(2)
  %p.3 = bf16[4096,6144]{1,0} parameter(3)
  %p.5 = u8[8,2048,768]{2,1,0} parameter(4)
  %fusion.1 = bf16[4096,6144]{1,0} fusion(%p.1), kind=kLoop, calls=%fused.1
  %fusion.2 = f32[4096,512]{1,0} fusion(%p.2), kind=kLoop, calls=%fused.3
  %fusion.3 = f32[16,6144]{1,0} fusion(%p.1), kind=kCustom, calls=%fused.4
  %fusion.5 = bf16[8,4096,768]{2,1,0} fusion(%p.5), kind=kLoop, calls=%fused.5
  %fusion.6 = bf16[8,512,768]{2,1,0} fusion(%p.5), kind=kLoop, calls=%fused.6
"""
  assert absent_gpus.dequantized_problems(text, 64) == [
    '1 matrices f32[4096,768] of weights are dequantized in each step',
    '1 matrices bf16[4096,6144] of weights are dequantized in each step',
    '1 matrices f32[4096,512] of weights are dequantized in each step',
    '1 matrices bf16[8,4096,768] of weights are dequantized in each step',
  ]
  assert not absent_gpus.dequantized_problems(text, 64, 4096)


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
    ('h100', 'gpt-oss-20b', 1, _EXPERTS, 64),
    ('a100', 'gpt-oss-20b', 2, _EXPERTS, 512),
    ('a40', 'qwen3-30b-a3b', 1, "codes='int4', group=128", 64),
    ('a100', 'qwen3-30b-a3b', 2, "codes='fp8', group=128", 512),
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
  expected = f'quantized_matmul{many}', 'grouped_matmul_codes'
  ours = [k['name'] for k in found['step']['kernels'] if k['is_ours']]
  assert any(name.startswith(expected) for name in ours), ours

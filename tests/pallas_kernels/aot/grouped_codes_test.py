# SPDX-License-Identifier: Apache-2.0
"""Experts in codes, compiled: they fit, and cost what their bytes do.

Estimates are no measurements; see `pallas_kernels.aot.estimates`.
"""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import configurations
from pallas_kernels.grouped_matmul import tuning
from pallas_kernels.quantized_matmul import arg_specs as quantized_specs
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import plan as plan_lib
from tests.pallas_kernels.aot import matmul

DEVICES = list(gpu_targets.TARGETS)
# Each device has two of these to compile in a push.
PUSHED = (
  ('a100', 'qwen3-30b-a3b', 'int4-128', 16, 2),
  ('a100', 'gpt-oss-20b', 'mxfp4', 512, 2),
  ('a40', 'qwen3-30b-a3b', 'fp8-128', 512, 1),
  ('a40', 'gpt-oss-20b', 'mxfp4', 16, 1),
  ('h100', 'gpt-oss-20b', 'mxfp4', 16, 2),
  ('h100', 'qwen3-30b-a3b', 'int4-128', 512, 2),
)


@matmul.needs_wheels
@pytest.mark.parametrize('device,model,codes,tokens,kinds', PUSHED)
def test_experts_in_codes_compile(
  device: str, model: str, codes: str, tokens: int, kinds: int
) -> None:
  """In one launch of ours, and no matrix is put together."""
  case = configurations.case(model, tokens, kinds, codes=codes)
  (result,) = cases.check([case], device)
  assert not result.problems
  assert [k.name for k in result.kernels if k.is_ours] == [
    'grouped_matmul_codes'
  ]
  assert result.compiled.memory_analysis().temp_size_in_bytes == 0


@matmul.needs_disassembler
def test_chunks_that_are_rounded_multiply_8_bits() -> None:
  """In half of the time of 16 bits, and nothing else is put together."""
  case = configurations.rounded('qwen3-30b-a3b', 8192, 2)
  assert plan_of(case, 'h100').shape.is_fp8
  loop = loop_of(case, 'h100')
  sizes = plan_of(case, 'h100').sizes
  target = gpu_targets.get('h100')
  products = 2 * 2 * sizes.rows * sizes.columns * sizes.depth
  of_16_bits = products / (target.matmul_flops / target.multiprocessors) * 1e9
  print(f'{loop.loop}, {loop.estimate}, {of_16_bits=:.0f} ns')
  assert max(loop.estimate.issue, loop.estimate.matrix) <= 0.6 * of_16_bits


# Of the time that the bytes of the experts that are chosen take, at the most.
# It should be 1.25; MXFP4's waits for instructions but on A40.
DECODES = (
  ('a100', 'qwen3-30b-a3b', 'int4-128', 1.1),
  ('h100', 'qwen3-30b-a3b', 'int4-128', 1.1),
  ('a40', 'qwen3-30b-a3b', 'int4-128', 1.1),
  ('a100', 'qwen3-30b-a3b', 'fp8-128', 1.1),
  ('h100', 'qwen3-30b-a3b', 'fp8-128', 1.1),
  ('a100', 'gpt-oss-20b', 'mxfp4', 1.7),
  ('h100', 'gpt-oss-20b', 'mxfp4', 1.7),
  ('a40', 'gpt-oss-20b', 'mxfp4', 1.25),
)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('device,model,codes,most', DECODES)
def test_decodes_wait_for_bytes(
  device: str, model: str, codes: str, most: float
) -> None:
  assert time_of(device, model, codes, 16) <= most


def time_of(device: str, model: str, codes: str, tokens: int) -> float:
  """Returns the time of a layer's experts, in that of the bytes they need.

  Of tokens that choose each for itself.
  """
  target = gpu_targets.get(device)
  keys = arg_specs.choose(
    configurations.case(model, tokens, 2, codes=codes).spec
  )
  sizes = np.bincount(keys.ravel())
  least = total = 0.0
  for kinds in (2, 1):
    case = configurations.case(model, tokens, kinds, codes=codes)
    plan = plan_of(case, device)
    loop = loop_of(case, device)
    spec = case.spec
    tiles = int((-(-sizes // plan.sizes.rows)).sum()) * plan.column_tiles
    matrix = plan.values_bytes + of_groups_bytes(case)
    floor = kinds * matrix * int((sizes > 0).sum())
    floor += 2 * keys.size * (spec.num_in + spec.num_out)
    blocks = -(-tiles // target.multiprocessors)
    estimate = loop.estimate
    clocks = max(estimate.issue, estimate.matrix)
    work = clocks * blocks * -(-spec.num_in // plan.sizes.depth)
    memory = floor / target.bandwidth * 1e9
    print(f'{case.name}: {loop.loop}, {work=:.0f}, {memory=:.0f} ns')
    least += memory
    total += max(work, memory)
  print(f'{total / least:.3f} of the time of the bytes')
  return total / least


# Of the tensor cores' time, at the most. It should be 1.15.
CHUNKS = (
  ('h100', 'gpt-oss-20b', 'mxfp4', 1.01),
  ('a100', 'gpt-oss-20b', 'mxfp4', 1.01),
  ('a40', 'gpt-oss-20b', 'mxfp4', 1.01),
  ('h100', 'qwen3-30b-a3b', 'int4-128', 1.01),
)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('device,model,codes,most', CHUNKS)
def test_chunks_wait_for_products(
  device: str, model: str, codes: str, most: float
) -> None:
  for kinds in (2, 1):
    case = configurations.case(model, 2048, kinds, codes=codes)
    one = loop_of(case, device)
    print(f'{case.name}: {one.loop}, {one.estimate}')
    assert one.estimate.issue <= most * one.estimate.matrix


def loop_of(case: configurations.Case, device: str) -> estimates.Judged:
  """Compiles a case, and returns its loop."""
  (result,) = cases.check([case], device)
  assert not result.problems
  return max(
    (one for one in estimates.judge(result, device) if one.loop.matrix),
    key=lambda one: one.loop.instructions,
  )


def plan_of(case: configurations.Case, device: str) -> plan_lib.Plan:
  x, _, rows, *more = case.args
  how = case.matmul
  assert how is not None
  with compiler.on(device):
    return tuning.choose_coded(
      tuning.Shape.of(x, more[: case.kinds], rows), how
    )


def of_groups_bytes(case: configurations.Case) -> int:
  """Returns the bytes of the scales and zeros of a matrix."""
  codes, group, has_zero = quantized_specs.KINDS[case.codes or '']
  one = 4 if operand.CODES[codes].scale == 'float32' else 1
  groups = 1 if group is None else -(-case.spec.num_in // group)
  return groups * case.spec.num_out * (one + has_zero)

# SPDX-License-Identifier: Apache-2.0
"""Products with codes, compiled: they fit, and cost what their bytes do.

Estimates are no measurements; see `pallas_kernels.aot.estimates`.
"""

from __future__ import annotations

import dataclasses
from typing import Any
import zlib

import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.quantized_matmul import arg_specs
from pallas_kernels.quantized_matmul import configurations
from pallas_kernels.quantized_matmul import pallas_triton
from pallas_kernels.quantized_matmul import plan as plan_lib
from pallas_kernels.quantized_matmul import tuning
from tests.pallas_kernels.aot import matmul

DEVICES = list(gpu_targets.TARGETS)
MODEL = 'llama-3.1-8b'


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_products_with_codes_compile(device: str) -> None:
  """Of a matrix, each way for one of the devices."""
  check_all(
    device,
    [
      case
      for kind in arg_specs.KINDS
      for tokens in (16, 512)
      for case in (configurations.case(MODEL, 'gate_up', kind, tokens),)
      if zlib.crc32(case.name.encode()) % len(DEVICES) == DEVICES.index(device)
    ],
  )


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_all_products_with_codes_compile(device: str) -> None:
  check_all(device, list(configurations.cases(device)))


def check_all(device: str, chosen: list[configurations.Case]) -> None:
  """Compiles cases: in one launch of ours, and no matrix is put together."""
  results = cases.check(chosen, device)
  assert not {r.name: r.problems for r in results if r.problems}
  for case, result in zip(chosen, results, strict=True):
    ours = [kernel.name for kernel in result.kernels if kernel.is_ours]
    many = '_many' * (case.spec.num_tokens > tuning.FEW_ROWS)
    assert ours == [f'quantized_matmul{many}']
    plan = plan_of(case, device)
    temporaries = result.compiled.memory_analysis().temp_size_in_bytes
    assert temporaries <= plan.sums_bytes // 2, case.name


def plan_of(case: configurations.Case, device: str) -> plan_lib.Plan:
  spec = case.spec
  with compiler.on(device):
    x, w, *_ = case.args
    shape = tuning.Shape.of(x, w, spec.codes, spec.group, case.by_columns)
    return plan_lib.of(
      shape,
      tuning.choose(shape),
      gpu_targets.get(device).multiprocessors,
    )


def loop_of(case: Any, device: str) -> estimates.Judged:
  """Compiles a case, and returns its loop."""
  (result,) = cases.check([case], device)
  assert not result.problems
  return max(
    (one for one in estimates.judge(result, device) if one.loop.matrix),
    key=lambda one: one.loop.instructions,
  )


# Of the bytes' time, at the most: what a layer takes. It should be 1.25.
DECODES = (('a100', 'int4-128', 1.05), ('h100', 'int4-128', 1.05))
OTHERS = (
  ('a40', 'int4-128', 1.1),
  ('a100', 'int8', 1.1),
  ('h100', 'int8', 1.1),
  ('a100', 'fp8-128', 1.1),
  ('h100', 'fp8', 1.1),
  ('a100', 'int4-128-zero', 1.2),
  ('h100', 'int4-128-zero', 1.2),
  ('a100', 'int4-32', 1.2),
)


@matmul.needs_disassembler
@pytest.mark.parametrize('device,kind,most', DECODES)
def test_decodes_wait_for_bytes(device: str, kind: str, most: float) -> None:
  check_decodes(device, kind, most)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('device,kind,most', OTHERS)
def test_decodes_wait_for_bytes_of_other_codes(
  device: str, kind: str, most: float
) -> None:
  check_decodes(device, kind, most)


def check_decodes(device: str, kind: str, most: float) -> None:
  """Adds up a layer's matrices, 16 tokens."""
  target = gpu_targets.get(device)
  least = total = 0.0
  for matrix in arg_specs.MODELS[MODEL]:
    case = configurations.case(MODEL, matrix, kind, 16)
    loop, plan = loop_of(case, device), plan_of(case, device)
    assert loop.loop.loads[0][0] >= 64 and 0 not in loop.loop.waits
    spec = case.spec
    of_groups = spec.groups * spec.num_out * (4 + spec.has_zero)
    floor = plan.values_bytes + of_groups
    floor += 2 * spec.num_tokens * (spec.num_in + spec.num_out)
    blocks = -(-plan.num_items // target.multiprocessors)
    issue = loop.estimate.issue * blocks * -(-plan.turns // plan.splits)
    memory = (floor + plan.sums_bytes) / target.bandwidth * 1e9
    print(f'{matrix}: {plan.num_items} items, {issue=:.0f}, {memory=:.0f} ns')
    least += floor / target.bandwidth * 1e9
    total += max(issue, memory)
  print(f'{total / least:.3f} of the time of the bytes')
  assert total <= most * least


# Of the time of the same tile of 16 bits, at the most. It should be 1.15.
CHUNKS = (('a100', 'int8', 1.01), ('h100', 'mxfp4', 1.01))
OTHER_CHUNKS = (
  ('a40', 'int4-128', 1.01),
  ('a100', 'int4-128', 1.01),
  ('a100', 'fp8-128', 1.01),
  ('h100', 'int8', 1.01),
  ('h100', 'fp8-128', 1.01),
  ('h100', 'int4-128', 1.01),
  ('h100', 'int4-32', 1.2),
  ('h100', 'int4-32-zero', 1.28),
  ('h100', 'int4-64-zero', 1.01),
  ('a100', 'int4-32', 1.01),
  ('a100', 'mxfp4', 1.01),
  ('h100', 'int4-128-zero', 1.01),
)


@matmul.needs_disassembler
@pytest.mark.parametrize('tokens', [512, 2048])
def test_chunks_that_are_rounded_multiply_8_bits(tokens: int) -> None:
  """In less time than 16 bits, with scales in the launch that multiplies."""
  case = configurations.rounded(MODEL, 'gate_up', tokens)
  check_all('h100', [case])
  plain = _Plain(configurations.case(MODEL, 'gate_up', 'fp8', tokens))

  def time_of(case: Any, plan: plan_lib.Plan) -> float:
    """Nanoseconds of a multiprocessor for 2**20 products."""
    one = loop_of(case, 'h100')
    sizes = plan.sizes
    products = sizes.rows * sizes.columns * sizes.depth / 2**20
    time = max(one.estimate.issue, one.estimate.matrix) / products
    print(f'{case.name}: {one.loop}, {one.estimate}, {time=:.0f} ns')
    return time

  assert time_of(case, plan_of(case, 'h100')) <= 0.6 * time_of(
    plain, plan_of(plain.of, 'h100')
  )


@dataclasses.dataclass(frozen=True)
class _Plain:
  """The same product, and tile, of a matrix that is not in codes."""

  of: configurations.Case

  @property
  def name(self) -> str:
    return f'{self.of.name} plain'

  @property
  def args(self) -> Any:
    x, w = self.of.args
    shape = self.of.spec.num_in, self.of.spec.num_out
    values = type(w.scale)(shape, jnp.bfloat16)
    scale = type(w.scale)((1, shape[1]), jnp.float32)
    return x, type(w)(values, scale)

  def function(self, x: Any, w: Any) -> Any:
    return pallas_triton.quantized_matmul(x, w, 'int8', None, x.dtype)


@matmul.needs_disassembler
@pytest.mark.parametrize('device,kind,most', CHUNKS)
def test_chunks_wait_for_products(device: str, kind: str, most: float) -> None:
  check_chunks(device, kind, most)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('device,kind,most', OTHER_CHUNKS)
def test_chunks_wait_for_products_of_other_codes(
  device: str, kind: str, most: float
) -> None:
  check_chunks(device, kind, most)


def check_chunks(device: str, kind: str, most: float) -> None:
  """Compares the time of an operation, at 512 tokens."""
  case = configurations.case(MODEL, 'gate_up', kind, 512)

  def of(case: Any) -> float:
    one = loop_of(case, device)
    time = max(one.estimate.issue, one.estimate.matrix)
    print(f'{case.name}: {one.loop}, {time=:.0f} ns')
    return time / one.estimate.matrix

  assert of(case) <= most * of(_Plain(case))

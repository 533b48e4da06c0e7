# SPDX-License-Identifier: Apache-2.0
"""Tiles of experts, compiled: what has few rows multiplies few.

Estimates are no measurements; see `pallas_kernels.aot.estimates`.
"""

from __future__ import annotations

import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.grouped_matmul import configurations
from pallas_kernels.grouped_matmul import tuning
from tests.pallas_kernels.aot import matmul

_OF_MMA = 2 * 16 * 8 * 16  # operations of a warp's instruction, Ampere's


@matmul.needs_disassembler
@pytest.mark.parametrize('device', gpu_targets.TARGETS)
def test_few_rows_take_few_products(device: str) -> None:
  """As three blocks of a multiprocessor do at a time."""
  check(device, 64, 3)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('device', gpu_targets.TARGETS)
@pytest.mark.parametrize('tokens,blocks', [(32, 4), (2048, 1)])
def test_other_tiles(device: str, tokens: int, blocks: int) -> None:
  check(device, tokens, blocks)


def check(device: str, tokens: int, blocks: int) -> None:
  """Compiles gate and up of experts, and counts in each way's loop.

  Args:
    device: compiled for.
    tokens: of a step.
    blocks: that a multiprocessor has room for, at least.
  """
  case = configurations.case('qwen3-30b-a3b', tokens, 2)
  x, _, rows, *matrices = case.args
  shape = tuning.Shape.of(x, matrices, rows)
  with compiler.on(device):
    sizes = tuning.choose(shape).for_shape(shape)
  (result,) = cases.check([case], device)
  assert not result.problems
  assert min(k.blocks_per_sm for k in result.kernels if k.is_ours) >= blocks
  loops = [
    one.loop for one in estimates.judge(result, device) if one.loop.matrix
  ]
  print(*loops, sep='\n')
  of_row = 2 * case.kinds * sizes.columns * sizes.depth
  assert sorted(loop.flops * sizes.num_warps for loop in loops) == [
    of_row * sum(way) for way in sizes.ways
  ]
  # All sum in one order: none by another kind of instruction.
  assert len({loop.flops == _OF_MMA * loop.matrix for loop in loops}) == 1
  assert all(0 not in loop.waits for loop in loops)  # They load ahead.

# SPDX-License-Identifier: Apache-2.0
"""Bounds of what kernels cost, by their machine code: none gets slower unseen.

An estimate is no measurement (see `pallas_kernels.aot.estimates`), but what
takes more instructions than the memory leaves time for can't be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import pytest

from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.ragged_paged_attention import configurations
from tests.pallas_kernels.aot import matmul


@dataclasses.dataclass(frozen=True)
class Bounds:
  """The most that the loops of a case cost today, and so may cost.

  Attributes:
    device: compiled for.
    case: dtypes of queries and cache.
    issue: to issue a turn of the loop of decodes, as a part of the time to load
      what it loads. It should be 0.6 at the most.
    each: instructions of a warp for each that multiplies, in the loop of
      prefills. On Ampere it should be 6 at the most; Hopper's multiply more.
  """

  device: str
  case: str
  issue: float
  each: float


# Of Mistral's heads.
TABLE = (
  Bounds('a100', 'bfloat16', 0.2, 4.0),
  Bounds('h100', 'bfloat16', 0.15, 30.0),
  Bounds('a100', 'bfloat16 KV float8_e4m3fn', 0.55, 6.0),
)
SLOW = (
  Bounds('a40', 'bfloat16', 0.1, 4.0),
  Bounds('h100', 'bfloat16 KV int8', 0.4, 48.0),
  Bounds('h100', 'bfloat16 KV float8_e4m3fn', 0.45, 50.0),
  Bounds('a100', 'bfloat16 KV int8', 0.51, 5.7),
  Bounds('a40', 'bfloat16 KV int8', 0.25, 7.1),
  Bounds('a40', 'bfloat16 KV float8_e4m3fn', 0.25, 7.3),
)


@matmul.needs_disassembler
@pytest.mark.parametrize('bounds', TABLE, ids=str)
def test_loops(bounds: Bounds) -> None:
  check(bounds)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize('bounds', SLOW, ids=str)
def test_loops_of_other_caches(bounds: Bounds) -> None:
  check(bounds)


def check(bounds: Bounds) -> None:
  """Compiles a case, without spills, and counts in its loops."""
  with compiler.on(bounds.device):
    case = next(
      case
      for case in configurations.cases(bounds.device)
      if case.name == f'mistral-7b {bounds.case}'
    )
  (result,) = cases.check([case], bounds.device)
  assert not result.problems
  loops = estimates.judge(result, bounds.device)
  decodes = _unmasked('attend_small', loops)
  prefills = _unmasked('attend_chunks', loops)
  assert all(one.loop.loads[0][0] == 128 for one in (decodes, prefills))
  assert 0 not in decodes.loop.waits  # It loads a turn ahead.
  if 'Mosaic' not in case.name:  # whose chunks have two blocks on the way
    assert 0 not in prefills.loop.waits
  issue = decodes.estimate.issue / decodes.estimate.memory
  each = prefills.loop.instructions / prefills.loop.matrix
  print(f'issue {issue:.3f}, each {each:.2f}')
  assert issue <= bounds.issue
  assert each <= bounds.each


def _unmasked(
  kernel: str, loops: Sequence[estimates.Judged]
) -> estimates.Judged:
  """Returns the loop that most blocks of keys go through, the shortest."""
  return min(
    (one for one in loops if one.kernel == kernel and one.loop.matrix),
    key=lambda one: one.loop.instructions,
  )

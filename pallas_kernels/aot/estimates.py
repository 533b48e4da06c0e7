# SPDX-License-Identifier: Apache-2.0
"""Estimates what bounds a loop, by counting its instructions.

An estimate is no measurement. It knows rates, as the maker tells them, and no
latencies: a loop takes at least as long, and longer where too little is under
way to hide what it waits for. Each instruction counts once, though some, such
as conversions and powers, take the place of several.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import disassembly
from pallas_kernels.aot import kernels
from pallas_kernels.aot import loops

_BITS = 8  # of a byte
# Narrower loads are of single numbers that many threads share, such as the next
# page: they would count too much.
_LEAST_BITS = 64
# Instructions of a loop that only waits for others, at most.
_WAITING = 16
# Kernels of which many blocks read the same at about the same time.
_SHARING = ('attend_chunks', 'quantized_matmul_many')


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
  """The least nanoseconds of a multiprocessor for one turn of a block.

  Attributes:
    issue: to issue the instructions.
    matrix: of the tensor cores.
    memory: to load what is loaded, if all of it comes from the GPU's memory,
      and all multiprocessors load.
    is_shared: whether most loads find it in the L2 cache instead, where another
      block's have brought it: then memory is no bound.
  """

  issue: float
  matrix: float
  memory: float
  is_shared: bool

  @property
  def bound(self) -> str:
    """What takes longest: 'issue', 'matrix' or 'memory'."""
    kinds = ['issue', 'matrix', *['memory'] * (not self.is_shared)]
    return max(kinds, key=lambda kind: getattr(self, kind))


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
  """An inner loop of a kernel, and what is estimated of it."""

  kernel: str
  loop: loops.Loop
  estimate: Estimate


def judge(result: cases.Result, device: str) -> list[Judged]:
  """Disassembles a case's kernels, and estimates each inner loop.

  Loops that only wait are left out. What Mosaic's kernels on Hopper load, by
  TMA, is not counted.

  Raises:
    toolkit.UnavailableError: there is no nvdisasm.
  """
  ours = [kernel for kernel in result.kernels if kernel.is_ours]
  code = disassembly.disassemble(result.cubins, {k.name for k in ours})
  code |= result.mosaic
  target = gpu_targets.get(device)
  return [
    Judged(kernel.name, loop, estimate(loop, kernel, target))
    for kernel in ours
    for loop in loops.parse(code.get(kernel.name, ''))
    if loop.matrix or loop.loads or loop.instructions > _WAITING
  ]


def estimate(
  loop: loops.Loop, kernel: kernels.Kernel, target: gpu_targets.GpuTarget
) -> Estimate:
  """Estimates a loop.

  Args:
    loop: what a warp does in a turn.
    kernel: whose it is.
    target: the device, at its highest clock.
  """
  warps = -(-kernel.threads // gpu_targets.WARP)
  num_bytes = sum(
    bits // _BITS * count for bits, count in loop.loads if bits >= _LEAST_BITS
  )
  clocks = loop.instructions * warps / gpu_targets.SCHEDULERS
  share = 1e9 * target.multiprocessors  # nanoseconds, of one multiprocessor
  return Estimate(
    clocks / target.clock_ghz,
    share * loop.flops * warps / target.matmul_flops,
    share * num_bytes * kernel.threads / target.bandwidth,
    kernels.unnumbered(kernel.name) in _SHARING,
  )

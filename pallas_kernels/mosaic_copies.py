# SPDX-License-Identifier: Apache-2.0
"""Copies by cp.async, and where warpgroups meet, for Mosaic on Ampere."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.


def copy(source: Any, target: Any, interpret: bool) -> None:
  """Has a warpgroup copy from the device's memory to shared memory.

  Args:
    source, target: refs, of the same shape; nothing of them is out of bounds.
    interpret: whether the kernel is interpreted, which knows TMA only.
  """
  if interpret:
    target[...] = source[...]
  else:
    plgpu.copy_gmem_to_smem(
      source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    )


def commit(count: int) -> None:
  """Makes groups of no copies: as many are waited for by number, they count."""

  @plgpu.inline_mgpu()
  def commit(context: Any) -> None:
    del context
    from jaxlib.mlir.dialects import nvvm

    nvvm.cp_async_commit_group()

  for _ in range(count):
    commit()


def meet(warpgroups: int, barrier: Any | None) -> None:
  """Has all warpgroups of a block wait for each other.

  Args:
    warpgroups: how many there are.
    barrier: of the interpreter; None where the kernel is not interpreted.
  """
  if warpgroups == 1:
    return
  if barrier is not None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    return

  @plgpu.inline_mgpu()  # Mosaic's barriers are in shared memory, and slower.
  def synchronize(context: Any) -> None:
    del context
    from jaxlib.mlir.dialects import gpu

    gpu.barrier()

  synchronize()

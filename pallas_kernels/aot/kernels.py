# SPDX-License-Identifier: Apache-2.0
"""Reads what resources of a GPU each kernel of a compiled program takes."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import re

from pallas_kernels import gpu_targets


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
  """The resources of a multiprocessor that one kernel takes.

  Attributes:
    name: as compiled; the second kernel of a name ends in __1.
    is_ours: whether it is Pallas's, and not made by XLA.
    threads: threads of a block (CTA).
    registers: registers of a thread.
    spill_bytes: bytes of spills that a thread stores and loads.
    shared_memory: bytes of a block.
    blocks_per_sm: blocks that a multiprocessor runs at once.
  """

  name: str
  is_ours: bool
  threads: int
  registers: int
  spill_bytes: int
  shared_memory: int
  blocks_per_sm: int


def parse_ptxas(log: str) -> dict[str, tuple[int, int]]:
  """Returns kernel -> (registers, bytes of spills), from `ptxas -v`'s output.

  Counts the spills of functions that a kernel calls as its own.
  """
  found: dict[str, tuple[int, int]] = {}
  name, spills = '', 0
  for line in log.splitlines():
    if match := re.search(r"Compiling entry function '(\S+)'", line):
      name, spills = match[1], 0
    elif match := re.search(
      r'(\d+) bytes spill stores, (\d+) bytes spill loads', line
    ):
      # The warning that says the same comes before any entry function.
      spills += int(match[1]) + int(match[2])
    elif (match := re.search(r'Used (\d+) registers', line)) and name:
      found[name] = int(match[1]), spills
  return found


def parse_launches(thunks: str) -> dict[str, tuple[int, int]]:
  """Returns kernel -> (threads, bytes of shared memory), from XLA's thunks."""
  return {
    match[1]: (math.prod(map(int, match[2].split(','))), int(match[3]))
    for match in re.finditer(
      r'^\s*\d+: k\w*Kernel .*?(\S+) grid: \[[\d, ]+\] threads: \[([\d, ]+)\]'
      r'.*? shared_memory: (\d+) bytes',
      thunks,
      re.M,
    )
  }


def read_mosaic(
  dumps: pathlib.Path, target: gpu_targets.GpuTarget
) -> Iterator[Kernel]:
  """Yields the kernels that Mosaic compiled, which XLA does not list.

  Args:
    dumps: the folder that `toolkit.mosaic_dumps` had it dump to.
    target: the device.
  """
  for file in sorted(dumps.glob('*.ptxas')):
    # Each of a name has a number, which lowering and compiling count apart: a
    # step lowers a kernel for each layer, and compiles it once.
    name = file.stem.rpartition('_')[0]
    ((registers, spills),) = parse_ptxas(file.read_text()).values()
    found = re.search(
      r'\.(?:req|max)ntid (\d+)', file.with_suffix('.ptx').read_text()
    )
    asked = [
      int(size)
      for resources in dumps.glob(f'{name}_*.resources.txt')
      for size in re.findall(r'smem_scratch_bytes=(\d+)', resources.read_text())
    ]
    assert found and asked, file
    threads, shared = int(found[1]), max(asked)
    yield Kernel(
      name,
      True,
      threads,
      registers,
      spills,
      shared,
      target.blocks_that_fit(threads, registers, shared),
    )


def parse_graphs(thunks: str) -> tuple[int, list[str]]:
  """Counts the CUDA graphs in XLA's final list of thunks.

  Returns:
    Their number, and the kinds of thunks that are in no graph but launched one
    by one. The host waits for what 'kConditional' and 'kWhile' depend on.
  """
  num_graphs = 0
  outside = []
  inside_from = -1  # the indentation of the graph that we are in
  for spaces, kind in re.findall(r'^( *)\d+: (k\w+)', thunks, re.M):
    depth = len(spaces)
    if 0 <= inside_from < depth:
      continue
    is_graph = kind == 'kCommandBuffer'
    num_graphs += is_graph
    inside_from = depth if is_graph else -1
    if not is_graph:
      outside.append(kind)
  return num_graphs, outside


def read(
  dumps: pathlib.Path,
  ptxas_log: str,
  ours: set[str],
  target: gpu_targets.GpuTarget,
) -> Iterator[Kernel]:
  """Yields the kernels of a program, in the order of their launches.

  Args:
    dumps: the folder that XLA was told to dump to.
    ptxas_log: what ptxas said when it compiled them.
    ours: names of Pallas's kernels.
    target: the device.
  """
  # XLA may compile a kernel several times; it uses the last result.
  used = parse_ptxas(ptxas_log)
  launches = parse_launches(read_thunks(dumps, 'thunk_sequence'))
  for name, (threads, shared) in launches.items():
    registers, spills = used.get(name, (-1, 0))
    yield Kernel(
      name,
      unnumbered(name) in ours,
      threads,
      registers,
      spills,
      shared,
      target.blocks_that_fit(threads, registers, shared),
    )


def unnumbered(name: str) -> str:
  """Returns a kernel's name without the number that further ones end in."""
  return re.sub(r'__\d+$', '', name)


def read_thunks(dumps: pathlib.Path, name: str) -> str:
  """Reads one of XLA's lists of thunks from its dumps.

  'thunk_sequence_after_thunk_passes' is the one with CUDA graphs.
  """
  files = sorted(dumps.glob(f'*.{name}.txt'))
  return '\n'.join(file.read_text() for file in files)

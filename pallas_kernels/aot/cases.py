# SPDX-License-Identifier: Apache-2.0
"""Compiles cases, and checks that their kernels fit the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
import time
from typing import Any, Protocol

import jax

from pallas_kernels import gpu_targets
from pallas_kernels.aot import compiler
from pallas_kernels.aot import disassembly
from pallas_kernels.aot import kernels as kernels_lib
from pallas_kernels.aot import toolkit


class Case(Protocol):
  """Something to compile."""

  @property
  def name(self) -> str: ...

  @property
  def function(self) -> Callable[..., Any]: ...

  @property
  def args(self) -> Any: ...  # positional ones, trees of ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """The result of compiling a case.

  Attributes:
    name: of the case.
    seconds: to lower and compile it.
    kernels: in the order of their launches, each once.
    problems: why it must not ship; none if it may.
    warnings: what ptxas says will be slow.
    graphs: CUDA graphs that it is launched as, in parts.
    outside_graphs: kinds of thunks that are in no graph.
    cubins: what ptxas made of the kernels, for `disassembly`.
    mosaic: of the kernels that Mosaic compiled, their machine code.
    compiled: the jax.stages.Compiled; None where XLA refused.
  """

  name: str
  seconds: float
  kernels: Sequence[kernels_lib.Kernel]
  problems: Sequence[str]
  warnings: Sequence[str] = ()
  graphs: int = 0
  outside_graphs: Sequence[str] = ()
  cubins: Sequence[bytes] = dataclasses.field(default=(), repr=False)
  mosaic: Mapping[str, str] = dataclasses.field(
    default_factory=dict, repr=False
  )
  compiled: Any = dataclasses.field(default=None, repr=False)


def check(
  cases: Iterable[Case],
  device: str,
  on_done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
  """Compiles each case and looks at its kernels.

  Args:
    cases: what to compile; may be lazy, and is then made for this device.
    device: 'a100', 'a40' or 'h100'.
    on_done: called with each result.
  """
  compiler.devices_for(device)  # Once, and not in several threads.

  def run(case: Case) -> Result:
    def fn(*args: Any) -> Any:  # A new one, for JAX caches what it compiled.
      return case.function(*args)

    return measure(
      case.name,
      device,
      lambda: jax.jit(fn).lower(*compiler.placed(case.args, device)),
    )

  results = []
  # `cases` may be made lazily, so the default device is set here, too.
  with (
    compiler.on(device),
    futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
  ):
    for result in pool.map(run, cases):
      results.append(result)
      on_done(result)
  return results


def measure(name: str, device: str, lower: Callable[[], Any]) -> Result:
  """Compiles what `lower` returns, and reads what XLA and ptxas report.

  Args:
    name: of the case.
    device: 'a100', 'a40' or 'h100'.
    lower: returns a jax.stages.Lowered.
  """
  target = gpu_targets.get(device)
  kernels: list[kernels_lib.Kernel] = []
  problems: list[str] = []
  slow: list[str] = []
  graphs, outside = 0, list[str]()
  cubins = list[bytes]()
  code = dict[str, str]()
  compiled = None
  start = time.perf_counter()
  with compiler.on(device), tempfile.TemporaryDirectory() as temp:
    folder = pathlib.Path(temp)
    try:
      with _watching_mosaic(folder / 'mosaic', target):
        lowered = lower()
        compiled = lowered.compile(
          {
            'xla_gpu_cuda_data_dir': str(toolkit.spying(folder)),
            'xla_dump_to': str(folder / 'xla'),
          }
        )
    except jax.errors.JaxRuntimeError as error:
      problems.append(str(error).partition('\n')[0])
    except Exception as error:
      error.add_note(f'compiling {name} for {device}')
      raise
    seconds = time.perf_counter() - start
    if compiled is not None:
      ours = set(re.findall(r'\bname = "([^"]+)"', lowered.as_text()))
      said = toolkit.read_log(folder)
      cubins = toolkit.read_cubins(folder)
      mosaic = list(kernels_lib.read_mosaic(folder / 'mosaic', target))
      code = disassembly.read_mosaic(folder / 'mosaic')
      if 'mosaic_gpu' in lowered.as_text() and not mosaic:
        problems.append(
          'Mosaic does not say what its kernel takes: it keeps '
          'what it compiled before in this process'
        )
      kernels = [*kernels_lib.read(folder / 'xla', said, ours, target), *mosaic]
      graphs, outside = kernels_lib.parse_graphs(
        kernels_lib.read_thunks(
          folder / 'xla', 'thunk_sequence_after_thunk_passes'
        )
      )
      slow = sorted(set(re.findall(r'Potential Performance Loss: (.*)', said)))
  if compiled is not None and not any(kernel.is_ours for kernel in kernels):
    problems.append('there is no Pallas kernel in it')
  for kernel in kernels:
    if kernel.is_ours and kernel.registers < 0:
      problems.append(f'{kernel.name}: ptxas said nothing about it')
    if kernel.is_ours and kernel.spill_bytes > 0:
      problems.append(
        f'{kernel.name}: spills {kernel.spill_bytes:,} bytes of '
        'registers a thread'
      )
    if kernel.shared_memory > target.shared_memory_per_block:
      problems.append(
        f'{kernel.name}: asks for {kernel.shared_memory:,} bytes of shared '
        f'memory; a block may have {target.shared_memory_per_block:,}'
      )
  return Result(
    name,
    seconds,
    kernels,
    problems,
    slow,
    graphs,
    outside,
    cubins,
    code,
    compiled,
  )


def _watching_mosaic(
  folder: pathlib.Path,
  target: gpu_targets.GpuTarget,
) -> contextlib.AbstractContextManager[None]:
  """Returns `toolkit.mosaic_dumps`, or nothing where Mosaic has no kernel.

  Dumping admits one caller at a time.
  """
  if jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  return toolkit.mosaic_dumps(folder)

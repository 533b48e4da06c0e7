# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels, or a model's whole step, for a GPU that is not here.

  python -m pallas_kernels.aot --device=a40
  python -m pallas_kernels.aot --device=h100 --model=configs/mistral_7b_h100.py

Needs the wheels of the extra `aot`; no GPU and no driver. Fails if a kernel
spills registers or asks for more shared memory than the device has; of a step
also, if it copies the KV cache or needs more memory than the device has. It
says nothing about speed: nothing runs, and XLA could not tune its matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import time
import types
from typing import Any, Protocol
import warnings

from absl import app
from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table

from pallas_kernels import gpu_targets

FLAGS = flags.FLAGS
_INSTALL = "install the extra: pip install 'sarathi-jax[aot]'"
_HLO_TYPES = {'bfloat16': 'bf16', 'float16': 'f16', 'float32': 'f32'}


def define_flags() -> None:
  flags.DEFINE_enum('device', None, list(gpu_targets.TARGETS),
                    'The GPU to compile for.', required=True)
  flags.DEFINE_string(
    'model', None, 'File of configs/, named after a model of '
    'sarathi_jax.benchmarks.throughput: compile its largest step, in '
    'bfloat16, instead of the kernels.')
  flags.DEFINE_string('json', None, 'File for the results.')


class UnavailableError(RuntimeError):
  """What it takes to compile for GPUs is not installed; says what."""


class Case(Protocol):
  """Something to compile."""

  @property
  def name(self) -> str: ...

  @property
  def function(self) -> Callable[..., Any]: ...

  @property
  def args(self) -> Any: ...  # its positional ones: trees of ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
  """What one kernel takes of a multiprocessor.

  Attributes:
    name: as compiled; the second of a name ends in __1.
    is_ours: it is Pallas's, not made by XLA.
    threads: of a block (CTA).
    registers: of a thread.
    spill_bytes: stored and loaded, of a thread.
    shared_memory: bytes, of a block.
    blocks_per_sm: that run at once.
  """

  name: str
  is_ours: bool
  threads: int
  registers: int
  spill_bytes: int
  shared_memory: int
  blocks_per_sm: int


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """How a case compiled.

  Attributes:
    name: of the case.
    seconds: to lower and compile it.
    kernels: in the order of their launches, each once.
    problems: why it must not ship; none if it may.
    warnings: what ptxas says will be slow.
    compiled: None where XLA refused.
  """

  name: str
  seconds: float
  kernels: Sequence[Kernel]
  problems: Sequence[str]
  warnings: Sequence[str] = ()
  compiled: Any = dataclasses.field(default=None, repr=False)


def missing() -> str | None:
  """What is not installed and has to be, or None."""
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin')
             for n in (12, 13)):
    return f"JAX's CUDA plugin is not installed; {_INSTALL}"
  if _toolkit() is None:
    return f'ptxas and libdevice of CUDA are not installed; {_INSTALL}'
  return None


@functools.cache
def device_for(name: str) -> Any:
  """A jax.Device to compile for, 'a100', 'a40' or 'h100'; it can't run.

  Raises:
    ValueError: an unknown name.
    UnavailableError: no plugin, or no CUDA toolkit.
  """
  target = gpu_targets.get(name)
  if reason := missing():
    raise UnavailableError(reason)
  return topologies.get_topology_desc(
    platform='cuda', target_config=target.text_proto(), topology='1x1x1',
  ).devices[0]


def compile_for(fn: Callable[..., Any], args: Sequence[Any], device: str,
                **jit_kwargs: Any) -> Any:
  """Compiles a function for a GPU that is not here.

  Args:
    fn: to be jitted.
    args: its positional arguments, trees of ShapeDtypeStruct.
    device: 'a100', 'a40' or 'h100'.
    **jit_kwargs: of jax.jit.

  Returns:
    The jax.stages.Compiled, to look at.

  Raises:
    ValueError, UnavailableError: see `device_for`.
    jax.errors.JaxRuntimeError: XLA refuses it, for too much shared memory
      among other reasons.
  """
  with _on(device):
    return jax.jit(fn, **jit_kwargs).lower(*_placed(args, device)).compile(
      {'xla_gpu_cuda_data_dir': str(_toolkit())})


def check(cases: Iterable[Case], device: str,
          on_done: Callable[[Result], None] = lambda result: None,
          ) -> list[Result]:
  """Compiles each case and looks at its kernels.

  Args:
    cases: what to compile.
    device: 'a100', 'a40' or 'h100'.
    on_done: told each result.
  """
  device_for(device)  # Once, and not in several threads.

  def run(case: Case) -> Result:
    def fn(*args: Any) -> Any:  # A new one: JAX recalls what it compiled.
      return case.function(*args)

    return _measure(case.name, device, lambda: jax.jit(fn).lower(
      *_placed(case.args, device)))

  results = []
  with futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
    for result in pool.map(run, cases):
      results.append(result)
      on_done(result)
  return results


def parse_ptxas(log: str) -> dict[str, tuple[int, int]]:
  """(registers, bytes of spills) by kernel, from what `ptxas -v` said.

  Spills of functions that a kernel calls are counted with it.
  """
  found: dict[str, tuple[int, int]] = {}
  name, spills = '', 0
  for line in log.splitlines():
    if match := re.search(r"Compiling entry function '(\S+)'", line):
      name, spills = match[1], 0
    elif match := re.search(
        r'(\d+) bytes spill stores, (\d+) bytes spill loads', line):
      # The warning that says the same comes before any entry function.
      spills += int(match[1]) + int(match[2])
    elif (match := re.search(r'Used (\d+) registers', line)) and name:
      found[name] = int(match[1]), spills
  return found


def parse_launches(thunks: str) -> dict[str, tuple[int, int]]:
  """(threads, bytes of shared memory) by kernel, from XLA's list of thunks."""
  return {
    match[1]: (math.prod(map(int, match[2].split(','))), int(match[3]))
    for match in re.finditer(
      r'^\s*\d+: k\w*Kernel .*?(\S+) grid: \[[\d, ]+\] threads: \[([\d, ]+)\]'
      r'.*? shared_memory: (\d+) bytes', thunks, re.M)}


def in_place_problems(compiled: Any, donated: Any, kv: Any) -> list[str]:
  """What speaks against a program's updating its cache in place.

  Args:
    compiled: the program.
    donated: all of its arguments that are, a tree of ShapeDtypeStruct.
    kv: the cache among them.
  """
  problems = []
  aliased = compiled.memory_analysis().alias_size_in_bytes
  if aliased != (expected := num_bytes(donated)):
    problems.append(f'{aliased:,} bytes are updated in place; all that is '
                    f'donated, the KV cache above all, is {expected:,}')
  text = compiled.as_text()
  for shape in sorted({_hlo_type(leaf) for leaf in jax.tree.leaves(kv)}):
    copies = re.findall(
      rf'^.*= \(?{re.escape(shape)}\S* .*?copy(?:-start)?\(.*$', text, re.M)
    if copies:
      problems.append(f'{len(copies)} copies of the KV cache, {shape}: '
                      f'{copies[0].strip()[:100]}')
  return problems


def num_bytes(tree: Any) -> int:
  """Of a tree of ShapeDtypeStruct."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _on(device: str) -> Iterator[None]:
  """What is traced within is for this device."""
  with jax.default_device(device_for(device)):
    yield


def _placed(args: Any, device: str) -> Any:
  sharding = jax.sharding.SingleDeviceSharding(device_for(device))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=sharding), args)


def _toolkit() -> pathlib.Path | None:
  """The folder with bin/ptxas: of NVIDIA's wheels, or CUDA's own."""
  found = []
  for module in ('nvidia.cu13', 'nvidia.cuda_nvcc'):
    try:
      spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      continue
    found += spec.submodule_search_locations or [] if spec else []
  if ptxas := shutil.which('ptxas'):
    found.append(str(pathlib.Path(ptxas).resolve().parent.parent))
  return next((path for path in map(pathlib.Path, found)
               if (path / 'bin' / 'ptxas').exists()
               and (path / 'nvvm' / 'libdevice').exists()), None)


def _spying_toolkit(folder: pathlib.Path) -> pathlib.Path:
  """A CUDA toolkit whose ptxas writes all it knows into `folder`/log."""
  real = _toolkit()
  assert real is not None
  root = folder / 'cuda'
  (root / 'bin').mkdir(parents=True)
  (folder / 'log').mkdir()
  (root / 'nvvm').symlink_to(real / 'nvvm')
  for tool in (real / 'bin').iterdir():
    if tool.name != 'ptxas':
      (root / 'bin' / tool.name).symlink_to(tool)
  ptxas = shlex.quote(str(real / 'bin' / 'ptxas'))
  log = shlex.quote(str(folder / 'log')) + '/$$'
  # XLA reads why ptxas failed from standard error.
  (root / 'bin' / 'ptxas').write_text(f'''#!/bin/sh
case "$*" in *--version*|*--input-as-string*) exec {ptxas} "$@";; esac
{ptxas} -v "$@" 2> {log}
status=$?
[ $status = 0 ] || cat {log} >&2
exit $status
''')
  (root / 'bin' / 'ptxas').chmod(0o755)
  return root


def _measure(name: str, device: str, lower: Callable[[], Any]) -> Result:
  """Compiles what `lower` returns, and watches XLA and ptxas do it."""
  target = gpu_targets.get(device)
  kernels: list[Kernel] = []
  problems: list[str] = []
  slow: list[str] = []
  compiled = None
  start = time.perf_counter()
  with _on(device), tempfile.TemporaryDirectory() as temp:
    folder = pathlib.Path(temp)
    try:
      lowered = lower()
      compiled = lowered.compile({
        'xla_gpu_cuda_data_dir': str(_spying_toolkit(folder)),
        'xla_dump_to': str(folder / 'xla')})
    except jax.errors.JaxRuntimeError as error:
      problems.append(str(error).partition('\n')[0])
    except Exception as error:
      error.add_note(f'compiling {name} for {device}')
      raise
    seconds = time.perf_counter() - start
    if compiled is not None:
      ours = set(re.findall(r'\bname = "([^"]+)"', lowered.as_text()))
      said = _ptxas_log(folder)
      kernels = list(_kernels(folder, said, ours, target))
      slow = sorted(set(re.findall(r'Potential Performance Loss: (.*)', said)))
  if compiled is not None and not any(kernel.is_ours for kernel in kernels):
    problems.append('there is no Pallas kernel in it')
  for kernel in kernels:
    if kernel.is_ours and kernel.registers < 0:
      problems.append(f'{kernel.name}: ptxas said nothing about it')
    if kernel.is_ours and kernel.spill_bytes > 0:
      problems.append(f'{kernel.name}: spills {kernel.spill_bytes:,} bytes of '
                      'registers a thread')
    if kernel.shared_memory > target.shared_memory_per_block:
      problems.append(
        f'{kernel.name}: asks for {kernel.shared_memory:,} bytes of shared '
        f'memory; a block may have {target.shared_memory_per_block:,}')
  return Result(name, seconds, kernels, problems, slow, compiled)


def _ptxas_log(folder: pathlib.Path) -> str:
  """All that `_spying_toolkit` wrote down, the latest at the end."""
  logs = sorted((folder / 'log').iterdir(), key=lambda p: p.stat().st_mtime_ns)
  return '\n'.join(log.read_text() for log in logs)


def _kernels(folder: pathlib.Path, ptxas_log: str, ours: set[str],
             target: gpu_targets.GpuTarget) -> Iterator[Kernel]:
  # XLA may compile a kernel several times; the last one is what it took.
  used = parse_ptxas(ptxas_log)
  dumps = sorted((folder / 'xla').glob('*.thunk_sequence.txt'))
  launches = parse_launches('\n'.join(dump.read_text() for dump in dumps))
  for name, (threads, shared) in launches.items():
    registers, spills = used.get(name, (-1, 0))
    yield Kernel(
      name, re.sub(r'__\d+$', '', name) in ours, threads, registers, spills,
      shared, target.blocks_that_fit(threads, registers, shared))


def _hlo_type(leaf: Any) -> str:
  """'bf16[8,128]'."""
  return (f'{_HLO_TYPES[leaf.dtype.name]}'
          f'[{",".join(map(str, leaf.shape))}]')


# -- A model's step. What is imported here knows models; the rest does not. --


@dataclasses.dataclass(frozen=True, slots=True)
class StepMemory:
  """Bytes of a step, and what the device has."""

  weights: int
  kv_cache: int
  temporaries: int
  device: int
  kv_tokens: int


def check_step(path: str, device: str) -> tuple[Result, StepMemory]:
  """Compiles the largest hybrid step of a model; see --model.

  Raises:
    sarathi_jax.errors.ConfigError: there is no such config, or it can't work.
  """
  from sarathi_jax import models
  from sarathi_jax.runner import device_runner
  from sarathi_jax.runner import kv_cache

  config, model = _read_config(path)
  target = gpu_targets.get(device)
  max_len = config.max_model_len or model.context_len
  with _on(device):
    params = _placed(jax.eval_shape(lambda: models.init_params(
      model, jax.random.key(0), jnp.bfloat16)), device)
    stats = {'bytes_limit': target.memory_bytes,
             'bytes_in_use': num_bytes(params)}
    num_pages = kv_cache.choose_num_pages(
      model, config, max_len, jnp.dtype(jnp.bfloat16),
      types.SimpleNamespace(memory_stats=lambda: stats), 0)
    kv = _placed(jax.eval_shape(lambda: kv_cache.init(
      model, num_pages, config.page_size, jnp.bfloat16, 'pallas_triton')),
      device)
  max_len = min(max_len, num_pages * config.page_size)
  programs = device_runner.StepPrograms(
    model, page_size=config.page_size,
    pages_per_seq=-(-max_len // config.page_size),
    max_num_seqs=config.max_num_seqs,
    max_step_tokens=_max_step_tokens(config, max_len),
    attention='pallas_triton')
  size = programs.sizes[-1]
  result = _measure(f'{pathlib.Path(path).stem}, {size} tokens', device,
                    lambda: programs.lower(size, params, kv))
  memory = StepMemory(num_bytes(params), num_bytes(kv), 0,
                      target.memory_bytes, num_pages * config.page_size)
  if result.compiled is None:
    return result, memory
  analysis = result.compiled.memory_analysis()
  memory = dataclasses.replace(memory, temporaries=(
    analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes))
  last_tokens = jax.ShapeDtypeStruct((config.max_num_seqs,), jnp.int32)
  problems = [*result.problems,
              *in_place_problems(result.compiled, (kv, last_tokens), kv)]
  needed = memory.weights + memory.kv_cache + memory.temporaries
  if needed > memory.device:
    problems.append(f'it needs {needed:,} bytes of memory, and the device '
                    f'has {memory.device:,}')
  return dataclasses.replace(result, problems=problems), memory


def _read_config(path: str) -> tuple[Any, Any]:
  """The engine's config and the model that the file is named after."""
  from sarathi_jax import config as config_lib
  from sarathi_jax.benchmarks import throughput

  file = pathlib.Path(path)
  config_lib.check(file.is_file(), 'model', path, 'no such file')
  known: Mapping[str, Any] = {
    re.sub(r'\W', '_', name): model
    for name, model in throughput.MODELS.items()}
  name = next((n for n in known if file.stem.startswith(n)), '')
  config_lib.check(bool(name), 'model', path,
                   f'its name must begin with one of {", ".join(known)}')
  return runpy.run_path(path)['get_config'](), known[name]


def _max_step_tokens(config: Any, max_model_len: int) -> int:
  from sarathi_jax import config as config_lib
  from sarathi_jax import scheduler

  return scheduler.policy_class(config.policy).max_step_tokens(
    config_lib.SchedulerConfig(
      token_budget=config.token_budget, max_num_seqs=config.max_num_seqs,
      max_model_len=max_model_len, num_pages=max_model_len,
      page_size=config.page_size))


# -- The command. --


def _table(results: Sequence[Result], device: str) -> rich.table.Table:
  table = rich.table.Table(
    'case', title=f'{gpu_targets.get(device).device_kind}, '
    f'JAX {jax.__version__}', box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column('kernel', no_wrap=True)
  for column in ('regis-\nters', 'spill\nbytes', 'shared\nmemory',
                 'CTAs\nper SM', 's'):
    table.add_column(column, justify='right', no_wrap=True)
  for result in results:
    case, seconds = result.name, f'{result.seconds:.1f}'
    for kernel in result.kernels:
      if kernel.is_ours or kernel.spill_bytes:
        table.add_row(
          case, kernel.name, str(kernel.registers), f'{kernel.spill_bytes:,}',
          f'{kernel.shared_memory:,}', str(kernel.blocks_per_sm), seconds,
          style='red' if kernel.spill_bytes else None)
        case = seconds = ''
    if case:  # Nothing of it was compiled.
      table.add_row(case, *'-----', seconds, style='red')
  return table


def _memory_table(memory: StepMemory) -> rich.table.Table:
  table = rich.table.Table('memory', box=rich.box.SIMPLE_HEAD)
  for column in ('bytes', 'GiB'):
    table.add_column(column, justify='right')
  rows = dataclasses.asdict(memory)
  tokens = rows.pop('kv_tokens')
  for name, size in rows.items():
    table.add_row(name.replace('_', ' '), f'{size:,}', f'{size / 2**30:.2f}')
  table.caption = f'{tokens:,} tokens of KV cache'
  return table


def _as_json(results: Sequence[Result], memory: StepMemory | None) -> str:
  cases = [{
    'name': r.name, 'seconds': round(r.seconds, 2),
    'problems': list(r.problems), 'warnings': list(r.warnings),
    'kernels': [dataclasses.asdict(k) for k in r.kernels]} for r in results]
  return json.dumps({
    'device': FLAGS.device, 'jax': jax.__version__, 'model': FLAGS.model,
    'cases': cases, 'memory': memory and dataclasses.asdict(memory),
  }, indent=1) + '\n'


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  # The plugin must not look for a driver, nor XLA say all that it thinks.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  warnings.filterwarnings(
    'ignore', '.*Pallas Triton backend is deprecated', DeprecationWarning)
  if reason := missing():
    sys.exit(f'error: {reason}')
  console = rich.console.Console(highlight=False)
  memory = None
  with rich.progress.Progress(console=console, transient=True) as progress:
    task = progress.add_task('Compiling', total=None)
    if FLAGS.model:
      from sarathi_jax import errors
      try:
        result, memory = check_step(FLAGS.model, FLAGS.device)
      except errors.SarathiError as error:
        sys.exit(f'error: {error}')
      results = [result]
    else:
      from pallas_kernels.ragged_paged_attention import tuning
      cases = list(tuning.cases(FLAGS.device))
      progress.update(task, total=len(cases))
      results = check(cases, FLAGS.device,
                      lambda result: progress.advance(task))
  console.print(_table(results, FLAGS.device))
  if memory:
    console.print(_memory_table(memory))
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(_as_json(results, memory))
  for result in results:
    for warning in result.warnings:
      console.print(f'[yellow]{rich.markup.escape(f"{result.name}: {warning}")}'
                    '[/]', soft_wrap=True)
  failed = [(r.name, p) for r in results for p in r.problems]
  for name, problem in failed:
    console.print(f'[red]{rich.markup.escape(f"{name}: {problem}")}[/]',
                  soft_wrap=True)
  if failed:
    sys.exit(f'error: {len(failed)} problems on {FLAGS.device}, see above')
  console.print(f'{len(results)} of {len(results)} compile for '
                f'{FLAGS.device}; no spills.')


if __name__ == '__main__':
  define_flags()
  app.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Compiles a deployment's whole step for GPUs that are not here."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import re
from typing import Any

import rich.box
import rich.table

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import collectives
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.aot import report
from sarathi_jax import config as config_lib
from sarathi_jax import xla_flags
from sarathi_jax.in_process import building
from sarathi_jax.launch import layers as layers_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import memory as memory_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs as programs_lib

DTYPE = 'bfloat16'  # of checkpoints, where `config.dtype` does not say


@dataclasses.dataclass(frozen=True)
class StepResult:
  """How the largest step of a deployment compiled.

  Attributes:
    device: the GPU's name.
    case: its kernels, with their problems.
    memory: what it takes of each device.
    sent: what a device receives from others in one step.
    least_sent: bytes of the sums and hops that every step needs.
    loops: inner loops of its Pallas kernels, if they were asked for.
    layers: what each launches, from the second on, if it was asked for.
  """

  device: str
  case: cases.Result
  memory: memory_lib.MemoryPlan
  sent: list[collectives.Collective]
  least_sent: int
  loops: Sequence[estimates.Judged] = ()
  layers: Sequence[layers_lib.Layer] = ()

  def tables(self) -> Iterator[rich.table.Table]:
    """Yields the tables that people read."""
    yield report.kernels_table([self.case], self.device)
    table = memory_table(self.memory)
    table.caption = (
      f'{self.case.graphs} CUDA graphs, '
      f'{len(self.case.outside_graphs)} launches in none'
    )
    yield table
    if self.sent:
      yield report.sent_table(self.sent, self.least_sent)
    if self.loops:
      yield report.loops_table({self.case.name: self.loops})
    if self.layers:
      yield layers_lib.table(self.layers)

  def as_dict(self) -> dict[str, Any]:
    """Returns the result for JSON."""
    return {
      'step': report.case_dict(self.case),
      'memory': memory_dict(self.memory),
      'sent': [dataclasses.asdict(one) for one in self.sent],
      'least_sent': self.least_sent,
      'loops': report.loop_dicts(self.loops),
      'layers': [layer.as_dict() for layer in self.layers],
    }


def check(
  name: str,
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  device: str,
  tokens: int | None = None,
  *,
  sass: bool = False,
) -> StepResult:
  """Compiles a step of a deployment.

  Args:
    name: the deployment's.
    model, config: what to serve, and how.
    device: 'a100', 'a40' or 'h100'; as many as `config` asks for.
    tokens: tokens of the batch, all of decodes where these have a step of their
      own; None: the most.
    sass: whether to find `loops` and `layers`.

  Raises:
    sarathi_jax.errors.ConfigError: it can't work, whatever the memory; or no
      step has so many tokens.
  """
  model = model.divided(config)
  parallelism = parallel.Parallelism(tp=config.tp or 1, pp=config.pp)
  parallelism.check(model)
  target = gpu_targets.get(device)
  mesh = mesh_lib.make(
    parallelism, compiler.devices_for(device, parallelism.num_devices)
  )
  if config.deterministic:
    mesh_lib.check_deterministic(mesh)
  mesh_lib.check_activations(mesh, model)
  lies = placement.choose_layout(model, config.dtype, DTYPE, mesh)
  kv_dtype = kv_cache.choose_dtype(config.kv_cache_dtype, lies.dtype, 'gpu')
  with compiler.on(device):
    programs = building.step_programs(
      model,
      mesh,
      dataclasses.replace(
        config, attention=config.attention or 'pallas_triton'
      ),
      layout=lies,
      kv_dtype=kv_dtype,
    )

    def plan(temporaries: int) -> memory_lib.MemoryPlan:
      return memory_lib.plan(
        model,
        config,
        mesh,
        programs,
        kv_dtype=kv_dtype,
        temporaries=temporaries,
        device_bytes=int(target.memory_bytes * xla_flags.MEMORY_FRACTION),
      )

    memory = plan(0)
    most = programs.sizes[-1]
    config_lib.check(
      tokens is None or tokens <= most,
      'tokens',
      tokens,
      f'must be at most {most}, as of the largest step',
    )
    size = programs.size_for(
      tokens or most,
      decodes_only=tokens is not None,
      has_adapters=programs.slots is not None,
    )
    layout = programs.layouts[size]
    what = f'{layout.num_tokens} tokens' + ', decodes' * layout.decodes_only
    num_pages = memory.num_pages or programs.pages_per_seq
    case = cases.measure(
      f'{name}, {what}', device, lambda: programs.lower(size, num_pages)
    )
    if case.compiled is None:
      return StepResult(device, case, memory, [], 0)
    memory = plan(programs_lib.extra_bytes(case.compiled))
    state = programs.state_shapes(num_pages)
  problems = [
    *case.problems,
    *compiler.in_place_problems(case.compiled, state, state.kv),
    *matrix_problems(case.compiled.as_text(), model.hidden_size),
    *dequantized_problems(
      case.compiled.as_text(), *_row_counts(model, layout.num_tokens)
    ),
  ]
  if waits := {'kConditional', 'kWhile'} & set(case.outside_graphs):
    problems.append(
      f'{", ".join(sorted(waits))} in no CUDA graph: there the '
      'host waits for the device in the middle of a step'
    )
  if memory.problem:
    problems.append(
      f'{memory.problem} {memory.missing / 2**30:.2f} GiB are '
      'missing on each device.'
    )
  text = case.compiled.as_text()
  return StepResult(
    device,
    dataclasses.replace(case, problems=problems),
    memory,
    collectives.read(text),
    _least_sent(model, parallelism, programs.layouts[size], lies.dtype),
    estimates.judge(case, device) if sass else (),
    layers_lib.read(text, compiler.hlo_types(state.kv)) if sass else (),
  )


def matrix_problems(text: str, hidden_size: int) -> list[str]:
  """Names matrices of weights that a step puts together before it multiplies.

  XLA does so to make one product of several; where the product is no kernel of
  its own, all of them are copied in each step.

  Args:
    text: the step's optimized HLO.
    hidden_size: D, of which such matrices have as many rows, or columns.
  """
  shape = rf'(?:{hidden_size},\d+|\d+,{hidden_size})'
  found = re.findall(rf'= (\w*f\d+\w*\[{shape}\])\S* concatenate\(', text)
  return [
    f'{count} matrices {shape} of weights are put together in each step'
    for shape, count in collections.Counter(found).items()
  ]


def dequantized_problems(text: str, *num_rows: int) -> list[str]:
  """Names matrices of codes that a step writes as numbers before it multiplies.

  An expert's, and those of all experts, too; in loops, too.

  Args:
    text: the step's optimized HLO.
    *num_rows: of what the step computes, such as its tokens; arrays with as
      many rows are no matrices.
  """
  entry = text.partition('\nENTRY ')[2]
  codes = re.findall(r'= (?:s8|u8|f8e4m3fn)\[([\d,]+)\]\S* parameter\(', entry)
  matrices = set()
  for shape in map(_numbers, codes):
    if len(shape) > 1:
      *front, rows, columns = shape
      # Codes of 4 bits are two in a byte.
      for several, packed in itertools.product(((), front), (1, 2)):
        matrices.add((*several, packed * rows, columns))
  found = re.findall(
    r'= (\w*f\d+\w*)\[([\d,]+)\]\S* (?!parameter|bitcast|get-tuple-element)',
    _outside_launches(text),
  )
  # An axis of 1 in front is what a loop cut out of all experts.
  counted = collections.Counter(
    (dtype, tuple(itertools.dropwhile(lambda n: n == 1, _numbers(shape))))
    for dtype, shape in found
  )
  return [
    f'{count} matrices {dtype}[{",".join(map(str, shape))}] of weights are '
    'dequantized in each step'
    for (dtype, shape), count in counted.items()
    if shape in matrices and shape[-2] not in num_rows
  ]


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(',')))


def _outside_launches(text: str) -> str:
  """Returns HLO without what is within fusions, of which each is a launch."""
  inside = set(re.findall(r'\bcalls=%?([\w.-]+)', text))
  computations = re.split(r'\n(?=(?:ENTRY )?%?[\w.-]+ \()', text)
  return '\n'.join(
    one
    for one in computations
    if (name := re.match(r'%?([\w.-]+) \(', one)) is None
    or name[1] not in inside
  )


def memory_dict(memory: memory_lib.MemoryPlan) -> dict[str, Any]:
  """Returns a memory plan for JSON."""
  return {
    **dataclasses.asdict(memory),
    'kv_cache': memory.kv_cache,
    'kv_tokens': memory.kv_tokens,
    'missing': memory.missing,
  }


def memory_table(memory: memory_lib.MemoryPlan) -> rich.table.Table:
  """Makes a table of what a deployment takes of each device."""
  table = rich.table.Table('memory of a device', box=rich.box.SIMPLE_HEAD)
  for column in ('bytes', 'GiB'):
    table.add_column(column, justify='right')
  for name, size in (
    ('weights', memory.weights),
    ('adapters', memory.adapters or None),
    ('kv cache', memory.kv_cache),
    ('temporaries', memory.temporaries + memory.state),
    ('usable', memory.usable),
  ):
    if size is not None:
      table.add_row(name, f'{size:,}', f'{size / 2**30:.2f}')
  return table


def _row_counts(
  model: model_config_lib.ModelConfig, num_tokens: int
) -> tuple[int, ...]:
  """Returns the rows of what a step computes: tokens, and those of experts."""
  layers = range(model.num_layers)
  chosen = max(model.layer_mlp(i).experts_per_token for i in layers)
  return num_tokens, num_tokens * chosen


def _least_sent(
  model: model_config_lib.ModelConfig,
  parallelism: parallel.Parallelism,
  layout: batch_lib.BatchLayout,
  dtype: Any,
) -> int:
  """Returns bytes of all sums [T, D], of layers and embedding, and of a hop.

  A hop is what a stage sends to the next. The last layer of a model without
  stages sums only rows that may be sampled from.
  """
  row = model.hidden_size * dtype.itemsize
  one, sums = layout.num_tokens * row, 0
  if parallelism.tp > 1:
    a_layer = model.sums_per_layer
    sums = one * (parallelism.num_layers(model) * a_layer + 1)
    if parallelism.pp == 1:
      sums -= a_layer * row * (layout.num_tokens - layout.num_rows)
  return sums + (one // parallelism.tp if parallelism.pp > 1 else 0)

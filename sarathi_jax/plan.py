# SPDX-License-Identifier: Apache-2.0
r"""Tells how much of its GPUs a deployment takes, with no GPU at hand.

  python -m sarathi_jax.plan --config=configs/falcon_180b_a100_tp4_pp2.py
  python -m sarathi_jax.plan --config=configs/yi_34b_a100_tp2.py --tp=4 \
      --device=a40 --context=4096,32768
  python -m sarathi_jax.plan --config=configs/mistral_7b_h100.py \
      --tokens=64 --sass

Compiles the largest step for the GPUs that the file names (the extra `aot`;
no GPU and no driver), and shares out the memory of one of them as the engine
does. Exits with an error, and the number that is missing, where a deployment
does not fit, spills registers, or copies its KV cache.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

from absl import flags
import rich.box
import rich.console
import rich.table
import rich.text

from sarathi_jax import config as config_lib
from sarathi_jax import xla_flags
from sarathi_jax.cli import deployment
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string(
    'device',
    None,
    'GPU to plan for: a100, a40 or h100; or cpu, this '
    "machine. Default: the config's.",
  )
  flags.DEFINE_list(
    'context',
    ['1024', '4096', '16384'],
    'Lengths of sequences, tokens, to say for each how many sequences fit.',
  )
  flags.DEFINE_integer(
    'tokens',
    None,
    'Compile the step for a batch of so many tokens, such as '
    'one of decodes only. Default: the largest.',
    lower_bound=1,
  )
  flags.DEFINE_boolean(
    'sass',
    False,
    'On a GPU, also tell what a layer launches and the bytes of each launch, '
    'and count the instructions in the loops of the kernels.',
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  engine_flags.define_engine_flags()


def on_cpu(model: Any, config: config_lib.EngineConfig) -> Any:
  """Makes the `runner.memory.MemoryPlan` of a deployment on CPU devices."""
  from sarathi_jax.in_process import building
  from sarathi_jax.launch import absent_gpus
  from sarathi_jax.runner import kv_cache
  from sarathi_jax.runner import memory
  from sarathi_jax.runner import placement

  model = model.divided(config)
  mesh = building.make_mesh(model, config)
  layout = placement.choose_layout(model, config.dtype, absent_gpus.DTYPE, mesh)
  kv_dtype = kv_cache.choose_dtype(config.kv_cache_dtype, layout.dtype, 'cpu')
  programs = building.step_programs(
    model, mesh, config, layout=layout, kv_dtype=kv_dtype
  )

  def plan(temporaries: int) -> memory.MemoryPlan:
    return memory.plan(
      model,
      config,
      mesh,
      programs,
      kv_dtype=kv_dtype,
      temporaries=temporaries,
      device_bytes=None,
    )

  pages = plan(0).num_pages or programs.pages_per_seq
  return plan(programs.temp_bytes(pages))


def _contexts(model: Any, config: config_lib.EngineConfig) -> list[int]:
  longest = config.max_model_len or model.context_len
  try:
    asked = sorted({int(text) for text in FLAGS.context})
  except ValueError:
    asked = [0]
  config_lib.check(
    min(asked) >= 1, 'context', FLAGS.context, 'must be lengths in tokens, >= 1'
  )
  return sorted({n for n in asked if n <= longest} | {longest})


def _sequences(memory: Any, contexts: list[int]) -> rich.table.Table:
  table = rich.table.Table(
    'of so many tokens',
    box=rich.box.SIMPLE_HEAD,
    caption=f'{memory.kv_tokens:,} tokens of KV cache',
  )
  table.add_column('sequences at once', justify='right')
  for context in contexts:
    table.add_row(f'{context:,}', f'{memory.num_seqs_at(context):,}')
  return table


def main() -> None:
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  xla_flags.set_environment(os.environ)
  config_lib.check(FLAGS.config is not None, 'config', None, 'must be given')
  asked = deployment.read(FLAGS.config)
  config = engine_flags.engine_config_from_flags()
  model = asked.known_model()
  device = FLAGS.device or asked.device or ''
  config_lib.check(
    bool(device),
    'device',
    FLAGS.device,
    'must be given, as the config names none',
  )
  contexts = _contexts(model, config)
  if problems := _run(asked.name, model, config, device, contexts):
    sys.exit('\n'.join(f'error: {problem}' for problem in problems))


def _run(
  name: str,
  model: Any,
  config: config_lib.EngineConfig,
  device: str,
  contexts: list[int],
) -> list[str]:
  """Prints the plan; returns its problems."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  tp = config.tp or 1
  num_devices = tp * config.pp
  if device == 'cpu':
    jax.config.update('jax_num_cpu_devices', num_devices)
  jax.config.update('jax_enable_compilation_cache', False)
  from pallas_kernels import gpu_targets
  from pallas_kernels.aot import toolkit
  from sarathi_jax.launch import absent_gpus

  console = rich.console.Console(highlight=False)
  console.print(
    f'[bold]{name}[/]: {num_devices} x {device}, TP{tp} '
    f'PP{config.pp}, steps of up to {config.token_budget} tokens'
  )
  if device == 'cpu':
    config_lib.check(not FLAGS.sass, 'sass', True, 'must be for a GPU')
    memory, problems = on_cpu(model, config), []
    if memory.problem:
      problems = [memory.problem]
    more: dict[str, Any] = {'memory': absent_gpus.memory_dict(memory)}
    console.print(absent_gpus.memory_table(memory))
  else:
    config_lib.check(
      device in gpu_targets.TARGETS,
      'device',
      device,
      f'must be cpu or one of {", ".join(gpu_targets.TARGETS)}',
    )
    if reason := toolkit.missing(disassembly=FLAGS.sass):
      sys.exit(f'error: {reason}')
    with console.status(f'Compiling for {num_devices} x {device} ...'):
      result = absent_gpus.check(
        name, model, config, device, FLAGS.tokens, sass=FLAGS.sass
      )
    memory, problems, more = (
      result.memory,
      list(result.case.problems),
      result.as_dict(),
    )
    for table in result.tables():
      console.print(table)
    for warning in result.case.warnings:
      console.print(rich.text.Text(warning, 'yellow'), soft_wrap=True)
  console.print(_sequences(memory, contexts))
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(
      json.dumps(
        {
          'name': name,
          'device': device,
          'tp': tp,
          'pp': config.pp,
          'problems': problems,
          'sequences': {n: memory.num_seqs_at(n) for n in contexts},
          **more,
        },
        indent=1,
      )
      + '\n'
    )
  return problems


def run() -> None:
  """Runs the command."""
  mains.run(main, define_flags)


if __name__ == '__main__':
  run()

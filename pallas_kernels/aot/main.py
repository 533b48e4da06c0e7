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

import dataclasses
import os
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
import jax
import rich.console
import rich.progress
import rich.text

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases as cases_lib
from pallas_kernels.aot import compiler
from pallas_kernels.aot import report
from pallas_kernels.aot import toolkit
from pallas_kernels.ragged_paged_attention import configurations

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_enum('device', None, list(gpu_targets.TARGETS),
                    'The GPU to compile for.', required=True)
  flags.DEFINE_string(
    'model', None, 'File of configs/: compile its largest step, in bfloat16, '
    'for as many devices as it asks for, instead of the kernels.')
  flags.DEFINE_string(
    'attention', None, 'Implementation of the step\'s attention. Default: '
    'what --model says.')
  flags.DEFINE_integer(
    'tokens', None, 'Of the step: compile the one that such a batch takes, '
    'such as one of decodes, and not the largest.', lower_bound=1)
  flags.DEFINE_string('json', None, 'File for the results.')


def _compile_step() -> Any:
  from pallas_kernels.aot import step  # Knows models, as nothing else here.
  from sarathi_jax import deployment
  from sarathi_jax import errors
  from sarathi_jax import xla_flags
  xla_flags.set_environment(os.environ)  # As whoever serves it does.
  try:
    asked = deployment.read(FLAGS.model)
    config = dataclasses.replace(
      asked.config, attention=FLAGS.attention or asked.config.attention)
    return step.check(
      asked.name, asked.known_model(), config, FLAGS.device, FLAGS.tokens)
  except errors.SarathiError as error:
    sys.exit(f'error: {error}')


def _compile_kernels() -> list[cases_lib.Result]:
  with compiler.on(FLAGS.device):
    cases = list(configurations.cases(FLAGS.device))
  with rich.progress.Progress(transient=True) as progress:
    task = progress.add_task('Compiling', total=len(cases))
    return cases_lib.check(
      cases, FLAGS.device, lambda result: progress.advance(task))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  # The plugin must not look for a driver, nor XLA say all that it thinks.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  if reason := toolkit.missing():
    sys.exit(f'error: {reason}')
  if FLAGS.tokens and not FLAGS.model:
    raise app.UsageError('--tokens: is for a step; name its --model.')
  console = rich.console.Console(highlight=False)
  step = _compile_step() if FLAGS.model else None
  results = [step.case] if step else _compile_kernels()
  console.print(report.kernels_table(results, FLAGS.device))
  for table in step.tables() if step else ():
    console.print(table)
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(report.as_json(
      results, FLAGS.device, **step.as_dict() if step else {}))
  said = [('yellow', r.name, w) for r in results for w in r.warnings]
  failed = [('red', r.name, p) for r in results for p in r.problems]
  for style, name, text in said + failed:
    console.print(rich.text.Text(f'{name}: {text}', style), soft_wrap=True)
  if failed:
    sys.exit(f'error: {len(failed)} problems on {FLAGS.device}, see above')
  console.print(f'{len(results)} of {len(results)} compile for '
                f'{FLAGS.device}; no spills.')


def run() -> None:
  """The command."""
  define_flags()
  app.run(main)

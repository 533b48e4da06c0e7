# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for a GPU that is not here.

  python -m pallas_kernels.aot --device=a40
  python -m pallas_kernels.aot --device=h100 --only=mistral-7b --sass

Needs the wheels of the extra `aot`; no GPU and no driver. Fails if a kernel
spills registers or asks for more shared memory than the device has. Nothing
runs; --sass counts the instructions of loops, and estimates what bounds them.
`sarathi_jax.plan` compiles whole steps.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys

from absl import app
from absl import flags
import jax
import rich.console
import rich.progress
import rich.text

from pallas_kernels import gpu_targets
from pallas_kernels.add_and_norm import configurations as norm_cases
from pallas_kernels.aot import cases as cases_lib
from pallas_kernels.aot import compiler
from pallas_kernels.aot import estimates
from pallas_kernels.aot import report
from pallas_kernels.aot import toolkit
from pallas_kernels.filter_threshold import configurations as filter_cases
from pallas_kernels.grouped_matmul import configurations as grouped_cases
from pallas_kernels.quantized_matmul import configurations as quantized_cases
from pallas_kernels.ragged_paged_attention import configurations
from pallas_kernels.rotate_and_write import configurations as rotate_cases

FLAGS = flags.FLAGS
# What to compile for a device, of each operation.
CASES = (
  configurations.cases,
  rotate_cases.cases,
  norm_cases.cases,
  filter_cases.cases,
  grouped_cases.cases,
  quantized_cases.cases,
)


def define_flags() -> None:
  flags.DEFINE_enum(
    'device',
    None,
    list(gpu_targets.TARGETS),
    'The GPU to compile for; it need not be here.',
    required=True,
  )
  flags.DEFINE_string(
    'json', None, 'File to write the results to, as JSON; none by default.'
  )
  flags.DEFINE_string(
    'only',
    '',
    'A regular expression: compile only the cases whose names have it.',
  )
  flags.DEFINE_boolean(
    'sass',
    False,
    'Disassemble the kernels: count the instructions of each inner loop, and '
    'estimate what bounds it.',
  )


def _compile_kernels() -> list[cases_lib.Result]:
  with compiler.on(FLAGS.device):
    cases = [
      case
      for of in CASES
      for case in of(FLAGS.device)
      if re.search(FLAGS.only, case.name)
    ]
  if not cases:
    sys.exit(f'error: --only={FLAGS.only}: no case has such a name')
  with rich.progress.Progress(transient=True) as progress:
    task = progress.add_task('Compiling', total=len(cases))
    return cases_lib.check(
      cases, FLAGS.device, lambda result: progress.advance(task)
    )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  # The plugin must not look for a driver, nor XLA log all that it does.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  if reason := toolkit.missing(disassembly=FLAGS.sass):
    sys.exit(f'error: {reason}')
  console = rich.console.Console(highlight=False)
  results = _compile_kernels()
  console.print(report.kernels_table(results, FLAGS.device))
  loops = {}
  if FLAGS.sass:
    loops = {r.name: estimates.judge(r, FLAGS.device) for r in results}
    console.print(report.loops_table(loops))
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(
      report.as_json(results, FLAGS.device, loops)
    )
  said = [('yellow', r.name, w) for r in results for w in r.warnings]
  failed = [('red', r.name, p) for r in results for p in r.problems]
  for style, name, text in said + failed:
    console.print(rich.text.Text(f'{name}: {text}', style), soft_wrap=True)
  if failed:
    sys.exit(f'error: {len(failed)} problems on {FLAGS.device}, see above')
  console.print(
    f'{len(results)} of {len(results)} compile for {FLAGS.device}; no spills.'
  )


def run() -> None:
  """Runs the command; `python -m pallas_kernels.aot` calls it."""
  define_flags()
  app.run(main)

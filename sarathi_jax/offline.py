# SPDX-License-Identifier: Apache-2.0
"""Continues a file of prompts.

  python -m sarathi_jax.offline --checkpoint=DIR \\
      --prompts=in.jsonl --output=out.jsonl --max_tokens=100

A line of the input is an object with one of `prompt` (text),
`prompt_token_ids` or `messages` (a chat), and maybe `request_id` (a text or an
integer), `adapter` (a name of --lora_modules; null for none) and `sampling`,
whose fields override the flags; there null is not said. Or it is a line of
OpenAI's batch files, see `batch_files`.
Results are written as they finish, in any order. A line that can't be served
becomes a result with `error` and `line`, and the rest is still done. After an
interruption, --resume goes on with what is missing.

A request without a seed has one made of --seed and its id: its random numbers
depend neither on interruptions nor on how requests are scheduled. With float32
weights its tokens don't either, but for rounding. With 16 bits rounding decides
between tokens that are nearly as likely, and depends on what else is in a step:
some outputs of a run that is repeated, or resumed, differ, but for
--deterministic.

Where there is no terminal, a line per minute tells how far it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import flags
import rich.console
import rich.markup
import rich.progress

from sarathi_jax import batch_files
from sarathi_jax import errors
from sarathi_jax import result_lines
from sarathi_jax import types
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.cli import prompt_lines
from sarathi_jax.cli import report
from sarathi_jax.cli import sampling_flags
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.in_process import progress as progress_lib
from sarathi_jax.text import collector

FLAGS = flags.FLAGS
Line = prompt_lines.Line

_ENGINES_OWN = ('seed',)  # flag, from which each line's seed is made


def define_flags() -> None:
  """Defines the flags; not on import, as their names may be taken."""
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Checkpoint to run: a converted one, or a Hugging Face '
    'folder or hub id, which is converted once.',
    required=True,
  )
  flags.DEFINE_string(
    'prompts', None, 'File of JSON lines to read requests from.', required=True
  )
  flags.DEFINE_string(
    'output', None, 'File of JSON lines to write results to.', required=True
  )
  flags.DEFINE_string(
    'served_model_name',
    None,
    "The model's name in bodies of OpenAI's batch files; by default the "
    "folder's, or the hub id.",
  )
  flags.DEFINE_bool(
    'resume',
    False,
    'Go on with the file --output: skip requests whose ids it holds.',
  )
  flags.DEFINE_string(
    'adapter',
    None,
    'LoRA adapter of --lora_modules for requests that name none. Default: the '
    'model as it is.',
  )
  engine_flags.define_engine_flags()
  engine_flags.define_adapter_flags()
  sampling_flags.define(but=_ENGINES_OWN)


def parse_line(
  number: int,
  text: bytes,
  defaults: Mapping[str, Any],
  seed: int,
  engine: engine_lib.Engine,
  adapter: str | None = None,
) -> Line:
  """Makes requests of a line, of either form, or says what is wrong with it."""
  try:
    fields = prompt_lines.decode(text)
  except errors.InvalidRequestError as error:
    if b'"custom_id"' not in text:  # Whose answers have another form.
      return Line(number, f'line-{number}', (), error)
    fields = {'custom_id': None}
  if batch_files.KEYS & fields.keys():
    return batch_files.parse(number, text, defaults, seed, engine, adapter)
  return prompt_lines.parse(number, fields, defaults, seed, engine, adapter)


def unwritten(
  lines: Iterable[Line], written: result_lines.Written
) -> Iterator[Line]:
  """Yields the lines that an output lacks; refuses an id's second line."""
  seen: set[str] = set()
  for line in lines:
    named = str(line.request_id)
    if line.error is None and named not in seen:
      seen.add(named)
      if named not in written.ids:
        yield line
    elif line.number not in written.lines:
      yield (
        line
        if line.error
        else line.refused(
          errors.InvalidRequestError(
            f'{line.ID_KEY}: an earlier line has it, too.'
          )
        )
      )


class _Live(NamedTuple):
  """A line whose requests run.

  Attributes:
    line: the line.
    collectors: of its requests, by key.
    done: the outputs of those that have ended, by key.
  """

  line: Line
  collectors: dict[str, collector.Collector]
  done: dict[str, list[types.Completion]]


def run_lines(
  engine: engine_lib.Engine,
  lines: Iterator[Line],
  on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> Iterator[dict[str, Any]]:
  """Runs requests to their end and yields results as they come.

  Lines are read as the engine makes room, not all at once.

  Args:
    engine: the engine, which is idle.
    lines: the lines, with ids that differ.
    on_tokens: told the number of every step's new tokens.
  """
  live: dict[str, _Live] = {}  # by the keys of requests that run
  max_live = 2 * engine.info.max_num_seqs
  is_last = False
  while live or not is_last:
    while not is_last and len(live) < max_live:
      line = next(lines, None)
      if line is None:
        is_last = True
      elif line.error is not None:
        yield line.result(())
      else:
        one = _Live(
          line, {r.key: collector.Collector(r) for r in line.requests}, {}
        )
        for request in line.requests:
          live[request.key] = one
          engine.add(request)
    deltas = engine.step()
    on_tokens(sum(len(delta.token_ids) for delta in deltas))
    for delta in deltas:
      line, collectors, done = live[delta.request_id]
      if completions := collectors[delta.request_id].add(delta):
        del live[delta.request_id]
        done[delta.request_id] = completions
        if len(done) == len(collectors):
          yield line.result([c for key in collectors for c in done[key]])


def _read_prompts(path: pathlib.Path) -> list[tuple[int, bytes]]:
  """Reads the lines that are not blank, with their numbers."""
  try:
    lines = path.read_bytes().split(b'\n')
  except OSError as error:
    raise errors.ConfigError(
      f"prompts={str(path)!r}: can't be read: {error.strerror}."
    ) from error
  return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _progress(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[rate]:,.0f} tokens/s'),
    rich.progress.TimeRemainingColumn(),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )


def _start(console: rich.console.Console) -> None:
  prompts = _read_prompts(pathlib.Path(FLAGS.prompts).expanduser())
  config = engine_flags.engine_config_from_flags()
  defaults = sampling_flags.said(but=_ENGINES_OWN)
  types.SamplingParams.from_dict(defaults)
  path = pathlib.Path(FLAGS.output).expanduser()
  load_options = engine_flags.loading_from_flags()
  adapters = engine_flags.adapters_from_flags()
  leader = None
  if (processes := engine_flags.processes_from_flags()) is not None:
    from sarathi_jax.launch import loading

    leader = loading.join(processes, FLAGS.checkpoint, config, **load_options)
  # The first of several processes tells the others how it ends.
  with (
    leader or contextlib.nullcontext(),
    contextlib.closing(result_lines.Output(path, FLAGS.resume)) as output,
  ):
    # Not on top: a wrong flag is told before JAX is loaded.
    from sarathi_jax.launch import loading

    engine = loading.load_llm(
      FLAGS.checkpoint,
      config,
      model_name=FLAGS.served_model_name,
      end=leader,
      console=console,
      adapters=adapters,
      **load_options,
    ).engine
    engine.adapters.find(FLAGS.adapter)
    lines = [
      functools.partial(
        parse_line, number, text, defaults, config.seed, engine, FLAGS.adapter
      )
      for number, text in prompts
    ]
    _run(engine, lines, output, console)


def _run(
  engine: engine_lib.Engine,
  lines: Sequence[Callable[[], Line]],
  output: result_lines.Output,
  console: rich.console.Console,
) -> None:
  num_written = len(output.written.ids) + len(output.written.lines)
  num_done = num_written
  num_errors = num_tokens = 0
  start = time.monotonic()
  told = progress_lib.Lines(console)
  with _progress(console) as progress:
    task = progress.add_task(
      'Generating', total=len(lines), rate=0.0, completed=num_written
    )

    def on_tokens(n: int) -> None:
      nonlocal num_tokens
      num_tokens += n
      rate = num_tokens / (time.monotonic() - start)
      progress.update(task, rate=rate)
      told.tell(
        lambda: (
          f'{num_done:,} of {len(lines):,} lines are done, '
          f'{rate:,.0f} tokens/s.'
        )
      )

    for result in run_lines(
      engine, unwritten((parse() for parse in lines), output.written), on_tokens
    ):
      output.write(result)
      num_done += 1
      num_errors += result_lines.has_failed(result)
      progress.advance(task)
  if num_written:
    console.print(f'{num_written:,} results were there already.')
  console.print(
    report.summary_table(
      engine.metrics,
      time.monotonic() - start,
      engine.stats().num_preemptions,
      num_errors,
    )
  )


def main() -> None:
  console = rich.console.Console(stderr=True, highlight=False)
  try:
    _start(console)
  except KeyboardInterrupt:
    console.print('Interrupted; --resume goes on with what is missing.')
    # Python would wait for compilations, which can't be interrupted.
    os._exit(130)


def run() -> None:
  """Runs the console script."""
  mains.run(main, define_flags)


if __name__ == '__main__':
  run()

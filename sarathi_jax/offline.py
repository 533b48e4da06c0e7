# SPDX-License-Identifier: Apache-2.0
"""Continues a file of prompts.

  python -m sarathi_jax.offline --checkpoint=DIR \
      --prompts=in.jsonl --output=out.jsonl --max_tokens=100

A line of the input is an object with one of `prompt` (text),
`prompt_token_ids` or `messages` (a chat), and maybe `request_id` and
`sampling`, whose fields override the flags. Results are written as they
finish, in any order. A line that can't be served becomes a result with
`error` and `line`, and the rest is still done. After an interruption,
--resume goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any, BinaryIO, NamedTuple

from absl import app
from absl import flags
import rich.console
import rich.progress

from sarathi_jax import errors
from sarathi_jax import flags as engine_flags
from sarathi_jax import report
from sarathi_jax import types
from sarathi_jax.engine import collector
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS

_SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
  'max_tokens': (flags.DEFINE_integer, 'The most tokens to generate.'),
  'temperature': (flags.DEFINE_float, '0 for the likeliest tokens.'),
  'top_k': (flags.DEFINE_integer, 'Sample among the k likeliest tokens.'),
  'top_p': (flags.DEFINE_float,
            'Sample among the likeliest tokens of this probability.'),
  'min_p': (flags.DEFINE_float,
            'Drop tokens less likely than this fraction of the likeliest.'),
  'stop': (flags.DEFINE_multi_string, 'A string that ends the output.'),
  'ignore_eos': (flags.DEFINE_bool, 'Go on past the end of sequence.'),
}
_KEYS = {'request_id', 'prompt', 'prompt_token_ids', 'messages', 'sampling'}
_PROMPT_KEYS = ('prompt', 'prompt_token_ids', 'messages')


class Line(NamedTuple):
  """A line of the input: a request, or what is wrong with it."""

  number: int  # from 1
  request_id: str
  request: types.Request | None
  error: str | None


def define_flags() -> None:
  """Not done on import, which may find flags of these names."""
  flags.DEFINE_string(
    'checkpoint', None, 'A converted checkpoint, or a Hugging Face folder or '
    'hub id, which is converted once.', required=True)
  flags.DEFINE_string('prompts', None, 'JSON lines to read.', required=True)
  flags.DEFINE_string('output', None, 'JSON lines to write.', required=True)
  flags.DEFINE_bool(
    'resume', False, 'Go on with an output: skip the ids it holds.')
  engine_flags.define_engine_flags()
  for name, (define, text) in _SAMPLING_FLAGS.items():
    define(name, None, text)


def parse_line(number: int, text: bytes, defaults: Mapping[str, Any],
               engine: engine_lib.Engine) -> Line:
  """Makes a request of a line, or says what is wrong with it."""
  request_id = f'line-{number}'
  try:
    fields = json.loads(text.decode('utf-8'))
    if not isinstance(fields, dict):
      raise errors.InvalidRequestError('must be a JSON object.')
    request_id = fields.get('request_id', request_id)
    if not isinstance(request_id, str) or not request_id:
      raise errors.InvalidRequestError(
        f'request_id={request_id!r}: must be a text that is not empty.')
    if unknown := fields.keys() - _KEYS:
      raise errors.InvalidRequestError(
        f'{min(unknown)}: unknown key; known: {", ".join(sorted(_KEYS))}.')
    prompts = [key for key in _PROMPT_KEYS if key in fields]
    if len(prompts) != 1:
      raise errors.InvalidRequestError(
        f'must have one of {", ".join(_PROMPT_KEYS)}; has '
        f'{", ".join(prompts) or "none"}.')
    request = types.Request(
      request_id=request_id,
      prompt_token_ids=_encode(engine, prompts[0], fields[prompts[0]]),
      sampling=types.SamplingParams.from_dict(
        {**defaults, **(fields.get('sampling') or {})}),
      arrival_time=engine.clock())
    engine.check(request)
    return Line(number, request_id, request, None)
  except UnicodeDecodeError as error:
    message = f'not UTF-8: {error}'
  except json.JSONDecodeError as error:
    message = f'not JSON: {error}'
  except errors.InvalidRequestError as error:
    message = str(error)
  return Line(number, str(request_id), None, message)


def _encode(engine: engine_lib.Engine, key: str, value: Any,
            ) -> tuple[int, ...]:
  is_right = {
    'prompt': isinstance(value, str),
    'prompt_token_ids': isinstance(value, list) and all(
      isinstance(v, int) and not isinstance(v, bool) for v in value),
    'messages': isinstance(value, list) and bool(value) and all(
      isinstance(v, dict) for v in value)}[key]
  if not is_right:
    rule = {'prompt': 'a text', 'prompt_token_ids': 'a list of integers',
            'messages': 'a list of objects with role and content'}[key]
    raise errors.InvalidRequestError(f'{key}={value!r}: must be {rule}.')
  return tokenizer_lib.encode_prompt(engine.tokenizer, value)


def run_lines(engine: engine_lib.Engine, lines: Iterator[Line],
              ) -> Iterator[dict[str, Any]]:
  """Runs requests to their end and yields results as they come.

  Lines are read as the engine makes room, not all at once.
  """
  live: dict[str, collector.Collector] = {}
  seen: set[str] = set()
  max_live = 2 * engine.info.max_num_seqs
  is_last = False
  while live or not is_last:
    while not is_last and len(live) < max_live:
      line = next(lines, None)
      if line is None:
        is_last = True
      elif line.request is None or line.request_id in seen:
        error = line.error or 'request_id: an earlier line has it, too.'
        yield {'request_id': line.request_id, 'line': line.number,
               'error': error}
      else:
        seen.add(line.request_id)
        live[line.request_id] = collector.Collector(line.request)
        engine.add(line.request)
    for delta in engine.step():
      if done := live[delta.request_id].add(delta):
        del live[delta.request_id]
        yield _result(done)


def _result(done: types.Completion) -> dict[str, Any]:
  return {
    'request_id': done.request_id,
    'prompt_token_ids': done.prompt_token_ids,
    'token_ids': done.token_ids,
    'text': done.text,
    'finish_reason': done.finish_reason.value,
    'stop_reason': done.stop_reason,
    'metrics': dataclasses.asdict(done.metrics),
  }


def _written_ids(path: pathlib.Path) -> set[str]:
  """Ids in an output; a last line that was cut off is removed."""
  ids: set[str] = set()
  whole = 0
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b'\n'):
        break
      try:
        ids.add(json.loads(line)['request_id'])
      except (ValueError, KeyError, TypeError):
        raise errors.ConfigError(
          f'output={str(path)!r}: line {number} is not one of our results; '
          'won\'t go on with this file.') from None
      whole += len(line)
  if whole < path.stat().st_size:
    os.truncate(path, whole)
  return ids


def _open_output(path: pathlib.Path, resume: bool,
                 ) -> tuple[BinaryIO, set[str]]:
  try:
    ids: set[str] = set()
    if path.is_file() and path.stat().st_size:
      if not resume:
        raise errors.ConfigError(
          f'output={str(path)!r}: exists; --resume goes on with it.')
      ids = _written_ids(path)
    return path.open('ab', buffering=0), ids
  except OSError as error:
    raise errors.ConfigError(
      f'output={str(path)!r}: can\'t be written: {error.strerror}.') from error


def _read_prompts(path: pathlib.Path) -> list[bytes]:
  try:
    with path.open('rb') as file:
      return [line for line in file.read().split(b'\n')]
  except OSError as error:
    raise errors.ConfigError(
      f'prompts={str(path)!r}: can\'t be read: {error.strerror}.') from error


def _run(console: rich.console.Console) -> None:
  prompts = _read_prompts(pathlib.Path(FLAGS.prompts))
  numbered = [(i, p) for i, p in enumerate(prompts, 1) if p.strip()]
  config = engine_flags.engine_config_from_flags()
  defaults = {name: FLAGS[name].value for name in _SAMPLING_FLAGS
              if FLAGS[name].value is not None}
  types.SamplingParams.from_dict(defaults)
  output, written = _open_output(pathlib.Path(FLAGS.output), FLAGS.resume)
  # Not on top: a wrong flag is told before JAX is loaded.
  from sarathi_jax import loading
  engine = loading.load_llm(
    FLAGS.checkpoint, config, cache_dir=FLAGS.cache_dir,
    console=console).engine
  num_errors = 0
  start = time.monotonic()
  with output, rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(), rich.progress.TextColumn(
        '{task.fields[rate]:,.0f} tokens/s'),
      console=console, transient=True) as progress:
    task = progress.add_task('Generating', total=len(numbered), rate=0.0)
    lines = (parse_line(i, p, defaults, engine) for i, p in numbered)
    todo = (line for line in lines if line.request_id not in written)
    progress.update(task, total=None if written else len(numbered))
    for result in run_lines(engine, todo):
      output.write(json.dumps(result, ensure_ascii=False).encode() + b'\n')
      num_errors += 'error' in result
      progress.update(task, advance=1, rate=engine.metrics.num_output_tokens
                      / (time.monotonic() - start))
  console.print(report.summary_table(
    engine.metrics, time.monotonic() - start, engine.stats().num_preemptions,
    num_errors))
  if written:
    console.print(f'{len(written):,} results were there already.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  console = rich.console.Console(stderr=True, highlight=False)
  try:
    _run(console)
  except errors.SarathiError as error:
    console.print(f'[red]error:[/] {error}', soft_wrap=True)
    sys.exit(1)
  except OSError as error:
    console.print(
      f'[red]error:[/] output={FLAGS.output!r}: {error.strerror}; --resume '
      'goes on with what is missing.', soft_wrap=True)
    sys.exit(1)
  except KeyboardInterrupt:
    console.print('\nInterrupted; --resume goes on with what is missing.')
    sys.exit(130)


def run() -> None:
  """The console script."""
  define_flags()
  with contextlib.suppress(BrokenPipeError):
    app.run(main)


if __name__ == '__main__':
  run()

# SPDX-License-Identifier: Apache-2.0
"""Serves a checkpoint over gRPC until SIGTERM or Ctrl-C.

  python -m sarathi_jax.server --checkpoint=DIR --port=50051

A second Ctrl-C does not wait for the requests that are running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import os
import sys
from typing import NoReturn

from absl import app
from absl import flags
import rich.console
import rich.table

from sarathi_jax import errors
from sarathi_jax import flags as engine_flags
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import server as server_lib

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Not done on import, which may find flags of these names."""
  flags.DEFINE_string(
    'checkpoint', None,
    'A converted checkpoint, or a Hugging Face folder or hub id, which is '
    'converted once.', required=True)
  flags.DEFINE_string(
    'host', '127.0.0.1',
    'The address to listen at. 0.0.0.0 lets in whoever can reach this '
    'machine.')
  flags.DEFINE_integer(
    'port', 50051, 'The port to listen at; 0 for any that is free.')
  flags.DEFINE_float(
    'drain_s', 30.0,
    'How long requests may go on after SIGTERM or Ctrl-C, seconds.')
  engine_flags.define_engine_flags()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  try:
    config = server_lib.ServerConfig(
      host=FLAGS.host, port=FLAGS.port, drain_s=FLAGS.drain_s)
    engine_config = engine_flags.engine_config_from_flags()
  except errors.SarathiError as error:
    _fail(error)

  def make_engine() -> engine_lib.Engine:
    # Not on top: a flag that is wrong or a port in use is told at once.
    from sarathi_jax import llm
    return llm.build_engine(FLAGS.checkpoint, engine_config)

  run(config, make_engine, f'Loading {FLAGS.checkpoint}')


def run(config: server_lib.ServerConfig,
        make_engine: Callable[[], engine_lib.Engine], title: str) -> NoReturn:
  """Serves an engine, then exits.

  Args:
    config: where.
    make_engine: makes the engine, warm.
    title: what to tell while that goes on.
  """
  console = rich.console.Console(highlight=False)

  def on_ready(info: engine_lib.EngineInfo, port: int) -> None:
    console.print(_table(info))
    target = '' if port == 50051 else f'--target=localhost:{port} '
    console.print(
      f'Serving at {config.host}:{port}. Try:\n'
      f'  python -m sarathi_jax.client {target}"Once upon a time"',
      markup=False, soft_wrap=True)

  async def serve() -> tuple[int, bool]:
    server = server_lib.Server(config, make_engine)
    code = await server_lib.serve(server, on_ready)
    return code, server.is_stuck

  console.print(title, markup=False, soft_wrap=True)
  try:
    code, is_stuck = asyncio.run(serve())
  except errors.SarathiError as error:
    _fail(error)
  if is_stuck:
    # What the engine's thread is in, a long step or a compilation, can't be
    # interrupted, and Python can't end cleanly beside it.
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _table(info: engine_lib.EngineInfo) -> rich.table.Table:
  table = rich.table.Table(show_header=False, box=None)
  for name, value in (
      ('model', f'{info.model_name} ({info.family})'),
      ('context', f'{info.max_model_len} tokens'),
      ('policy', f'{info.policy}, {info.token_budget} tokens a step'),
      ('sequences', f'{info.max_num_seqs} at once'),
      ('KV cache', f'{info.num_pages} pages of {info.page_size} tokens'),
  ):
    table.add_row(name, value)
  return table


def _fail(error: errors.SarathiError) -> NoReturn:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(1)


def cli() -> None:
  """The console script sarathi-serve."""
  define_flags()
  app.run(main)

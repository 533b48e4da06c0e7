# SPDX-License-Identifier: Apache-2.0
"""Serves a checkpoint over gRPC, and HTTP, until SIGTERM or Ctrl-C.

  sarathi-serve CHECKPOINT --port=50051    a folder or hub id
  sarathi-serve                            the quickstart model

Or python -m sarathi_jax.server, or --checkpoint=CHECKPOINT. A second Ctrl-C
does not wait for the requests that are running.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import os
import shutil
import sys
from typing import Any, NoReturn

from absl import app
from absl import flags
from absl import logging
import rich.console
import uvloop

from sarathi_jax import errors
from sarathi_jax import quickstart
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import flags as server_flags
from sarathi_jax.server import server as server_lib
from sarathi_jax.server.protocols import control_v1

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags; not on import, as their names may be taken."""
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Checkpoint to serve: a converted one, or a Hugging Face folder or hub id, '
    'which is converted once. Default: the quickstart model.',
  )
  flags.DEFINE_string(
    'served_model_name',
    None,
    'Name of the model that clients are told. Default: the name of the folder '
    '--checkpoint, or its hub id.',
  )
  flags.DEFINE_string(
    'host',
    '127.0.0.1',
    'Address to listen at. 0.0.0.0 lets in whoever can reach this machine.',
  )
  flags.DEFINE_integer(
    'port', 50051, 'Port at which to serve gRPC; 0 for any that is free.'
  )
  flags.DEFINE_float(
    'drain_s',
    30.0,
    'Seconds that running requests may go on after SIGTERM or Ctrl-C.',
  )
  server_flags.define_server_flags()
  engine_flags.define_engine_flags()
  engine_flags.define_adapter_flags()


def main(arguments: list[str]) -> None:
  _choose_checkpoint(arguments)
  config = server_flags.server_config_from_flags()
  engine_config = engine_flags.engine_config_from_flags()
  adapters = engine_flags.adapters_from_flags()
  leader = _join(engine_config)

  # Not on top: a flag that is wrong or a port in use is told at once.
  @functools.cache
  def llm() -> Any:
    from sarathi_jax.launch import loading

    return loading.load_llm(
      FLAGS.checkpoint,
      engine_config,
      end=leader,
      model_name=FLAGS.served_model_name,
      adapters=adapters,
      **engine_flags.loading_from_flags(),
    )

  def make_engine() -> engine_lib.Engine:
    engine: engine_lib.Engine = llm().engine
    engine.warm_up_grammars()
    return engine

  def profiler() -> Any:
    import jax

    return jax.profiler

  def read_adapter(name: str, path: str) -> Any:
    return llm().adapters.read(name, path)

  hooks = control_v1.Hooks(
    load_weights=lambda path: llm().open_weights(
      path, **engine_flags.loading_from_flags()
    ),
    update_weights=lambda opened, on_update: llm().load_weights(
      opened, on_update=on_update
    ),
    start_profile=lambda folder: profiler().start_trace(folder),
    stop_profile=lambda: profiler().stop_trace(),
    read_adapter=read_adapter,
    num_compiled=lambda: llm().num_compiled,
  )
  # The first of several processes tells the others how it ends.
  with leader or contextlib.nullcontext():
    serve(config, make_engine, hooks, leader)


def _choose_checkpoint(arguments: list[str]) -> None:
  """Sets the flags that say what is served, where they are not given."""
  if len(arguments) > (FLAGS.checkpoint is None):
    raise app.UsageError(f'unexpected argument: {arguments[-1]}')
  said = {'checkpoint': arguments[0]} if arguments else {}
  if FLAGS.checkpoint is None and not arguments:
    said = {
      'checkpoint': str(quickstart.MODEL),
      'served_model_name': FLAGS.served_model_name or 'quickstart',
      'config': FLAGS.config or 'quickstart',
    }
  for name, value in said.items():
    FLAGS[name].value = value


def _join(config: Any) -> Any:
  """Joins several processes; returns the first one's end, or None if alone."""
  processes = engine_flags.processes_from_flags()
  if processes is None:
    return None
  from sarathi_jax.launch import loading

  return loading.join(
    processes, FLAGS.checkpoint, config, **engine_flags.loading_from_flags()
  )


def serve(
  config: server_lib.ServerConfig,
  make_engine: Callable[[], engine_lib.Engine],
  hooks: control_v1.Hooks | None = None,
  leader: Any = None,
) -> NoReturn:
  """Serves an engine, then exits.

  Args:
    config: where to serve, and whom.
    make_engine: makes the engine, warm, and shows how far it is.
    hooks: what else its model can do.
    leader: from `loading.join`: tells if another process is lost, and ends
      this one at the end of its `with` block.
  """
  console = rich.console.Console(highlight=False)

  def on_ready(
    info: engine_lib.EngineInfo, port: int, http_port: int | None
  ) -> None:
    target = '' if port == 50051 else f'--target=localhost:{port} '
    scheme = 'http' if config.tls is None else 'https'
    for what, where in (
      ("OpenAI's HTTP", http_port and f'{http_port}/v1'),
      ('The gateway', config.gateway_port and f'{config.gateway_port}/v1'),
      ('Metrics', config.metrics_port and f'{config.metrics_port}/metrics'),
    ):
      if where:
        console.print(
          f'{what}: {scheme}://{config.address}:{where}',
          markup=False,
          soft_wrap=True,
        )
    console.print(
      f'Serving {info.model_name} at {config.host}:{port}. Try:\n'
      f'  {_python()} -m sarathi_jax.client {target}"A list is"',
      markup=False,
      soft_wrap=True,
    )

  async def served() -> tuple[int, server_lib.Server]:
    server = server_lib.Server(config, make_engine, hooks=hooks)
    if leader is not None:
      leader.on_fault, leader.on_leaving = server.fail, server.leave
    code = await server_lib.serve(server, on_ready)
    return code, server

  code, server = uvloop.run(served())
  if server.fault is not None:
    if leader is not None:
      raise server.fault
    print(f'error: {errors.describe(server.fault)}', file=sys.stderr)
  if server.is_stuck and leader is None:
    # A long step or a compilation on the engine's thread can't be interrupted.
    # Python can't end cleanly beside it, nor beside a gRPC that broke.
    sys.stdout.flush()
    # A bar, which is on standard error, hides it.
    rich.console.Console(stderr=True).show_cursor()
    os._exit(code)
  sys.exit(code)


def _python() -> str:
  """Returns what to type for this Python."""
  if shutil.which('python') == sys.executable:
    return 'python'
  return sys.executable.removeprefix(os.path.join(os.getcwd(), ''))


def run() -> None:
  """Runs the console script sarathi-serve."""
  mains.run(main, define_flags, takes_arguments=True, verbosity=logging.WARNING)

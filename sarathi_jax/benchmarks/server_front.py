# SPDX-License-Identifier: Apache-2.0
"""Measures the server's CPU time to stream a token, without a model.

  python -m sarathi_jax.benchmarks.server_front --streams=1000

The server runs in a process of its own, with a runner that counts up; the
clients run here. `cpu_us_per_token` is the CPU time of the whole server divided
by the tokens that it streamed; `front_cpu_us_per_token` leaves out the engine's
thread, which schedules. The cost of a message is compared with that of a server
of grpc.aio alone, which writes bytes that were made beforehand. With `--http`,
OpenAI's HTTP is measured in turn with gRPC, several times, and compared.

With `--hostile`, it sends one body after another that a client can make large,
and tells by how much each lengthens the longest gap of others' streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import grpc
import rich
import rich.table
import uvloop

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import front_http
from sarathi_jax.benchmarks import hostile
from sarathi_jax.benchmarks import hostile_bodies
from sarathi_jax.benchmarks import hostile_http
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.launch import loading
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import server as server_lib
from sarathi_jax.server.protocols import sarathi_v1
from sarathi_jax.server.queue import admission
from sarathi_jax.text import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS
_VOCAB = 1000


class Ports(NamedTuple):
  """Where a server listens."""

  grpc: int
  http: int


class _Spent(NamedTuple):
  """CPU seconds so far."""

  cpu_s: float  # of the process
  engine_s: float  # of it, of the engine's thread


def make_engine(max_num_seqs: int, step_s: float) -> engine_lib.Engine:
  """Makes an engine without a model, with room for all."""
  return _make_engine(
    step_s,
    _VOCAB,
    token_budget=2 * max_num_seqs,
    max_num_seqs=max_num_seqs,
    max_model_len=4096,
    num_pages=max_num_seqs * 64,
    page_size=64,
  )


def make_roomy_engine(max_num_seqs: int, step_s: float) -> engine_lib.Engine:
  """Makes one with a tokenizer, which takes prompts of 100,000 tokens."""
  return _make_engine(
    step_s,
    2048,
    tokenizer_lib.Tokenizer(hostile.TOKENIZER),
    token_budget=8192,
    max_num_seqs=max_num_seqs,
    max_model_len=2**17,
    page_size=512,
    num_pages=16 * 2**17 // 512,
  )


def _make_engine(
  step_s: float,
  vocab_size: int,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  **fields: int,
) -> engine_lib.Engine:
  config = config_lib.SchedulerConfig(**fields)  # type: ignore[arg-type]
  return engine_lib.Engine(
    scheduler_lib.policy_class('sarathi')(config),
    fake_runner.FakeRunner(vocab_size, config.max_num_seqs, step_s),
    info=engine_lib.EngineInfo.of(
      config, policy='sarathi', model_name='counting', vocab_size=vocab_size
    ),
    tokenizer=tokenizer,
  )


def serve(
  pipe: Any,
  max_num_seqs: int,
  step_s: float,
  stream_interval_ms: int,
  limits: admission.Limits | None = None,
  make: Callable[[int, float], engine_lib.Engine] = make_engine,
) -> None:
  """Runs a server in this process; tells its ports, and CPU times if asked."""

  async def main() -> None:
    server = server_lib.Server(
      server_lib.ServerConfig(
        port=0,
        http_port=0,
        limits=limits
        or admission.Limits(
          max_waiting=100_000, stream_interval_ms=stream_interval_ms
        ),
      ),
      lambda: make(max_num_seqs, step_s),
    )
    await server.start()
    await server.warm()
    loading.collect_less_garbage()  # As the server does.
    pipe.send(Ports(server.port, server.http_port or 0))
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, pipe.recv):
      stats = await server.frontend.stats()
      assert stats.num_free_pages == stats.num_pages, 'pages were leaked'
      engine_s = await server.frontend.engine_thread.call(
        lambda engine: time.thread_time()
      )
      pipe.send(_Spent(time.process_time(), engine_s))
    await server.stop()

  uvloop.run(main())


def serve_floor(
  pipe: Any, max_num_seqs: int, step_s: float, stream_interval_ms: int
) -> None:
  """Serves as `serve`, but by grpc.aio alone: ready bytes, on a clock."""
  del max_num_seqs, stream_interval_ms
  answers = [
    pb.GenerateResponse(
      request_id='0' * 32,
      token_ids=[token],
      logprobs=[0.0],
    ).SerializeToString()
    for token in range(_VOCAB)
  ]

  async def main() -> None:
    loop = asyncio.get_running_loop()
    step = loop.create_future()

    async def generate(request: pb.GenerateRequest, context: Any) -> None:
      first = request.token_ids.ids[0] + 1
      for k in range(request.sampling.max_tokens):
        await step
        await context.write(answers[(first + k) % _VOCAB])

    async def tick() -> None:
      nonlocal step
      while True:
        await asyncio.sleep(step_s)
        done, step = step, loop.create_future()
        done.set_result(None)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
      (
        grpc.method_handlers_generic_handler(
          sarathi_v1.NAME,
          {
            'Generate': grpc.unary_stream_rpc_method_handler(
              generate, pb.GenerateRequest.FromString
            )
          },
        ),
      )
    )
    pipe.send(Ports(server.add_insecure_port('127.0.0.1:0'), 0))
    await server.start()
    loading.collect_less_garbage()
    ticking = asyncio.create_task(tick())
    while await loop.run_in_executor(None, pipe.recv):
      pipe.send(_Spent(time.process_time(), 0.0))
    ticking.cancel()
    await server.stop(None)

  uvloop.run(main())


async def drive(port: int, num_streams: int, num_tokens: int) -> list[int]:
  """Opens all streams at once; returns how many messages each got."""

  async def one(stub: Any, i: int) -> int:
    tokens, num_messages = [], 0
    async for response in stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[i % _VOCAB]),
        sampling=pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
      )
    ):
      tokens += response.token_ids
      num_messages += 1
    assert tokens == [(i + 1 + k) % _VOCAB for k in range(num_tokens)]
    return num_messages

  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
    return list(
      await asyncio.gather(*(one(stub, i) for i in range(num_streams)))
    )


def measure_hostile(
  repeats: int, step_s: float, only: str = ''
) -> Iterator[dict[str, Any]]:
  """Sends all bodies whose name has `only` in it."""
  # With the server's own limits, and a tokenizer.
  serve_as_it_is = functools.partial(
    serve, limits=admission.Limits(), make=make_roomy_engine
  )
  with common.process(serve_as_it_is, 16, step_s, 0) as pipe:
    ports = pipe.recv()
    bodies = itertools.chain(
      hostile_http.all_bodies(only), hostile_bodies.all_bodies(only)
    )
    yield from hostile.measure(ports.grpc, bodies, repeats, ports.http)


def measure(
  num_streams: int,
  num_tokens: int,
  step_s: float,
  stream_interval_ms: int = 0,
  serve: Callable[..., None] = serve,
  *,
  is_http: bool = False,
) -> dict[str, Any]:
  """Streams tokens, and returns what that cost."""
  with common.process(serve, num_streams, step_s, stream_interval_ms) as pipe:
    ports = pipe.recv()

    def ask() -> _Spent:
      pipe.send(True)
      spent: _Spent = pipe.recv()
      return spent

    async def go(num_streams: int, num_tokens: int) -> list[int]:
      if is_http:
        return await front_http.drive(
          ports.http, num_streams, num_tokens, _VOCAB
        )
      return await drive(ports.grpc, num_streams, num_tokens)

    asyncio.run(go(min(num_streams, 50), 20))  # warm
    before = ask()
    start = time.monotonic()
    messages = asyncio.run(go(num_streams, num_tokens))
    seconds = time.monotonic() - start
    after = ask()
  num_out = num_streams * num_tokens
  cpu_s = after.cpu_s - before.cpu_s
  engine_s = after.engine_s - before.engine_s
  return {
    'streams': num_streams,
    'tokens': num_out,
    'messages': sum(messages),
    'seconds': seconds,
    'tokens_per_s': num_out / seconds,
    'cpu_us_per_token': cpu_s / num_out * 1e6,
    'front_cpu_us_per_token': (cpu_s - engine_s) / num_out * 1e6,
    'front_cpu_us_per_message': (cpu_s - engine_s) / sum(messages) * 1e6,
  }


def compare(
  num_streams: int, num_tokens: int, step_s: float, stream_interval_ms: int
) -> dict[str, Any]:
  """Measures our front, and grpc.aio alone with a message a token."""
  ours = measure(num_streams, num_tokens, step_s, stream_interval_ms)
  floor = measure(num_streams, num_tokens, step_s, serve=serve_floor)
  us = floor['front_cpu_us_per_message']
  return {
    **ours,
    'grpc_cpu_us_per_message': us,
    'our_share': 1 - us / ours['front_cpu_us_per_message'],
  }


def compare_http(
  num_streams: int,
  num_tokens: int,
  step_s: float,
  stream_interval_ms: int,
  repeats: int,
) -> dict[str, Any]:
  """Measures HTTP and gRPC in turn; returns medians, and their ratio's."""
  pairs = []
  for _ in range(repeats):
    args = num_streams, num_tokens, step_s, stream_interval_ms
    grpc_us = measure(*args)['front_cpu_us_per_token']
    http = measure(*args, is_http=True)
    pairs.append((http['front_cpu_us_per_token'], grpc_us))
  return {
    'streams': num_streams,
    'http_us_per_token': statistics.median(us for us, _ in pairs),
    'grpc_us_per_token': statistics.median(us for _, us in pairs),
    'ratio': statistics.median(http / grpc for http, grpc in pairs),
    'pairs': pairs,
  }


def line(row: dict[str, Any]) -> str:
  """Returns a result of `compare_http` as a line for people."""
  return (
    f'{row["streams"]} streams: a token takes '
    f'{row["http_us_per_token"]:.0f} us of CPU over HTTP, '
    f'{row["grpc_us_per_token"]:.0f} over gRPC: {row["ratio"]:.2f} times'
  )


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
  """Makes a table of the results, for people."""
  shown = rich.table.Table(box=None, padding=(0, 2, 0, 0))
  columns = {
    'streams': 'streams',
    'tokens/s': 'tokens_per_s',
    'messages': 'messages',
    'us a token': 'front_cpu_us_per_token',
    'us a message': 'front_cpu_us_per_message',
    'of it grpc.aio': 'grpc_cpu_us_per_message',
  }
  for name in (*columns, 'ours'):
    shown.add_column(name, justify='right')
  for row in rows:
    shown.add_row(
      *(f'{row[key]:.0f}' for key in columns.values()),
      f'{row["our_share"]:.0%}',
    )
  return shown


def main() -> None:
  step_s = FLAGS.step_ms / 1e3
  rows = []
  if FLAGS.hostile:
    for row in measure_hostile(FLAGS.repeats, step_s, FLAGS.only):
      print(hostile.line(row), flush=True)  # a slow server shows where
      rows.append(row)
  elif FLAGS.http:
    for num_streams in FLAGS.streams:
      rows.append(
        compare_http(
          num_streams,
          FLAGS.tokens,
          step_s,
          FLAGS.stream_interval_ms,
          FLAGS.repeats,
        )
      )
      print(line(rows[-1]), flush=True)
  else:
    rows = [
      compare(num_streams, FLAGS.tokens, step_s, FLAGS.stream_interval_ms)
      for num_streams in FLAGS.streams
    ]
    rich.print(table(rows))
  common.write_json(
    FLAGS.json, 'server_front', FLAGS, rows, grpcio=grpc.__version__
  )


if __name__ == '__main__':
  flags.DEFINE_multi_integer(
    'streams',
    [128, 1000],
    'Number of streams open at once; each number given is measured.',
  )
  flags.DEFINE_integer('tokens', 100, 'Tokens of each stream.')
  flags.DEFINE_float('step_ms', 20.0, 'Time of each step, milliseconds.')
  flags.DEFINE_integer(
    'stream_interval_ms',
    0,
    "The server's flag of this "
    'name: the least milliseconds between two messages.',
  )
  flags.DEFINE_bool('http', False, "Compare OpenAI's HTTP with gRPC.")
  flags.DEFINE_bool(
    'hostile', False, "Measure what large bodies do to others' streams."
  )
  flags.DEFINE_string(
    'only',
    '',
    'With --hostile, send only bodies with this text in their names.',
  )
  flags.DEFINE_integer(
    'repeats',
    3,
    'With --hostile, how often to send each body; the least harm '
    'counts, as others may use the machine. With --http, how often to measure '
    'each of the two; medians count.',
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  mains.run(main)

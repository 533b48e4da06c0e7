# SPDX-License-Identifier: Apache-2.0
"""What streaming a token over gRPC costs the server's CPU, without a model.

  python -m sarathi_jax.benchmarks.server_front --streams=1000

The server runs in a process of its own, with a runner that counts up; the
clients run here. `cpu_us_per_token` is the CPU time of the whole server divided
by the tokens that it streamed; `front_cpu_us_per_token` leaves out the engine's
thread, which schedules.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from typing import Any

from absl import app
from absl import flags
import grpc

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.server import admission
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import server as server_lib

FLAGS = flags.FLAGS
_VOCAB = 1000


class PacedRunner(fake_runner.FakeRunner):
  """Takes some time for a step, as a device does."""

  def __init__(self, max_num_seqs: int, step_s: float) -> None:
    super().__init__(_VOCAB, max_num_seqs)
    self._step_s = step_s

  def fetch(self, pending: Any) -> Any:
    time.sleep(self._step_s)
    return super().fetch(pending)


def make_engine(max_num_seqs: int, step_s: float) -> engine_lib.Engine:
  """An engine without a model, with room for all."""
  config = config_lib.SchedulerConfig(
    token_budget=2 * max_num_seqs, max_num_seqs=max_num_seqs,
    max_model_len=4096, num_pages=max_num_seqs * 64, page_size=64)
  info = engine_lib.EngineInfo(
    model_name='counting', family='fake', vocab_size=_VOCAB,
    max_model_len=4096, eos_token_ids=(), policy='sarathi',
    token_budget=config.token_budget, max_num_seqs=max_num_seqs,
    num_pages=config.num_pages, page_size=64)
  return engine_lib.Engine(
    scheduler_lib.policy_class('sarathi')(config),
    PacedRunner(max_num_seqs, step_s), info=info)


def serve(pipe: Any, max_num_seqs: int, step_s: float,
          stream_interval_ms: int) -> None:
  """A server in this process; tells its port, then CPU times on request."""
  async def main() -> None:
    server = server_lib.Server(
      server_lib.ServerConfig(
        port=0, limits=admission.Limits(
          max_waiting=100_000, stream_interval_ms=stream_interval_ms)),
      lambda: make_engine(max_num_seqs, step_s))
    await server.start()
    await server.warm()
    pipe.send(server.port)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, pipe.recv):
      stats = await server.frontend.stats()
      engine_s = await server.frontend.engine_thread.call(
        lambda engine: time.thread_time())
      pipe.send((time.process_time(), engine_s, stats.num_generated,
                 stats.num_steps, stats.num_free_pages == stats.num_pages))
    await server.stop()

  asyncio.run(main())


async def drive(port: int, num_streams: int, num_tokens: int) -> list[int]:
  """Opens all streams at once; returns how many messages each got."""
  async def one(stub: Any, i: int) -> int:
    tokens, num_messages = [], 0
    async for response in stub.Generate(pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[i % _VOCAB]), sampling=pb.SamplingParams(
          max_tokens=num_tokens, ignore_eos=True))):
      tokens += response.token_ids
      num_messages += 1
    assert tokens == [(i + 1 + k) % _VOCAB for k in range(num_tokens)]
    return num_messages

  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
    return list(await asyncio.gather(
      *(one(stub, i) for i in range(num_streams))))


def measure(num_streams: int, num_tokens: int, step_s: float,
            stream_interval_ms: int = 0) -> dict[str, Any]:
  """Streams, and returns what it cost."""
  here, there = multiprocessing.get_context('spawn').Pipe()
  process = multiprocessing.get_context('spawn').Process(
    target=serve, args=(there, num_streams, step_s, stream_interval_ms))
  process.start()
  try:
    port = here.recv()

    def ask() -> Any:
      here.send(True)
      return here.recv()

    asyncio.run(drive(port, min(num_streams, 50), 20))  # warm
    cpu, engine_cpu, tokens, steps, _ = ask()
    start = time.monotonic()
    messages = asyncio.run(drive(port, num_streams, num_tokens))
    seconds = time.monotonic() - start
    cpu_after, engine_cpu_after, tokens_after, steps_after, is_clean = ask()
    here.send(False)
  finally:
    process.join(20)
    process.kill()
  assert is_clean, 'pages were leaked'
  num_tokens_out = tokens_after - tokens
  cpu_s, engine_s = cpu_after - cpu, engine_cpu_after - engine_cpu
  return {
    'streams': num_streams, 'tokens': num_tokens_out,
    'messages': sum(messages), 'steps': steps_after - steps,
    'seconds': seconds, 'tokens_per_s': num_tokens_out / seconds,
    'cpu_us_per_token': cpu_s / num_tokens_out * 1e6,
    'front_cpu_us_per_token': (cpu_s - engine_s) / num_tokens_out * 1e6,
    'step_ms': step_s * 1e3, 'stream_interval_ms': stream_interval_ms}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  result = measure(FLAGS.streams, FLAGS.tokens, FLAGS.step_ms / 1e3,
                   FLAGS.stream_interval_ms)
  print(json.dumps(result, indent=2))
  common.write_json(FLAGS.json, 'server_front', FLAGS, result,
                    grpcio=grpc.__version__)


if __name__ == '__main__':
  flags.DEFINE_integer('streams', 128, 'Streams open at once.')
  flags.DEFINE_integer('tokens', 100, 'Tokens a stream.')
  flags.DEFINE_float('step_ms', 20.0, 'What a step takes.')
  flags.DEFINE_integer('stream_interval_ms', 0, 'As the server\'s flag.')
  flags.DEFINE_string('json', None, 'A file for the result.')
  app.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Latencies and goodput of a running server, under an open load.

  python -m sarathi_jax.benchmarks.serve --target=localhost:50051 --qps=4
  python -m sarathi_jax.benchmarks.serve --http=http://localhost:8000 --qps=4

Requests arrive by a Poisson process, or when a trace says, whether or not
earlier ones are done. A trace has a line of JSON a request: arrival_s,
prompt_tokens, output_tokens. Goodput counts requests that met the limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
import dataclasses
import json
import math
import pathlib
import random
import time
from typing import Any
import urllib.parse

from absl import app
from absl import flags
import grpc
import rich.console
import rich.table

from sarathi_jax.benchmarks import common
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc

FLAGS = flags.FLAGS
_QUANTILES = (0.5, 0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Job:
  """A request to come: when, and how long; seconds and tokens."""

  arrival_s: float
  prompt_tokens: int
  output_tokens: int


@dataclasses.dataclass
class Outcome:
  """What became of it; times are seconds since it was sent.

  Attributes:
    error: '' if it was served.
    times: when each piece of output came.
    num_tokens: that came.
  """

  error: str = ''
  times: list[float] = dataclasses.field(default_factory=list)
  num_tokens: int = 0

  def meets(self, ttft_s: float, tbt_s: float) -> bool:
    """Whether it was served within limits."""
    return (not self.error and bool(self.times) and self.times[0] <= ttft_s
            and max(self.gaps(), default=0.0) <= tbt_s)

  def gaps(self) -> list[float]:
    return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def poisson(qps: float, num_requests: int, prompt_tokens: int,
            output_tokens: int, seed: int) -> list[Job]:
  """Arrivals at random, lengths between a half and one and a half of these."""
  rng = random.Random(seed)
  now, jobs = 0.0, []
  for _ in range(num_requests):
    now += rng.expovariate(qps)
    jobs.append(Job(now, *(
      max(1, round(n * rng.uniform(0.5, 1.5)))
      for n in (prompt_tokens, output_tokens))))
  return jobs


def read_trace(path: str) -> list[Job]:
  """The jobs of a file, see above."""
  return [Job(**json.loads(line))
          for line in pathlib.Path(path).read_text().splitlines() if line]


class GrpcTarget:
  """Asks a server by sarathi.v1."""

  def __init__(self, target: str) -> None:
    self._target = target
    self._vocab_size = 0

  async def start(self) -> None:
    self._channel = grpc.aio.insecure_channel(self._target)  # of this loop
    self._stub: Any = sarathi_pb2_grpc.SarathiStub(  # type: ignore[no-untyped-call]
      self._channel)
    info = await self._stub.GetModelInfo(pb.GetModelInfoRequest())
    self._vocab_size = info.vocab_size

  async def ask(self, job: Job, seed: int) -> AsyncIterator[int]:
    """Yields numbers of tokens as they come."""
    rng = random.Random(seed)
    async for response in self._stub.Generate(pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[
          rng.randrange(self._vocab_size) for _ in range(job.prompt_tokens)]),
        sampling=pb.SamplingParams(
          max_tokens=job.output_tokens, ignore_eos=True))):
      yield len(response.token_ids)

  async def stop(self) -> None:
    await self._channel.close()


class HttpTarget:
  """Asks a server by OpenAI's completions, streamed."""

  def __init__(self, url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    self._host = parts.hostname or 'localhost'
    self._port = parts.port or 80
    self._model = ''

  async def start(self) -> None:
    text = ''.join([line async for line in self._request('GET', '/v1/models')])
    self._model = json.loads(text)['data'][0]['id']

  async def ask(self, job: Job, seed: int) -> AsyncIterator[int]:
    """Yields 1 for each event with text; its tokens are not told."""
    rng = random.Random(seed)
    words = ' '.join(rng.choice(('a', 'the', 'of', 'list', 'function'))
                     for _ in range(job.prompt_tokens))
    body = {'model': self._model, 'prompt': words, 'stream': True,
            'max_tokens': job.output_tokens, 'ignore_eos': True}
    async for line in self._request('POST', '/v1/completions', body):
      data = line.removeprefix('data:').strip()
      if line.startswith('data:') and data != '[DONE]':
        event = json.loads(data)
        if 'error' in event:
          raise RuntimeError(event['error'])
        if event.get('choices') and event['choices'][0].get('text'):
          yield 1

  async def stop(self) -> None:
    """Connections end with their requests."""

  async def _request(self, method: str, path: str,
                     body: Any = None) -> AsyncIterator[str]:
    reader, writer = await asyncio.open_connection(self._host, self._port)
    try:
      data = b'' if body is None else json.dumps(body).encode()
      # HTTP/1.0: no chunks to put together.
      writer.write((
        f'{method} {path} HTTP/1.0\r\nHost: {self._host}\r\n'
        'Content-Type: application/json\r\n'
        f'Content-Length: {len(data)}\r\n\r\n').encode() + data)
      await writer.drain()
      status = (await reader.readline()).decode()
      while (await reader.readline()).strip():
        pass
      if ' 200 ' not in status:
        raise RuntimeError(
          f'{status.strip()}: {(await reader.read(500)).decode()}')
      while line := await reader.readline():
        yield line.decode()
    finally:
      writer.close()


async def run(target: GrpcTarget | HttpTarget,
              jobs: Sequence[Job]) -> tuple[list[Outcome], float]:
  """Sends all jobs at their times; returns what became of them, and how
  long it took, seconds."""
  await target.start()
  start = time.monotonic()

  async def one(i: int, job: Job) -> Outcome:
    await asyncio.sleep(max(start + job.arrival_s - time.monotonic(), 0))
    sent, outcome = time.monotonic(), Outcome()
    try:
      async for num_tokens in target.ask(job, i):
        outcome.times.append(time.monotonic() - sent)
        outcome.num_tokens += num_tokens
    except grpc.aio.AioRpcError as error:
      outcome.error = error.code().name
    except (OSError, RuntimeError) as error:
      outcome.error = str(error)
    return outcome

  try:
    outcomes = await asyncio.gather(
      *(one(i, job) for i, job in enumerate(jobs)))
    return list(outcomes), time.monotonic() - start
  finally:
    await target.stop()


def summarize(outcomes: Sequence[Outcome], seconds: float, *, ttft_s: float,
              tbt_s: float) -> dict[str, Any]:
  """Rates, percentiles (None without values) and goodput."""
  served = [o for o in outcomes if not o.error and o.times]
  values = {'ttft_s': [o.times[0] for o in served],
            'tbt_s': [gap for o in served for gap in o.gaps()],
            'e2e_s': [o.times[-1] for o in served]}
  summary: dict[str, Any] = {
    'requests': len(outcomes), 'seconds': seconds,
    'errors': sorted({o.error for o in outcomes if o.error}),
    'num_errors': len(outcomes) - len(served),
    'output_tokens_per_s': sum(o.num_tokens for o in served) / seconds,
    'requests_per_s': len(served) / seconds,
    'goodput_per_s': sum(o.meets(ttft_s, tbt_s) for o in outcomes) / seconds,
    'limits': {'ttft_s': ttft_s, 'tbt_s': tbt_s}}
  for name, numbers in values.items():
    quantiles = metrics_lib.Quantiles()
    quantiles.add(numbers)
    summary[name] = {
      f'p{q * 100:g}': quantiles.quantile(q) for q in _QUANTILES}
  return summary


def table(summary: dict[str, Any]) -> rich.table.Table:
  """The summary, for people."""
  shown = rich.table.Table(box=None, padding=(0, 2, 0, 0))
  for name in ('', *(f'P{q * 100:g}' for q in _QUANTILES)):
    shown.add_column(name, justify='right' if name else 'left')
  for name in ('ttft_s', 'tbt_s', 'e2e_s'):
    shown.add_row(name, *(
      '-' if v is None else f'{v:.4f}' for v in summary[name].values()))
  for name in ('output_tokens_per_s', 'requests_per_s', 'goodput_per_s'):
    shown.add_row(name, f'{summary[name]:.2f}')
  shown.add_row('errors', str(summary['num_errors']))
  return shown


def plot(outcomes: Sequence[Outcome]) -> str:
  """An SVG of the distributions of TTFT and TBT: their quantiles, log scale."""

  series = {'TTFT': sorted(o.times[0] for o in outcomes if o.times),
            'TBT': sorted(g for o in outcomes for g in o.gaps())}
  low, high = 1e-4, 1e2  # seconds

  def points(values: Sequence[float]) -> Iterator[str]:
    for i in range(101):
      value = values[round(i / 100 * (len(values) - 1))]
      part = math.log(min(max(value, low), high) / low) / math.log(high / low)
      yield f'{60 + 5 * i},{340 - 320 * part:.1f}'

  lines = ['<svg xmlns="http://www.w3.org/2000/svg" width="620" height="380" '
           'font-family="sans-serif" font-size="12">']
  for exponent in range(-4, 3):
    y = 340 - 320 * (exponent + 4) / 6
    lines.append(f'<line x1="60" x2="560" y1="{y}" y2="{y}" stroke="#ddd"/>'
                 f'<text x="5" y="{y + 4}">1e{exponent} s</text>')
  for i, (name, values) in enumerate(series.items()):
    if values:
      color = ('#1f77b4', '#d62728')[i]
      lines.append(
        f'<polyline fill="none" stroke="{color}" '
        f'points="{" ".join(points(values))}"/><text x="565" '
        f'y="{30 + 16 * i}" fill="{color}">{name}</text>')
  lines.append('<text x="60" y="365">P0</text><text x="540" y="365">P100'
               '</text></svg>')
  return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  jobs = read_trace(FLAGS.trace) if FLAGS.trace else poisson(
    FLAGS.qps, FLAGS.num_requests, FLAGS.prompt_tokens, FLAGS.output_tokens,
    FLAGS.seed)
  outcomes, seconds = asyncio.run(run(
    HttpTarget(FLAGS.http) if FLAGS.http else GrpcTarget(FLAGS.target), jobs))
  summary = summarize(outcomes, seconds, ttft_s=FLAGS.ttft_s,
                      tbt_s=FLAGS.tbt_s)
  rich.console.Console().print(table(summary))
  common.write_json(FLAGS.json, 'serve', FLAGS, summary)
  if FLAGS.plot:
    pathlib.Path(FLAGS.plot).write_text(plot(outcomes))


def define_flags() -> None:
  """Not done on import, which may find flags of these names."""
  flags.DEFINE_string('target', 'localhost:50051', 'The server, host:port.')
  flags.DEFINE_string('http', None, 'The OpenAI front in its place, a URL.')
  flags.DEFINE_float('qps', 1.0, 'Requests a second.', lower_bound=1e-6)
  flags.DEFINE_integer('num_requests', 100, 'Requests.')
  flags.DEFINE_integer('prompt_tokens', 200, 'Tokens of a prompt, mean.')
  flags.DEFINE_integer('output_tokens', 50, 'Tokens of an output, mean.')
  flags.DEFINE_integer('seed', 0, 'Of arrivals and lengths.')
  flags.DEFINE_string('trace', None, 'A file of arrivals and lengths.')
  flags.DEFINE_float('ttft_s', 1.0, 'Limit of goodput, seconds.')
  flags.DEFINE_float('tbt_s', 0.2, 'Limit of goodput, seconds.')
  flags.DEFINE_string('json', None, 'A file for the results.')
  flags.DEFINE_string('plot', None, 'A file for a plot, SVG.')


if __name__ == '__main__':
  define_flags()
  app.run(main)

# SPDX-License-Identifier: Apache-2.0
"""The capacity of a server that is running: an open-loop client over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import dataclasses
import math
import pathlib
import time
from typing import Any

import grpc
import rich.console
import rich.progress

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.simulator import capacity
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload as workload_lib

_SCHEME = 'grpc://'
_CONNECT_S = 10.0
_TOKEN = 1  # Any would do, as in the paper's artifact.


@dataclasses.dataclass(slots=True)
class _Seen:
  """What clients saw of one rate. Times are seconds.

  Gaps between tokens are those of interactive requests: the SLO is theirs.
  """

  tbt_s: metrics_lib.Quantiles = dataclasses.field(
    default_factory=metrics_lib.Quantiles)
  ttft_s: metrics_lib.Quantiles = dataclasses.field(
    default_factory=metrics_lib.Quantiles)
  delay_s: metrics_lib.Quantiles = dataclasses.field(
    default_factory=metrics_lib.Quantiles)


def address(target: str) -> str:
  """HOST:PORT of a target.

  Raises:
    ConfigError: it is not grpc://HOST:PORT.
  """
  host, colon, port = target.removeprefix(_SCHEME).rpartition(':')
  if not (target.startswith(_SCHEME) and host and colon and port.isdecimal()):
    raise errors.ConfigError(f'target={target!r}: must be grpc://HOST:PORT.')
  return f'{host}:{port}'


def search_target(
    console: rich.console.Console, target: str, slos: Sequence[search.Slo],
    config: workload_lib.WorkloadConfig, *, start_qps: float | None,
    precision: float,
) -> tuple[list[capacity.Row], list[search.Capacity]]:
  """Searches the capacity of the server at `target`, for each SLO.

  Raises:
    ConfigError: there is none, or it can't serve such requests.
  """
  client = Client(address(target))
  info = client.info()
  workload = workload_lib.make(config)
  longest = int((workload.prompt_lens + workload.output_lens).max())
  if longest > info.max_model_len:
    raise errors.ConfigError(
      f'workload: a request of {longest} tokens, prompt and output, exceeds '
      f'the server\'s max_model_len={info.max_model_len}; a --length_scale '
      f'below {info.max_model_len / longest:.3g} makes them shorter.')
  rows, found = [], []
  with rich.progress.Progress(console=console, transient=True) as progress:
    for slo in slos:
      task = progress.add_task(f'P99 TBT <= {slo.p99_tbt_s:g} s', total=None)

      def probe(rates: Sequence[float], slo: search.Slo = slo,
                task: Any = task) -> list[search.Point]:
        points = []
        for qps in rates:
          progress.update(task, description=f'Trying {qps:.3g} QPS')
          points.append(client.try_rate(workload.at_rate(qps), slo, qps))
          if slo.p99_tbt_s < (fastest := client.fastest_tbt_s or 0):
            raise errors.ConfigError(
              f'slo_tbt_p99={slo.p99_tbt_s:g}: no rate can meet it; the '
              f'fastest time between tokens seen here was {fastest:.4g} s.')
        return points

      rows.append(capacity.Row(
        scenario=None, config=info.model_name, policy=info.policy, slo=slo,
        workload=pathlib.Path(config.source).stem,
        token_budget=info.token_budget if info.policy == 'sarathi' else None))
      found.append(search.find(
        probe, start_qps or 1.0, precision=precision))
      progress.remove_task(task)
  return rows, found


class Client:
  """Sends workloads to a server of sarathi.v1.

  Args:
    target: HOST:PORT.

  Attributes:
    fastest_tbt_s: the least time between two tokens of a request that was
      alone; None before any was seen.
  """

  def __init__(self, target: str) -> None:
    self._target = target
    self.fastest_tbt_s: float | None = None

  def info(self) -> Any:
    """The server's GetModelInfoResponse; ConfigError if there is none."""
    with grpc.insecure_channel(self._target) as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      try:
        return stub.GetModelInfo(
          pb.GetModelInfoRequest(), timeout=_CONNECT_S, wait_for_ready=True)
      except grpc.RpcError as error:
        raise errors.ConfigError(
          f'target=\'{_SCHEME}{self._target}\': no server answers: '
          f'{error.details()}.') from error

  def try_rate(self, workload: workload_lib.Workload, slo: search.Slo,
               qps: float) -> search.Point:
    """Sends every request at its time and sees what comes back when.

    Ends early once the SLO is lost.
    """
    if self.fastest_tbt_s is None:
      self.fastest_tbt_s = asyncio.run(self._alone())
    seen, complete = asyncio.run(self._run(workload, slo))
    p99 = seen.tbt_s.quantile(0.99) or 0.0
    delay = seen.delay_s.quantile(0.5)
    delay = math.inf if delay is None else delay
    return search.Point(
      qps=qps, p99_tbt_s=p99, p50_ttft_s=seen.ttft_s.quantile(0.5) or math.inf,
      p50_scheduling_delay_s=delay,
      holds=complete and p99 <= slo.p99_tbt_s and delay <= slo.p50_delay_s)

  async def _alone(self) -> float:
    seen = _Seen()
    async with grpc.aio.insecure_channel(self._target) as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      await self._request(
        stub, time.monotonic(), 1, 32, types.TIERS[0], seen)
    return seen.tbt_s.quantile(0.1) or 0.0

  async def _run(self, workload: workload_lib.Workload,
                 slo: search.Slo) -> tuple[_Seen, bool]:
    seen = _Seen()
    num_gaps = int((workload.output_lens - 1)[~workload.is_batch].sum())
    async with grpc.aio.insecure_channel(self._target) as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      began = time.monotonic()

      async def send(i: int) -> None:
        at = began + float(workload.arrived_at[i])
        await asyncio.sleep(at - time.monotonic())
        await self._request(
          stub, at, int(workload.prompt_lens[i]),
          int(workload.output_lens[i]), workload.tier(i), seen)

      left = {asyncio.create_task(send(i)) for i in range(len(workload))}
      try:
        while left:
          done, left = await asyncio.wait(left, timeout=1.0)
          for task in done:
            task.result()
          of_seen = 1 - 0.01 * num_gaps / max(seen.tbt_s.count, 1)
          if of_seen > 0 and (
              seen.tbt_s.quantile(of_seen) or 0) > slo.p99_tbt_s * 1.01:
            return seen, False
      except grpc.RpcError as error:
        raise errors.ConfigError(
          f'target: the server refused a request: {error.details()}.'
        ) from error
      finally:
        for task in left:
          task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    return seen, True

  async def _request(self, stub: Any, arrived: float, prompt_len: int,
                     output_len: int, tier: str, seen: _Seen) -> None:
    call = stub.Generate(pb.GenerateRequest(
      tier=tier, token_ids=pb.TokenIds(ids=[_TOKEN] * prompt_len),
      sampling=pb.SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=output_len)))
    last: float | None = None
    async for response in call:
      now = time.monotonic()
      # Tokens that come together came with one step, or were held up.
      for _ in response.token_ids:
        if last is None:
          seen.ttft_s.add([now - arrived])
        elif tier == types.TIERS[0]:
          seen.tbt_s.add([now - last])
        last = now
      if response.HasField('finished'):
        timing = response.finished.timing
        if timing.HasField('scheduling_delay_s'):
          seen.delay_s.add([timing.scheduling_delay_s])

# SPDX-License-Identifier: Apache-2.0
"""Finds the capacity of a server that is running, by the open-loop client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import math
import pathlib
from typing import Any

import rich.console
import rich.progress

from sarathi_jax import errors
from sarathi_jax.simulator import capacity
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload as workload_lib

_SCHEME = 'grpc://'
_CONNECT_S = 10.0


def address(target: str) -> str:
  """Returns HOST:PORT of a target.

  Raises:
    ConfigError: the target is not grpc://HOST:PORT.
  """
  host, colon, port = target.removeprefix(_SCHEME).rpartition(':')
  if not (target.startswith(_SCHEME) and host and colon and port.isdecimal()):
    raise errors.ConfigError(f'target={target!r}: must be grpc://HOST:PORT.')
  return f'{host}:{port}'


def search_target(
  console: rich.console.Console,
  target: str,
  slos: Sequence[search.Slo],
  config: workload_lib.WorkloadConfig,
  *,
  start_qps: float | None,
  precision: float,
) -> tuple[list[capacity.Row], list[search.Capacity]]:
  """Searches the capacity of the server at `target`, for each SLO.

  Raises:
    ConfigError: there is no server, or it can't serve such requests.
  """
  client = Client(address(target))
  info = client.info
  workload = workload_lib.make(config)
  workload_lib.check_fits(workload, info.max_model_len)
  rows, found = [], []
  with rich.progress.Progress(console=console, transient=True) as progress:
    for slo in slos:
      task = progress.add_task(f'P99 TBT <= {slo.p99_tbt_s:g} s', total=None)

      def probe(
        rates: Sequence[float], slo: search.Slo = slo, task: Any = task
      ) -> list[search.Point]:
        points = []
        for qps in rates:
          progress.update(task, description=f'Trying {qps:.3g} QPS')
          points.append(client.try_rate(workload.at_rate(qps), slo, qps))
          if slo.p99_tbt_s < (fastest := client.fastest_tbt_s or 0):
            raise errors.ConfigError(
              f'slo_tbt_p99={slo.p99_tbt_s:g}: no rate can meet it; the '
              f'fastest time between tokens seen here was {fastest:.4g} s.'
            )
        return points

      rows.append(
        capacity.Row(
          scenario=None,
          config=info.model_name,
          policy=info.policy,
          slo=slo,
          workload=pathlib.Path(config.source).stem,
          token_budget=info.token_budget if info.policy == 'sarathi' else None,
        )
      )
      found.append(search.find(probe, start_qps or 1.0, precision=precision))
      progress.remove_task(task)
  return rows, found


class Client:
  """Tries rates on a server of sarathi.v1.

  Args:
    address: HOST:PORT.

  Attributes:
    info: what the server says about itself.
    fastest_tbt_s: the least time between two tokens of a request that was
      alone; None before any was seen.

  Raises:
    ConfigError: no server answers there.
  """

  def __init__(self, address: str) -> None:
    self._target = open_loop.GrpcTarget(address)
    self.fastest_tbt_s: float | None = None
    self._num_tried = 0
    try:
      self.info = self._target.info(_CONNECT_S)
    except open_loop.RequestError as error:
      raise errors.ConfigError(
        f"target='{_SCHEME}{address}': no server answers: {error}."
      ) from error

  def try_rate(
    self, workload: workload_lib.Workload, slo: search.Slo, qps: float
  ) -> search.Point:
    """Sends every request at its time and records what comes back when.

    Ends early once the SLO is lost.
    """
    if self.fastest_tbt_s is None:
      alone = asyncio.run(
        open_loop.run(self._target, [open_loop.Request(0.0, [1], 32)])
      )
      self.fastest_tbt_s = alone.tbt_s.quantile(0.1) or 0.0
    num_gaps = int((workload.output_lens - 1)[~workload.is_batch].sum())

    def is_lost(seen: open_loop.Seen) -> bool:
      return bool(seen.errors) or slo.is_lost(seen.tbt_s, num_gaps)

    self._num_tried += 1
    seen = asyncio.run(
      open_loop.run(
        self._target,
        open_loop.requests(workload, self.info.vocab_size, self._num_tried),
        stop_when=is_lost,
      )
    )
    if seen.errors:
      raise errors.ConfigError(
        f'target: the server refused a request: {seen.errors[0]}.'
      )
    p99 = seen.tbt_s.quantile(0.99) or 0.0
    ttft, delay = (
      math.inf if value is None else value
      for value in (
        seen.quantiles(name).quantile(0.5)
        for name in ('ttft_s', 'scheduling_delay_s')
      )
    )
    return search.Point(
      qps=qps,
      p99_tbt_s=p99,
      p50_ttft_s=ttft,
      p50_scheduling_delay_s=delay,
      holds=not seen.is_stopped
      and p99 <= slo.p99_tbt_s
      and delay <= slo.p50_delay_s,
    )

# SPDX-License-Identifier: Apache-2.0
"""What a running server does, live in a terminal.

  python -m sarathi_jax.top --target=localhost:50051

Load, use of the token budget, times between tokens, the KV cache, and a bar
for each request. Needs sarathi.v1.Control for the latter.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from absl import flags
import grpc
import rich.console
import rich.live
import rich.panel
import rich.progress_bar
import rich.table
import rich.text

from sarathi_jax.cli import mains
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc

FLAGS = flags.FLAGS
_MAX_ROWS = 30
_WIDE = 76  # Columns that everything fits in.


def define_flags() -> None:
  """Defines the flags; not on import, as their names may be taken."""
  flags.DEFINE_string(
    'target', 'localhost:50051', 'Server to watch, HOST:PORT.'
  )
  flags.DEFINE_string(
    'token', None, 'Bearer token of an administrator, if the server asks.'
  )
  flags.DEFINE_float(
    'interval_s', 0.5, 'Seconds between two updates.', lower_bound=0.05
  )
  flags.DEFINE_integer(
    'count', None, 'Stop after this many updates. Default: go on until Ctrl-C.'
  )


@dataclasses.dataclass(frozen=True)
class Look:
  """What a server reported at one moment."""

  time: float
  info: pb.GetModelInfoResponse
  stats: pb.GetStatsResponse
  requests: tuple[pb.RequestState, ...] | None  # None: not allowed


def look(channel: grpc.Channel, token: str | None) -> Look:
  """Asks a server; RpcError if it does not answer."""
  metadata = [('authorization', f'Bearer {token}')] if token else []
  stub: Any = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
  control: Any = sarathi_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
  options: Any = {'metadata': metadata, 'timeout': 10}
  info = stub.GetModelInfo(pb.GetModelInfoRequest(), **options)
  stats = stub.GetStats(pb.GetStatsRequest(), **options)
  requests = None
  try:
    requests = tuple(
      control.ListRequests(pb.ListRequestsRequest(), **options).requests
    )
  except grpc.RpcError as error:
    if error.code() not in (
      grpc.StatusCode.UNIMPLEMENTED,
      grpc.StatusCode.PERMISSION_DENIED,
    ):
      raise
  return Look(time.monotonic(), info, stats, requests)


def render(
  now: Look, before: Look | None, width: int = _WIDE
) -> rich.console.Group:
  """Draws what a server does; rates are since `before`.

  Args:
    now, before: looks; `before` is None for the first one.
    width: columns of the terminal. Where they are few, bars and clients are
      left out, and tables stand below each other rather than side by side.
  """
  is_wide = width >= _WIDE
  stats, info = now.stats, now.info
  seconds = now.time - before.time if before else 0.0

  def rate(field: str) -> str:
    if before is None or seconds <= 0:
      return '-'
    gained = getattr(stats, field) - getattr(before.stats, field)
    return f'{gained / seconds:,.0f}/s'

  grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
  used = stats.num_pages - stats.num_free_pages
  for name, part, text in (
    (
      'token budget',
      stats.last_step_tokens / max(stats.token_budget, 1),
      f'{stats.last_step_tokens} of {stats.token_budget} in the last step',
    ),
    (
      'KV cache',
      used / max(stats.num_pages, 1),
      f'{used * info.page_size:,} of '
      f'{stats.num_pages * info.page_size:,} tokens',
    ),
    (
      'running',
      stats.num_running / max(info.max_num_seqs, 1),
      f'{stats.num_running} of {info.max_num_seqs}, '
      f'{stats.num_waiting} waiting',
    ),
  ):
    grid.add_row(name, *[_bar(part)] * is_wide, text)
  numbers = rich.table.Table.grid(padding=(0, 2, 0, 0))
  rows = (
    (
      'TTFT',
      f'P50 {_ms(stats, "ttft_p50_s")}  P99 {_ms(stats, "ttft_p99_s")}',
      'prompts',
      rate('num_prefilled'),
    ),
    (
      'TBT',
      f'P50 {_ms(stats, "tbt_p50_s")}  P99 {_ms(stats, "tbt_p99_s")}',
      'output',
      rate('num_generated'),
    ),
    (
      'decode stalls',
      f'{stats.decode_stall_s:.3f} s',
      'steps',
      rate('num_steps'),
    ),
    (
      'padding',
      f'{stats.padding_waste:.1%}',
      'preemptions',
      f'{stats.num_preemptions:,}',
    ),
  )
  for left_and_right in rows:
    if is_wide:
      numbers.add_row(*left_and_right)
    else:
      numbers.add_row(*left_and_right[:2])
      numbers.add_row(*left_and_right[2:])
  state = ' · paused' if stats.is_paused else ''
  parts: list[Any] = [
    rich.panel.Panel(
      rich.console.Group(grid, '', numbers),
      title=f'{info.model_name} · {info.policy} · up {stats.uptime_s:,.0f} s'
      f'{state}',
    )
  ]
  if now.requests is None:
    parts.append(
      rich.text.Text(
        'Requests are shown to administrators: --token.', style='dim'
      )
    )
  else:
    parts.append(_requests(now.requests, is_wide))
  return rich.console.Group(*parts)


def _requests(
  requests: tuple[pb.RequestState, ...], is_wide: bool
) -> rich.table.Table:
  table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
  names = ('request', 'client', 'phase', 'prompt', 'output', '', 'age')
  shown = names if is_wide else ('request', 'phase', 'output', 'age')
  for name in shown:
    table.add_column(name, no_wrap=True)
  for r in requests[:_MAX_ROWS]:
    is_prefilling = r.num_output_tokens == 0
    phase = (
      'waiting'
      if not r.is_running
      else 'prefill'
      if is_prefilling
      else 'decode'
    )
    part = (
      r.num_computed / max(r.num_prompt_tokens, 1)
      if is_prefilling
      else r.num_output_tokens / max(r.max_output_tokens, 1)
    )
    cells: tuple[Any, ...] = (
      f'{r.request_id[-16:]}{f"/{r.index}" if r.index else ""}',
      r.client[-16:],
      phase,
      f'{r.num_prompt_tokens:,}',
      f'{r.num_output_tokens:,}',
      _bar(part),
      f'{r.age_s:.1f} s',
    )
    table.add_row(
      *(cell for name, cell in zip(names, cells, strict=True) if name in shown)
    )
  if len(requests) > _MAX_ROWS:
    table.add_row(f'and {len(requests) - _MAX_ROWS:,} more')
  return table


def _bar(part: float) -> rich.progress_bar.ProgressBar:
  return rich.progress_bar.ProgressBar(
    total=1.0, completed=min(part, 1.0), width=24
  )


def _ms(stats: pb.GetStatsResponse, field: str) -> str:
  if not stats.HasField(field):
    return '-'
  return f'{getattr(stats, field) * 1e3:.1f} ms'


def main() -> None:
  left, before = FLAGS.count, None
  try:
    with (
      grpc.insecure_channel(FLAGS.target) as channel,
      rich.live.Live(auto_refresh=False, screen=FLAGS.count is None) as live,
    ):
      while left is None or left > 0:
        now = look(channel, FLAGS.token)
        live.update(render(now, before, live.console.width), refresh=True)
        before = now
        left = left and left - 1
        if left != 0:
          time.sleep(FLAGS.interval_s)
  except KeyboardInterrupt:
    return
  except grpc.RpcError as error:
    print(f'error: {FLAGS.target}: {error.details()}', file=sys.stderr)
    sys.exit(1)


def run() -> None:
  mains.run(main, define_flags)


if __name__ == '__main__':
  run()

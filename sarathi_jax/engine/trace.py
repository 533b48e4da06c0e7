# SPDX-License-Identifier: Apache-2.0
"""Writes steps and requests as events of a Chrome trace (ui.perfetto.dev).

One track has the steps. Each request has a row of its own, with the spans
queued, prefill and decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sarathi_jax import types
from sarathi_jax.scheduler import sequence

Event = Mapping[str, Any]  # of the Trace Event Format
_STEPS, _REQUESTS = 1, 2  # process ids, which Perfetto shows as groups

HEADER: tuple[Event, ...] = tuple(
  {'ph': 'M', 'name': 'process_name', 'pid': pid, 'args': {'name': name}}
  for pid, name in ((_STEPS, 'steps'), (_REQUESTS, 'requests'))
)


class ChromeTrace:
  """A `state.Observer` that makes events of a Chrome trace.

  Args:
    emit: called with each event, on the engine's thread.
  """

  def __init__(self, emit: Callable[[Event], None]) -> None:
    self._emit = emit

  def on_step(
    self,
    batch: types.ScheduledBatch,
    num_rows: int,
    launched: float,
    started: float,
    completed: float,
  ) -> None:
    num_decodes = sum(not chunk.is_prefill for chunk in batch.chunks)
    self._emit(
      {
        'ph': 'X',
        'pid': _STEPS,
        'tid': 1,
        'cat': 'step',
        'name': f'{num_decodes} decodes + {batch.num_tokens - num_decodes}',
        'ts': started * 1e6,
        'dur': (completed - started) * 1e6,
        'args': {
          'step': batch.step,
          'rows': num_rows,
          'tokens': batch.num_tokens,
          'decodes': num_decodes,
          'launched_us_before': ((started - launched) * 1e6),
          'prefills': {
            c.request_id: [c.start, c.start + c.num_tokens]
            for c in batch.chunks
            if c.is_prefill
          },
          'preempted': list(batch.preempted),
        },
      }
    )

  def on_finished(
    self,
    seq: sequence.Sequence,
    metrics: types.RequestMetrics,
    reason: types.FinishReason,
    now: float,
  ) -> None:
    request = seq.request
    arrival = now - metrics.e2e_s
    begin = arrival + (metrics.scheduling_delay_s or 0.0)
    first = arrival + (metrics.ttft_s or metrics.e2e_s)
    of_several = f' {seq.index}' if request.sampling.n > 1 else ''
    args = {
      'prompt_tokens': metrics.num_prompt_tokens,
      'output_tokens': metrics.num_output_tokens,
      'preemptions': metrics.num_preemptions,
      'finish_reason': reason.value,
      'client': request.client,
    }
    for name, start, stop in (
      (f'{request.request_id}{of_several}', arrival, now),
      ('queued', arrival, begin),
      ('prefill', begin, first),
      ('decode', first, now),
    ):
      common = {
        'pid': _REQUESTS,
        'tid': 1,
        'cat': 'request',
        'name': name,
        'id': seq.key,
      }
      self._emit({**common, 'ph': 'b', 'ts': start * 1e6, 'args': args})
      self._emit({**common, 'ph': 'e', 'ts': stop * 1e6})

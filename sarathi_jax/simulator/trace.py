# SPDX-License-Identifier: Apache-2.0
"""Writes a Chrome trace of a run, for chrome://tracing or ui.perfetto.dev.

It has a row for each pipeline stage, and in it a span for each batch that the
stage computed, named for what is in it. The gaps between spans are the
pipeline's bubbles.
"""

from __future__ import annotations

from collections.abc import Iterator
import gzip
import json
from typing import Any

from sarathi_jax.simulator import runner


class ChromeTrace:
  """Collects spans; give `add` to `simulate`.

  Args:
    most_s: seconds after the first span beyond which spans are left out.
  """

  def __init__(self, most_s: float = 120.0) -> None:
    self._most_s = most_s
    self._spans: list[runner.Span] = []

  def add(self, span: runner.Span) -> None:
    """Adds a span, what a stage did."""
    if not self._spans or span.start < self._spans[0].start + self._most_s:
      self._spans.append(span)

  def write(self, path: str) -> None:
    """Writes the trace as JSON, compressed if the path ends with .gz."""
    opened = gzip.open if path.endswith('.gz') else open
    with opened(path, 'wt', encoding='utf-8') as file:
      json.dump(
        {'traceEvents': list(self._events()), 'displayTimeUnit': 'ms'}, file
      )

  def _events(self) -> Iterator[dict[str, Any]]:
    stages = sorted({span.stage for span in self._spans})
    for stage in stages:
      yield {
        'name': 'thread_name',
        'ph': 'M',
        'pid': 0,
        'tid': stage,
        'args': {'name': f'stage {stage}'},
      }
    for stage, start, end, batch in self._spans:
      chunks = [c.num_tokens for c in batch.chunks if c.is_prefill]
      num_decodes = len(batch.chunks) - len(chunks)
      yield {
        'name': _kind(num_decodes, chunks),
        'cat': 'step',
        'ph': 'X',
        'pid': 0,
        'tid': stage,
        'ts': start * 1e6,
        'dur': (end - start) * 1e6,
        'args': {
          'step': batch.step,
          'num_tokens': batch.num_tokens,
          'num_decodes': num_decodes,
          'chunks': chunks,
          'preempted': list(batch.preempted),
        },
      }


def _kind(num_decodes: int, chunks: list[int]) -> str:
  if not chunks:
    return 'decode'
  return 'hybrid' if num_decodes else 'prefill'

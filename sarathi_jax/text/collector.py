# SPDX-License-Identifier: Apache-2.0
"""Puts the deltas of one request together."""

from __future__ import annotations

from sarathi_jax import types


class Collector:
  """Collects one request's deltas until it is complete."""

  def __init__(self, request: types.Request) -> None:
    self._request = request
    self._deltas: list[list[types.OutputDelta]] = [
      [] for _ in range(request.sampling.n)
    ]

  def add(self, delta: types.OutputDelta) -> list[types.Completion]:
    """Takes in a delta; returns the outputs with the last one, else none."""
    self._deltas[delta.output_index].append(delta)
    if not delta.ends_request:
      return []
    return [self._completion(deltas) for deltas in self._deltas]

  def _completion(self, deltas: list[types.OutputDelta]) -> types.Completion:
    last = deltas[-1]
    assert last.finish_reason is not None and last.metrics is not None
    return types.Completion(
      request_id=last.request_id,
      prompt_token_ids=self._request.prompt_token_ids,
      token_ids=tuple(t for d in deltas for t in d.token_ids),
      logprobs=tuple(p for d in deltas for p in d.logprobs),
      text=''.join(d.text for d in deltas),
      finish_reason=last.finish_reason,
      stop_reason=last.stop_reason,
      metrics=last.metrics,
      told=tuple(t for d in deltas for t in d.told),
      prompt_logprobs=deltas[0].prompt_logprobs,
      index=last.output_index,
      versions=types.versions_of(deltas),
    )

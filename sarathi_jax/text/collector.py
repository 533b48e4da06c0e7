# SPDX-License-Identifier: Apache-2.0
"""Puts the deltas of one request together."""

from __future__ import annotations

from sarathi_jax import types


class Collector:
  """Collects one request's deltas until it is complete."""

  def __init__(self, request: types.Request) -> None:
    self._request = request
    self._deltas: list[types.OutputDelta] = []

  def add(self, delta: types.OutputDelta) -> types.Completion | None:
    """Takes in a delta; returns the completion with the last one, else None."""
    self._deltas.append(delta)
    if delta.finish_reason is None:
      return None
    assert delta.metrics is not None
    return types.Completion(
      request_id=delta.request_id,
      prompt_token_ids=self._request.prompt_token_ids,
      token_ids=tuple(t for d in self._deltas for t in d.token_ids),
      logprobs=tuple(p for d in self._deltas for p in d.logprobs),
      text=''.join(d.text for d in self._deltas),
      finish_reason=delta.finish_reason,
      stop_reason=delta.stop_reason,
      metrics=delta.metrics,
      told=tuple(t for d in self._deltas for t in d.told),
      prompt_logprobs=self._deltas[0].prompt_logprobs,
    )

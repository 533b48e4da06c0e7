# SPDX-License-Identifier: Apache-2.0
"""Clients are told by which weights tokens were sampled."""

from __future__ import annotations

from typing import Any

from sarathi_jax import types
from sarathi_jax.server.queue import outbox
from tests.server import http_test

Span = types.VersionSpan


def test_tokens_have_the_version_of_the_weights(stepped: Any) -> None:
  """None of the first; over HTTP where token ids are asked for."""
  running, runner, client = stepped()
  runner.open()
  thread = running.server.frontend.engine_thread
  for version in (0, 5, 9):
    if version:
      running.run(thread.call(lambda engine, v=version: engine.new_weights(v)))
    spans = [
      (span.version, span.num_tokens)
      for response in running.generate(
        token_ids=[1, 2], sampling={'max_tokens': 4}
      )
      for span in response.versions
    ]
    assert sum(num for _, num in spans) == (4 if version else 0)
    assert {v for v, _ in spans} == ({version} if version else set())
    for path, body in http_test.BODIES.values():
      asked = {**body, 'return_token_ids': True}
      _, whole = client.json(path, asked)
      (choice,) = whole['choices']
      told = [{'version': version, 'num_tokens': 4}] if version else None
      assert choice.get('weight_versions') == told
      events = client.events(path, asked)
      assert version * 4 == sum(
        span['version'] * span['num_tokens']
        for event in events
        for span in event['choices'][0].get('weight_versions', ())
      )
      _, whole = client.json(path, body)
      assert 'weight_versions' not in whole['choices'][0]


def delta(*tokens: int, version: int = 0, **fields: Any) -> types.OutputDelta:
  made = types.OutputDelta('x', '', tokens, (0.0,) * len(tokens), **fields)
  return made.with_version(version) if version else made


def test_what_is_merged_tells_whose_each_part_is() -> None:
  deltas = [delta(1), delta(2, 3), delta(4, version=2), delta(5, 6, version=2)]
  assert outbox.merge(deltas[:2]).versions == ()
  whole = outbox.merge(deltas)
  assert whole.versions == (Span(0, 3), Span(2, 3))
  aborted = delta(finish_reason=types.FinishReason.ABORT)
  assert outbox.merge([whole, delta(7, version=3), aborted]).versions == (
    Span(0, 3),
    Span(2, 3),
    Span(3, 1),
  )
  assert types.versions_of([aborted]) == ()

# SPDX-License-Identifier: Apache-2.0
"""Engines without a model, on a clock that moves one second a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.text import tokenizer as tokenizer_lib

VOCAB_SIZE = 100


class Clock:
  """Seconds that pass only when told."""

  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


class ScriptRunner(fake_runner.FakeRunner):
  """Each output is written in advance.

  Args:
    script: the key of a request, or of one of its outputs -> its tokens. Past
      their end, 0 is sampled.
  """

  def __init__(self, script: Mapping[str, Sequence[int]]) -> None:
    super().__init__(VOCAB_SIZE, 16)
    self._script = script

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    tokens = []
    for chunk in batch.samplers:
      output = self._script[chunk.request_id]
      i = chunk.start + chunk.num_tokens - chunk.prompt_len
      if chunk.samples:
        tokens.append(output[i] if i < len(output) else 0)
    return types.Sampled.of(batch.samplers, tokens, [-float(t) for t in tokens])


def make_engine(
  policy: str = 'sarathi',
  *,
  runner: engine_lib.Runner | None = None,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  clock: Clock | None = None,
  vocab_size: int = VOCAB_SIZE,
  **fields: Any,
) -> engine_lib.Engine:
  """An engine that counts up, unless a runner says otherwise.

  Args:
    policy: of its scheduler.
    runner: FakeRunner by default.
    tokenizer: None for none.
    clock: one of its own by default.
    vocab_size: of the model.
    fields: of SchedulerConfig, where they differ from the defaults here.
  """
  config = config_lib.SchedulerConfig(
    **(
      dict(
        token_budget=8,
        max_num_seqs=4,
        max_model_len=32,
        num_pages=64,
        page_size=4,
        look_ahead=False,
      )
      | fields
    )
  )
  info = engine_lib.EngineInfo.of(config, policy=policy, vocab_size=vocab_size)
  return engine_lib.Engine(
    scheduler_lib.policy_class(policy)(config),
    runner or fake_runner.FakeRunner(vocab_size, config.max_num_seqs),
    info=info,
    tokenizer=tokenizer,
    clock=clock or Clock(),
  )


def make_request(
  request_id: str,
  prompt: Sequence[int],
  max_tokens: int | None = None,
  arrival_time: float = 0.0,
  **sampling: Any,
) -> types.Request:
  return types.Request(
    request_id=request_id,
    prompt_token_ids=tuple(prompt),
    sampling=types.SamplingParams(max_tokens=max_tokens, **sampling),
    arrival_time=arrival_time,
  )


def step(engine: engine_lib.Engine) -> list[types.OutputDelta]:
  """One step, which takes a second."""
  assert isinstance(engine.clock, Clock)
  deltas = engine.step()
  engine.clock.now += 1.0
  return deltas


def finish(
  engine: engine_lib.Engine,
  deltas: Sequence[types.OutputDelta] = (),
) -> dict[str, list[types.OutputDelta]]:
  """Runs to the end; all deltas by request, after those given."""
  found: dict[str, list[types.OutputDelta]] = {}
  for delta in deltas:
    found.setdefault(delta.request_id, []).append(delta)
  num_steps = 0
  while engine.has_work:
    for delta in step(engine):
      found.setdefault(delta.request_id, []).append(delta)
    num_steps += 1
    assert num_steps < 10_000, engine.stats()
  assert engine.stats().num_free_pages == engine.stats().num_pages
  return found


def tokens_of(deltas: Sequence[types.OutputDelta]) -> list[int]:
  return [t for d in deltas for t in d.token_ids]


def text_of(deltas: Sequence[types.OutputDelta]) -> str:
  return ''.join(d.text for d in deltas)

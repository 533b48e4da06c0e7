# SPDX-License-Identifier: Apache-2.0
"""A real engine, a step of which fails: the others get the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from tests import tiny


def _run(engine: Any, fail_at: int | None) -> tuple[dict[str, list[int]], Any]:
  """Steps to the end; the fetch of one step raises, and loses the cache."""
  for i in range(6):  # two more than run at once
    engine.add(
      types.Request(
        request_id=str(i),
        prompt_token_ids=tuple(range(1 + i, 6 + 2 * i)),
        sampling=types.SamplingParams(max_tokens=8, temperature=1.0, seed=i),
      )
    )
  tokens: dict[str, list[int]] = {str(i): [] for i in range(6)}
  failed: list[str] = []
  runner, num_fetched = engine._runner, 0
  fetch = runner.fetch

  def fetch_or_fail(pending: Any) -> Any:
    nonlocal num_fetched
    num_fetched += 1
    if num_fetched == fail_at:
      raise RuntimeError('a step failed')
    return fetch(pending)

  runner.fetch = fetch_or_fail
  try:
    while engine.has_work:
      try:
        deltas = engine.step()
      except RuntimeError as fault:
        failed = engine.recover(fault)
        continue
      for delta in deltas:
        tokens[delta.request_id] += delta.token_ids
  finally:
    runner.fetch = fetch
  return tokens, failed


@pytest.fixture(scope='module')
def llm() -> llm_lib.LLM:
  return llm_lib.LLM(
    tiny.MODEL,
    tiny.make_params(),
    config=tiny.engine_config(),
    eos_token_ids=(),
  )


@pytest.mark.parametrize('fail_at', [1, 4, 9])
def test_a_step_that_fails(llm: llm_lib.LLM, fail_at: int) -> None:
  engine = llm.engine
  expected, failed = _run(engine, None)
  assert not failed and all(len(t) == 8 for t in expected.values())
  got, failed = _run(engine, fail_at)
  assert 0 < len(failed) < 6
  for name, tokens in got.items():
    if name in failed:
      assert tokens == expected[name][: len(tokens)]
    else:
      assert tokens == expected[name]
  stats = engine.stats()
  assert stats.num_free_pages == stats.num_pages
  assert _run(engine, None) == (expected, [])


def test_weights_that_are_lost_end_the_engine(llm: llm_lib.LLM) -> None:
  for leaf in llm._runner._leaves:
    leaf.delete()
  with pytest.raises(Exception, match='weights were lost'):
    llm._runner.recover()

# SPDX-License-Identifier: Apache-2.0
"""What a good request gets. The token after t is t + 1, its text 't{t + 1}'."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
import uuid

import pytest

from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake


def _tokens(responses: list[pb.GenerateResponse]) -> list[int]:
  return [t for r in responses for t in r.token_ids]


def _text(responses: list[pb.GenerateResponse]) -> str:
  return ''.join(r.text for r in responses)


def test_streams_tokens_and_finishes_once(server: fake.RunningServer) -> None:
  responses = list(
    server.generate(
      token_ids=[1, 2, 3], request_id='a', sampling={'max_tokens': 4}
    )
  )
  assert _tokens(responses) == [4, 5, 6, 7]
  assert all(len(r.logprobs) == len(r.token_ids) for r in responses)
  assert all(r.request_id == 'a' for r in responses)
  assert [r.HasField('finished') for r in responses] == (
    [False] * (len(responses) - 1) + [True]
  )


def test_the_end_tells_reason_usage_and_times(
  server: fake.RunningServer,
) -> None:
  finished = list(
    server.generate(token_ids=[1, 2, 3], sampling={'max_tokens': 4})
  )[-1].finished
  assert finished.finish_reason == pb.FINISH_REASON_LENGTH
  assert finished.WhichOneof('stop_reason') is None
  usage = finished.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
  timing = finished.timing
  assert 0 <= timing.scheduling_delay_s <= timing.ttft_s <= timing.e2e_s
  assert 0 <= timing.tpot_s <= timing.max_tbt_s <= timing.e2e_s
  assert timing.num_preemptions == 0


def test_a_time_that_does_not_exist_is_unset(
  server: fake.RunningServer,
) -> None:
  timing = list(server.generate(token_ids=[1], sampling={'max_tokens': 1}))[
    -1
  ].finished.timing
  assert timing.HasField('ttft_s') and not timing.HasField('tpot_s')


def test_text_in_text_out(server: fake.RunningServer) -> None:
  responses = list(server.generate(text='t7 t8', sampling={'max_tokens': 3}))
  assert _text(responses).split() == ['t9', 't10', 't11']
  assert responses[-1].finished.usage.prompt_tokens == 2


def test_unset_fields_take_our_defaults(server: fake.RunningServer) -> None:
  responses = list(server.generate(token_ids=[1]))
  assert len(_tokens(responses)) == 16  # SamplingParams.max_tokens
  assert uuid.UUID(responses[0].request_id)


def test_fill_context_generates_to_the_end_of_the_context(
  server: fake.RunningServer,
) -> None:
  responses = list(
    server.generate(
      token_ids=[1], sampling={'fill_context': True, 'ignore_eos': True}
    )
  )
  assert len(_tokens(responses)) == 127
  assert responses[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH


def test_a_stop_string_ends_the_text_before_it(
  server: fake.RunningServer,
) -> None:
  responses = list(
    server.generate(text='t1', sampling={'max_tokens': 50, 'stop': ['t5']})
  )
  assert _text(responses).split() == ['t2', 't3', 't4']
  finished = responses[-1].finished
  assert finished.finish_reason == pb.FINISH_REASON_STOP
  assert finished.stop_string == 't5'
  assert finished.usage.completion_tokens == 4


def test_a_stop_string_can_be_kept(server: fake.RunningServer) -> None:
  responses = list(
    server.generate(
      text='t1',
      sampling={
        'max_tokens': 50,
        'stop': ['t5'],
        'include_stop_str_in_output': True,
      },
    )
  )
  assert _text(responses).split() == ['t2', 't3', 't4', 't5']


def test_a_stop_token_is_named(server: fake.RunningServer) -> None:
  responses = list(
    server.generate(
      token_ids=[1], sampling={'max_tokens': 50, 'stop_token_ids': [4, 9]}
    )
  )
  assert _tokens(responses) == [2, 3, 4]
  assert responses[-1].finished.WhichOneof('stop_reason') == 'stop_token_id'
  assert responses[-1].finished.stop_token_id == 4


@pytest.mark.parametrize('ignore_eos, num_tokens', [(False, 3), (True, 9)])
def test_the_end_of_sequence(
  server: fake.RunningServer, ignore_eos: bool, num_tokens: int
) -> None:
  responses = list(
    server.generate(
      token_ids=[57], sampling={'max_tokens': 9, 'ignore_eos': ignore_eos}
    )
  )
  assert len(_tokens(responses)) == num_tokens
  assert responses[-1].finished.WhichOneof('stop_reason') is None


def test_a_long_prompt_is_prepared_off_the_event_loop(
  server: fake.RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
  import threading

  threads = []
  encode = server.engine.tokenizer.encode

  def spy(text: str, check: Any) -> tuple[int, ...]:
    threads.append(threading.current_thread())
    return encode(text, check=check)

  monkeypatch.setattr(server.engine.tokenizer, 'encode', spy)
  for text in ('t1', 't1' + ' ' * 2000 + 't2'):
    assert list(server.generate(text=text))
  assert threads[0] is server._thread and threads[1] is not server._thread


def test_many_at_once_do_not_mix(server: fake.RunningServer) -> None:
  calls = [
    server.generate(
      token_ids=[i % 50] * (1 + i % 7), sampling={'max_tokens': 9}
    )
    for i in range(60)
  ]
  for i, call in enumerate(calls):
    assert _tokens(list(call)) == [i % 50 + k for k in range(1, 10)]
  assert server.all_pages_are_free()


def test_model_info_and_stats(server: fake.RunningServer) -> None:
  info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
  assert info.model_name == 'counting' and info.has_tokenizer
  assert (info.vocab_size, info.max_model_len) == (64, 128)
  assert list(info.eos_token_ids) == [60]
  stats = server.stats()
  assert (stats.num_pages, stats.num_free_pages) == (64, 64)


def test_a_recommendation_beyond_32_bits_is_told_as_the_largest() -> None:
  recommended = {'top_k': 2**40, 'temperature': 0.5}
  make = functools.partial(fake.make_engine, default_sampling=recommended)
  with contextlib.closing(fake.RunningServer(make)) as running:
    info = running.stub.GetModelInfo(pb.GetModelInfoRequest())
  assert info.default_sampling == pb.SamplingParams(
    top_k=2**31 - 1, temperature=0.5
  )

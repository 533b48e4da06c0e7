# SPDX-License-Identifier: Apache-2.0
"""Requests that end early, have a used id, or are refused."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests.engine import harness
from tests.server import fake

finish, make_engine = harness.finish, harness.make_engine
request, step = harness.make_request, harness.step
tokens_of = harness.tokens_of


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('num_steps', range(7))
def test_an_abort_at_any_moment_frees_the_pages(
  num_steps: int, look_ahead: bool
) -> None:
  """Waiting, between chunks of its prefill, at each decode."""
  engine = make_engine(look_ahead=look_ahead)
  engine.add(request('other', [50, 51], 9))
  engine.add(request('a', range(20), 5))
  deltas = [d for _ in range(num_steps) for d in step(engine)]
  assert engine.abort('a')
  computed = 2 + (num_steps - 1) + look_ahead if num_steps else 0
  assert engine.stats().num_free_pages == 64 - math.ceil(computed / 4)
  assert not engine.abort('a')
  rest = finish(engine)
  assert 'a' not in rest  # No delta follows.
  others = [d for d in deltas if d.request_id == 'other'] + rest['other']
  assert tokens_of(others) == list(range(52, 61))
  assert engine.metrics.num_aborted == 1


def test_an_aborted_id_may_be_used_again_at_once() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('a', [10], 9))
  step(engine)
  assert engine.abort('a')
  engine.add(request('a', [20], 2))  # The old one is still in flight.
  assert tokens_of(finish(engine)['a']) == [21, 22]


def test_no_delta_follows_an_abort_after_a_drain() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('a', [10], 9))
  engine.add(request('b', [20], 9))
  step(engine)
  engine.drain()
  assert engine.abort('a')
  assert list(finish(engine)) == ['b']


def test_aborting_what_is_unknown_or_done() -> None:
  engine = make_engine()
  assert not engine.abort('nobody')
  engine.add(request('a', [1], 1))
  finish(engine)
  assert not engine.abort('a')
  assert engine.metrics.num_aborted == 0


BAD: tuple[tuple[types.Request, type[Exception], str], ...] = (
  (request('r', []), errors.InvalidRequestError, 'prompt: is empty'),
  (
    request('r', range(32)),
    errors.InvalidRequestError,
    'prompt: has 32 tokens, which leaves no room',
  ),
  (
    request('r', [1, 100]),
    errors.InvalidRequestError,
    'prompt: has the unknown token id 100; ids must be in [0, 100)',
  ),
  (request('r', [-1, 2]), errors.InvalidRequestError, 'token id -1'),
  (
    request('r', [1.5]),
    errors.InvalidRequestError,  # type: ignore
    'prompt: has 1.5; token ids must be integers',
  ),
  (
    request('r', [True]),
    errors.InvalidRequestError,
    'prompt: has True; token ids must be integers',
  ),
  (
    request('r', ['a']),
    errors.InvalidRequestError,  # type: ignore
    "prompt: has 'a'; token ids must be integers",
  ),
  (
    request('r', [1], stop_token_ids=(3, 100)),
    errors.InvalidRequestError,
    'stop_token_ids: has the unknown token id 100',
  ),
  (
    request('r', [1], stop=('x',)),
    errors.UnsupportedError,
    "stop=('x',): this model has no tokenizer",
  ),
)


@pytest.mark.parametrize(('bad', 'error', 'message'), BAD)
def test_a_bad_request_is_refused_and_the_engine_goes_on(
  bad: types.Request, error: type[Exception], message: str
) -> None:
  engine = make_engine()
  engine.add(request('taken', [10], 3))
  step(engine)
  with pytest.raises(error) as caught:
    engine.check(bad)
  assert message in str(caught.value)
  assert list(finish(engine)) == ['taken']


@pytest.mark.parametrize(
  'bad', [request('taken', [1]), request('r', []), request('r', range(32))]
)
def test_add_takes_nothing_that_was_not_checked(bad: types.Request) -> None:
  engine = make_engine()
  engine.add(request('taken', [10], 3))
  with pytest.raises(AssertionError):
    engine.add(bad)
  assert list(finish(engine)) == ['taken']


def test_an_id_may_be_used_again_when_its_request_is_done() -> None:
  engine = make_engine()
  engine.add(request('a', [1], 1))
  finish(engine)
  engine.add(request('a', [5], 1))
  assert tokens_of(finish(engine)['a']) == [6]


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(allowed_token_ids=(100,)), 'allowed_token_ids: has the unknown'),
    (dict(bad_token_ids=(7, 100)), 'bad_token_ids: has the unknown'),
    (dict(logit_bias={100: 1.0}), 'logit_bias: has the unknown'),
    (dict(bad_words=('a',)), 'has no tokenizer; use bad_token_ids'),
    (
      dict(allowed_token_ids=(1, 2), bad_token_ids=(2, 1)),
      'all of them are ruled out',
    ),
    (
      dict(allowed_token_ids=(3, 5), min_tokens=1, stop_token_ids=(5,)),
      'all of them are ruled out',
    ),
  ],
)
def test_what_can_never_be_sampled_is_refused(
  fields: dict[str, Any], match: str
) -> None:
  engine = make_engine(eos_token_ids=(3,))
  with pytest.raises(errors.InvalidRequestError, match=match):
    engine.check(request('a', [1], **fields))
  # So are none of these.
  for some in (
    dict(allowed_token_ids=(99,)),
    dict(allowed_token_ids=(1, 2), bad_token_ids=(2,)),
    dict(allowed_token_ids=(3, 5), stop_token_ids=(5,)),
  ):
    engine.check(request('a', [1], **some))


def test_bad_words_are_bounded_and_tokenized_once(
  tmp_path: pathlib.Path,
) -> None:
  tokenizer = tokenizer_lib.Tokenizer(fake.write_tokenizer(tmp_path))
  engine = make_engine(tokenizer=tokenizer)
  calls = []
  spellings = tokenizer.spellings
  tokenizer.spellings = lambda words: calls.append(words) or spellings(words)
  for words, match in (
    (['t1 t2', ' '.join(['t1'] * 17)], 'at most 16 tokens each, and .* has 17'),
    ([f't{i} t{i}' for i in range(129)], 'at most 128 spellings'),
  ):
    with pytest.raises(errors.InvalidRequestError, match=match):
      engine.check(request('a', [1], bad_words=words))
  fine = request('a', [1], 2, bad_words=['t1', ' '.join(['t1'] * 16)])
  calls.clear()
  engine.check(fine)
  engine.add(fine)
  assert len(calls) == 1
  allowed = dict(allowed_token_ids=(1,), bad_words=['t1'])
  with pytest.raises(errors.InvalidRequestError, match='ruled out'):
    engine.check(request('b', [1], **allowed))

# SPDX-License-Identifier: Apache-2.0
"""Outputs that follow grammars, on an engine without a model."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

import pytest
import tokenizers
import tokenizers.models

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.grammar import matcher
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import naive
from tests.engine import harness

STOP, LENGTH = types.FinishReason.STOP, types.FinishReason.LENGTH
ERROR = types.FinishReason.ERROR
# After 4 the runner counts on to 5; 6 may not come, so 7 does, and so on.
REGEX = {'regex': '(t5|t7|t9)+t0'}
OUTPUT = [5, 7, 9, 0]


def make_engine(**fields: Any) -> engine_lib.Engine:
  return harness.make_engine(
    tokenizer=naive.make_tokenizer(harness.VOCAB_SIZE), **fields
  )


def request(name: str, prompt: tuple[int, ...] = (4,), **sampling: Any) -> Any:
  return harness.make_request(
    name, prompt, **{'max_tokens': 12, 'structured_outputs': REGEX, **sampling}
  )


def run(
  engine: engine_lib.Engine, *requests: types.Request
) -> dict[str, tuple[list[int], types.FinishReason | None]]:
  for one in requests:
    engine.check(one)
    engine.add(one)
  return {
    key: (harness.tokens_of(deltas), deltas[-1].finish_reason)
    for key, deltas in harness.finish(engine).items()
  }


@pytest.mark.parametrize('num_stages', [1, 2, 3])
@pytest.mark.parametrize('look_ahead', [True, False])
def test_an_output_follows_its_grammar_and_ends_with_it(
  look_ahead: bool, num_stages: int
) -> None:
  engine = make_engine(look_ahead=look_ahead, num_stages=num_stages)
  got = run(
    engine,
    request('a'),
    request('plain', (4, 5), structured_outputs=None),
    request('cut', max_tokens=2),
    request('b', (1, 2, 3, 9, 9, 9, 9, 9, 9, 9, 3)),
  )
  assert got == {
    'a': (OUTPUT, STOP),
    'plain': (list(range(6, 18)), LENGTH),
    'cut': (OUTPUT[:2], LENGTH),
    'b': (OUTPUT, STOP),
  }


@pytest.mark.parametrize('look_ahead', [True, False])
def test_a_recomputed_output_goes_on_where_it_was(look_ahead: bool) -> None:
  outputs = {'regex': '(t[1-8])*t9t0'}
  alone = run(make_engine(), request('x', structured_outputs=outputs))
  engine = make_engine(look_ahead=look_ahead, num_pages=8, token_budget=16)
  names = 'abcd'
  got = run(
    engine,
    *(request(n, (4,) * 7, structured_outputs=outputs) for n in names),
  )
  assert engine.stats().num_preemptions > 0
  assert got == {name: alone['x'] for name in names}
  assert alone['x'] == ([5, 6, 7, 8, 9, 0], STOP)


@pytest.mark.parametrize('look_ahead', [True, False])
def test_each_of_several_outputs_follows_by_itself(look_ahead: bool) -> None:
  """Recomputed in the middle, and beside others that find their pages, too."""
  outputs = {'regex': '(t[1-8])*t9t0'}
  engine = make_engine(look_ahead=look_ahead, num_pages=8, token_budget=16)
  found: dict[tuple[str, int], list[types.OutputDelta]] = {}
  counts = 3, 1, 2, 3
  several = [
    request(f'r{i}', (i,) * 6 + (4,), structured_outputs=outputs, n=n)
    for i, n in enumerate(counts)
  ]
  for one in several:
    engine.check(one)
    engine.add(one)
  for deltas in harness.finish(engine).values():
    for delta in deltas:
      found.setdefault((delta.request_id, delta.output_index), []).append(delta)
  assert engine.stats().num_preemptions > 0
  assert {
    key: (harness.tokens_of(deltas), deltas[-1].finish_reason)
    for key, deltas in found.items()
  } == {
    (f'r{i}', index): ([5, 6, 7, 8, 9, 0], STOP)
    for i, n in enumerate(counts)
    for index in range(n)
  }


def test_what_else_ends_an_output() -> None:
  open_end = {'regex': '(t5|t7|t9)+'}
  got = run(
    make_engine(eos_token_ids=(20,)),
    request('eos', structured_outputs=open_end),
    request('ignored', structured_outputs=open_end, ignore_eos=True),
    request('stop', structured_outputs=open_end, stop_token_ids=(6,)),
    request('text', stop=('t7',)),
    request('early', structured_outputs={'regex': 't5t7'}, min_tokens=5),
  )
  assert got == {
    'eos': ([5, 7, 9, 20], STOP),
    'ignored': ([5, 7, 9] * 4, LENGTH),
    'stop': ([5, 6], STOP),
    'text': ([5, 7], STOP),
    'early': ([5, 7], STOP),
  }


def test_masks_that_take_too_long_end_their_request_alone(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """All its outputs, whatever became of others before."""
  engine = make_engine()
  others = request('other'), request('plain', structured_outputs=None)
  slow = request('slow', n=2, temperature=1.0)
  for one in (slow, *others):
    engine.check(one)
    engine.add(engine.prepared(one))
  clock = itertools.chain([0.0, 0.9], itertools.repeat(0.9))
  monkeypatch.setattr(matcher.time, 'thread_time', lambda: next(clock))
  got = harness.finish(engine)
  assert [
    (delta.output_index, delta.token_ids, delta.finish_reason)
    for delta in got['slow']
    if delta.finish_reason
  ] == [(0, (5,), ERROR), (1, (5,), ERROR)]
  assert harness.tokens_of(got['other']) == OUTPUT
  assert len(harness.tokens_of(got['plain'])) == 12


class _Heedless(fake_runner.FakeRunner):
  """Samples what it likes."""

  def mask(self, pending: types.Sampled, masks: Mapping[int, Any]) -> None:
    del pending, masks


class _Late(fake_runner.FakeRunner):
  """Heeds the masks of the step before."""

  before: Mapping[int, Any] = {}

  def mask(self, pending: types.Sampled, masks: Mapping[int, Any]) -> None:
    super().mask(pending, self.before or masks)
    self.before = masks


@pytest.mark.parametrize('kind', [_Heedless, _Late])
def test_a_token_that_may_not_come_ends_its_request_alone(
  kind: type[fake_runner.FakeRunner],
) -> None:
  engine = make_engine(runner=kind(harness.VOCAB_SIZE, 4))
  got = run(
    engine,
    request('a', structured_outputs={'regex': 't5t7t9t0'}),
    request('p', structured_outputs=None),
  )
  tokens, reason = got['a']
  assert reason is ERROR and len(tokens) < 4
  assert got['p'] == (list(range(5, 17)), LENGTH)
  assert run(make_engine(), request('a')) == {'a': (OUTPUT, STOP)}


def test_an_output_that_no_token_goes_on_ends_alone() -> None:
  """As bytes are no tokens here, 't1' may only seem to go on."""
  got = run(
    make_engine(),
    request('a', (0,), structured_outputs={'regex': 't1[abc]'}),
    request('b'),
  )
  assert got == {'a': ([1], ERROR), 'b': (OUTPUT, STOP)}


def test_requests_may_leave_while_they_are_computed() -> None:
  engine = make_engine(look_ahead=True)
  for name in 'abc':
    engine.add(request(name))
  harness.step(engine)
  assert engine.abort('b')
  got = harness.finish(engine)
  assert not engine._following._matchers and not engine._following._waiting
  assert harness.tokens_of(got['c'])[-1] == 0 and 'b' not in got


def test_what_was_gained_before_masks_fail_is_told() -> None:
  class Failing(fake_runner.FakeRunner):
    num_left = 2

    def mask(self, pending: types.Sampled, masks: Mapping[int, Any]) -> None:
      self.num_left -= 1
      if not self.num_left:
        raise RuntimeError('the device failed')
      super().mask(pending, masks)

  engine = make_engine(runner=Failing(harness.VOCAB_SIZE, 4), look_ahead=True)
  engine.add(request('a'))
  engine.add(request('p', max_tokens=1, structured_outputs=None))
  with pytest.raises(RuntimeError) as caught:
    for _ in range(9):
      assert not harness.step(engine)
  assert engine.recover(caught.value) == ['a']
  engine.add(request('b'))
  got = harness.finish(engine)
  assert harness.tokens_of(got['p']) == [5]  # It was over before.
  assert harness.tokens_of(got['b']) == OUTPUT
  assert not engine._following._matchers


def test_a_grammar_is_compiled_before_it_is_added(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  engine = make_engine()
  ready = engine.prepared(request('a'))
  assert ready == request('a') and ready.grammar is not None
  plain = request('p', structured_outputs=None)
  assert engine.prepared(plain) is plain
  monkeypatch.setattr(type(engine._following), 'compile', None)
  assert run_added(engine, ready) == {'a': (OUTPUT, STOP)}


def run_added(engine: engine_lib.Engine, one: types.Request) -> Any:
  engine.add(one)
  return {
    key: (harness.tokens_of(deltas), deltas[-1].finish_reason)
    for key, deltas in harness.finish(engine).items()
  }


@pytest.mark.parametrize(
  'sampling, says',
  [
    ({'structured_outputs': {'regex': '('}}, 'unclosed group'),
    ({'structured_outputs': {'regex': 'x'}}, 'no token'),
    (
      {'structured_outputs': {'choice': ['']}, 'min_tokens': 1},
      'only an empty output fits',
    ),
    (
      {'structured_outputs': {'choice': ['']}, 'ignore_eos': True},
      'only an empty output fits',
    ),
    ({'allowed_token_ids': (6, 8)}, 'all tokens that begin .* ruled out'),
    ({'bad_token_ids': (5, 7, 9)}, 'all tokens that begin .* ruled out'),
    ({'bad_words': ('t5', 't7', 't9')}, 'all tokens that begin'),
  ],
)
def test_what_can_not_be_is_refused(sampling: Any, says: str) -> None:
  with pytest.raises(errors.InvalidRequestError, match=says):
    make_engine(eos_token_ids=(20,)).check(request('a', **sampling))


@pytest.mark.parametrize(
  'sampling',
  [
    {'allowed_token_ids': (6, 7)},
    {'bad_token_ids': (5, 7)},
    {
      'structured_outputs': {'regex': '(t5)?'},
      'allowed_token_ids': (6,),
      'stop_token_ids': (6,),
    },
  ],
)
def test_where_a_token_is_left_it_comes(sampling: Any) -> None:
  engine = make_engine(eos_token_ids=(20,))
  (_, reason) = run(engine, request('a', max_tokens=1, **sampling))['a']
  assert reason in (STOP, LENGTH)


def test_an_engine_may_have_none() -> None:
  with pytest.raises(errors.UnsupportedError, match='no tokenizer'):
    harness.make_engine().check(request('a'))
  engine = make_engine()
  engine._following._info = dataclasses.replace(engine.info, grammars=False)
  with pytest.raises(errors.UnsupportedError, match='grammars=False'):
    engine.check(request('a'))


# After "5" only an end may come, which llguidance tells by the mask alone.
_MULTIPLE = {
  'json': {'type': 'number', 'multipleOf': 5, 'minimum': 0, 'maximum': 20}
}


@pytest.mark.parametrize('look_ahead', [True, False])
@pytest.mark.parametrize('eos_token_ids', [(20,), ()])
@pytest.mark.parametrize(
  'sampling',
  [
    {},
    {'min_tokens': 5},
    {'ignore_eos': True},
    {'min_tokens': 5, 'stop_token_ids': (9,)},
    {'bad_token_ids': (20,)},
    {'n': 3},
  ],
)
def test_an_output_ends_where_only_an_end_may_come(
  sampling: Any, eos_token_ids: tuple[int, ...], look_ahead: bool
) -> None:
  """Whatever rules that end out; nor is it told, as elsewhere it is not."""
  engine = harness.make_engine(
    tokenizer=_digits(), look_ahead=look_ahead, eos_token_ids=eos_token_ids
  )
  one = request('a', (2,), structured_outputs=_MULTIPLE, **sampling)
  plain = request('p', (4,), structured_outputs=None, max_tokens=3)
  engine.check(one)
  engine.add(one)
  engine.add(plain)
  ends = []
  for deltas in harness.finish(engine).values():
    for delta in deltas:
      if delta.finish_reason is not None:
        ends.append((delta.request_id, delta.finish_reason))
      if delta.request_id == 'a':
        assert delta.token_ids == (5,)
  n = sampling.get('n', 1)
  assert sorted(ends) == [('a', STOP)] * n + [('p', LENGTH)]


def _digits() -> tokenizer_lib.Tokenizer:
  """A vocabulary in which tokens 0 to 9 are digits."""
  words = {f'{i}' if i < 10 else f't{i}': i for i in range(harness.VOCAB_SIZE)}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='0')  # type: ignore[call-arg]
  )
  return tokenizer_lib.Tokenizer.copy_of(made)


def test_an_empty_output() -> None:
  got = run(
    make_engine(eos_token_ids=(20,)),
    request('a', structured_outputs={'choice': ['']}),
  )
  assert got == {'a': ([20], STOP)}

# SPDX-License-Identifier: Apache-2.0
"""What is shown, and where stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import hypothesis
from hypothesis import strategies as st
import pytest

from sarathi_jax import types
from sarathi_jax.text import detokenizer
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tokenizer_fixture
from tests.engine import harness

LENGTH, STOP = types.FinishReason.LENGTH, types.FinishReason.STOP
VOCAB_SIZE = tokenizer_fixture.make().get_vocab_size()


@pytest.fixture(scope='module')
def tokenizer(
  tmp_path_factory: pytest.TempPathFactory,
) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(tmp_path_factory.mktemp('tokenizer'))
  )


def letters(tokenizer: tokenizer_lib.Tokenizer, text: str) -> list[int]:
  """One token for each byte of `text`."""
  return [t for c in text for t in tokenizer.encode(c)[1:]]


def run(
  tokenizer: tokenizer_lib.Tokenizer,
  output: Sequence[int],
  look_ahead: bool = True,
  eos: tuple[int, ...] = (),
  **sampling: Any,
) -> list[types.OutputDelta]:
  """The deltas of a request that samples `output`."""
  engine = harness.make_engine(
    runner=harness.ScriptRunner({'a': output}),
    tokenizer=tokenizer,
    vocab_size=VOCAB_SIZE,
    max_model_len=128,
    look_ahead=look_ahead,
    eos_token_ids=frozenset(eos),
  )
  engine.add(
    harness.make_request('a', tokenizer.encode('a'), len(output), **sampling)
  )
  return harness.finish(engine)['a']


@pytest.mark.parametrize(
  ('output', 'stop', 'shown', 'matched'),
  [
    ('one two', (), ['o', 'n', 'e', ' ', 't', 'w', 'o'], None),
    ('abENDxx', ('END',), ['a', 'b', '', '', ''], 'END'),
    ('abENx', ('END',), ['a', 'b', '', '', 'ENx'], None),  # Held back a while.
    ('abEN', ('END',), ['a', 'b', '', 'EN'], None),  # ... or at the end.
    ('aaab', ('aab',), ['', '', 'a', ''], 'aab'),  # A stop begins within one.
    ('xENDy', ('NOT', 'END', 'END.'), ['x', '', '', ''], 'END'),
    ('abcd', ('bcd', 'c'), ['a', '', 'b'], 'c'),  # The first to be complete.
    ('a\n\nb', ('\n\n',), ['a', '', ''], '\n\n'),
    ('END', ('END',), ['', '', ''], 'END'),
    ('a', ('a',), [''], 'a'),
  ],
)
@pytest.mark.parametrize('look_ahead', [False, True])
def test_stop_strings(
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  output: str,
  stop: tuple[str, ...],
  shown: list[str],
  matched: str | None,
  look_ahead: bool,
) -> None:
  deltas = run(tokenizer, letters(tokenizer, output), look_ahead, stop=stop)
  assert [d.text for d in deltas] == shown
  assert deltas[-1].finish_reason is (STOP if matched else LENGTH)
  assert deltas[-1].stop_reason == matched
  assert harness.tokens_of(deltas) == letters(tokenizer, output)[: len(deltas)]


@pytest.mark.parametrize(
  ('output', 'stop', 'text'),
  [
    ('abENDxx', ('END',), 'abEND'),
    ('abEN', ('END',), 'abEN'),
  ],
)
def test_a_stop_string_is_kept_where_asked_for(
  tokenizer: tokenizer_lib.Tokenizer,
  output: str,
  stop: tuple[str, ...],
  text: str,
) -> None:
  deltas = run(
    tokenizer,
    letters(tokenizer, output),
    stop=stop,
    include_stop_str_in_output=True,
  )
  assert harness.text_of(deltas) == text


def test_a_stop_string_ends_within_a_token(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  (the,) = tokenizer.encode(' the')[1:]
  output = [*letters(tokenizer, 'x'), the, the]
  assert harness.text_of(run(tokenizer, output, stop=('th',))) == 'x '
  kept = run(tokenizer, output, stop=('th',), include_stop_str_in_output=True)
  assert harness.text_of(kept) == 'x th'
  assert harness.tokens_of(kept) == output[:2]


def test_the_earliest_of_stop_strings_in_one_token_counts(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  (the,) = tokenizer.encode(' the')[1:]
  last = run(tokenizer, [the, the], stop=('e', 'he', 't', ' th'))[-1]
  assert (last.text, last.stop_reason) == ('', ' th')


def test_a_stop_string_within_the_prompt_does_not_count(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """The prompt is 'a'."""
  deltas = run(tokenizer, letters(tokenizer, 'bab'), stop=('ab',))
  assert harness.text_of(deltas) == 'b'
  assert len(deltas) == 3


def test_a_stop_string_of_characters_of_many_tokens(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  deltas = run(tokenizer, letters(tokenizer, 'é日本x'), stop=('日本',))
  assert harness.text_of(deltas) == 'é'
  assert deltas[-1].stop_reason == '日本'


@pytest.mark.parametrize('keep', [False, True])
def test_text_held_back_is_shown_when_a_token_ends_it(
  tokenizer: tokenizer_lib.Tokenizer, keep: bool
) -> None:
  output = letters(tokenizer, 'abENz')
  deltas = run(
    tokenizer,
    output,
    stop=('ENDS',),
    stop_token_ids=output[-1:],
    include_stop_str_in_output=keep,
  )
  assert harness.text_of(deltas) == ('abENz' if keep else 'abEN')
  assert deltas[-1].stop_reason == output[-1]


@pytest.mark.parametrize(('keep', 'text'), [(False, 'ab'), (True, 'abE')])
def test_text_held_back_at_a_token_that_is_text(
  tokenizer: tokenizer_lib.Tokenizer, keep: bool, text: str
) -> None:
  """The last token may begin a stop string itself."""
  output = letters(tokenizer, 'abE')
  deltas = run(
    tokenizer,
    output,
    stop=('END',),
    stop_token_ids=output[-1:],
    include_stop_str_in_output=keep,
  )
  assert harness.text_of(deltas) == text
  assert deltas[-1].finish_reason is STOP


def test_the_end_of_sequence_is_no_text(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  eos = tokenizer_fixture.EOS
  for skip in (True, False):
    deltas = run(
      tokenizer,
      [*letters(tokenizer, 'ab'), eos],
      eos=(eos,),
      skip_special_tokens=skip,
    )
    assert harness.text_of(deltas) == 'ab'
    assert harness.tokens_of(deltas)[-1] == eos


@pytest.mark.parametrize(('skip', 'text'), [(True, 'ab'), (False, 'a</s>b')])
def test_special_tokens_are_shown_where_asked_for(
  tokenizer: tokenizer_lib.Tokenizer, skip: bool, text: str
) -> None:
  output = letters(tokenizer, 'ab')
  output.insert(1, tokenizer_fixture.EOS)
  assert (
    harness.text_of(run(tokenizer, output, skip_special_tokens=skip)) == text
  )


@pytest.mark.parametrize(
  ('stop', 'shown', 'matched'),
  [
    ('</s>', 'ab', '</s>'),
    ('b</s>', 'a', 'b</s>'),
    ('</s>c', 'ab', '</s>c'),
    ('x</s>', 'abcd', None),
    ('</s><s>', 'abcd', None),
    ('cd', 'abc'[:2], 'cd'),
  ],
)
@pytest.mark.parametrize('keep', [False, True])
def test_a_stop_string_may_be_a_special_token(
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  stop: str,
  shown: str,
  matched: str | None,
  keep: bool,
) -> None:
  """As chat clients send it; it is found though such tokens are left out."""
  output = letters(tokenizer, 'abcd')
  output.insert(2, tokenizer_fixture.EOS)
  deltas = run(
    tokenizer,
    output,
    stop=(stop,),
    ignore_eos=True,
    include_stop_str_in_output=keep,
  )
  assert deltas[-1].stop_reason == matched
  assert deltas[-1].finish_reason is (STOP if matched else LENGTH)
  assert harness.text_of(deltas) == shown + (stop if keep and matched else '')


def test_special_tokens_stay_hidden_beside_a_stop_that_is_one(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """An unfinished character before one, and one that is not the stop's."""
  output = [
    *letters(tokenizer, 'a'),
    tokenizer_fixture.BOS,
    *letters(tokenizer, 'é')[:1],
    tokenizer_fixture.BOS,
    *letters(tokenizer, 'b<'),
    tokenizer_fixture.EOS,
  ]
  deltas = run(tokenizer, output, stop=('</s>',), ignore_eos=True)
  assert harness.text_of(deltas) == 'a\ufffdb<'
  assert deltas[-1].stop_reason == '</s>'


def test_an_unfinished_character_at_the_end_is_not_shown(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  deltas = run(tokenizer, letters(tokenizer, 'ab🎉')[:-1])
  assert harness.text_of(deltas) == 'ab'
  assert len(deltas) == 5


def test_a_stop_string_on_the_last_token_allowed(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  last = run(tokenizer, letters(tokenizer, 'abEND'), stop=('END',))[-1]
  assert (last.finish_reason, last.stop_reason) == (STOP, 'END')


def test_a_stop_string_frees_the_pages_at_once(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  output = letters(tokenizer, 'abcdefgh')
  engine = harness.make_engine(
    runner=harness.ScriptRunner({'a': output}),
    tokenizer=tokenizer,
    vocab_size=VOCAB_SIZE,
    look_ahead=True,
  )
  engine.add(harness.make_request('a', tokenizer.encode('a'), stop=('b',)))
  while not any(d.finish_reason for d in harness.step(engine)):
    pass
  stats = engine.stats()
  assert stats.num_in_flight == 1  # One wasted row, and ...
  assert stats.num_free_pages == stats.num_pages
  assert harness.finish(engine) == {}  # ... never a wrong answer.


pieces = st.text(alphabet='abé🎉', min_size=1, max_size=4)


@hypothesis.given(
  text=st.text(alphabet='abé🎉', min_size=1, max_size=16),
  stop=st.lists(pieces, max_size=3),
  keep=st.booleans(),
)
@hypothesis.settings(max_examples=200)
def test_streaming_equals_searching_the_text_so_far(
  tokenizer: tokenizer_lib.Tokenizer,
  text: str,
  stop: list[str],
  keep: bool,
) -> None:
  """Token by token: if a stop string is in the text, it is cut there."""
  output = letters(tokenizer, text)
  expected = text
  for n in range(1, len(text) + 1):
    found = [(text[:n].find(s), -len(s), s) for s in stop if s in text[:n]]
    if found:
      start, _, matched = min(found)
      expected = text[:start] + (matched if keep else '')
      break
  deltas = run(
    tokenizer, output, stop=tuple(stop), include_stop_str_in_output=keep
  )
  assert harness.text_of(deltas) == expected
  shown = ''
  for delta in deltas:  # What was shown is never taken back.
    shown += delta.text
    assert expected.startswith(shown)


@pytest.mark.parametrize('stop', [(), ('fox',), ('</s>',)])
def test_marks_are_shown_though_special_tokens_are_not(
  tokenizer: tokenizer_lib.Tokenizer, stop: tuple[str, ...]
) -> None:
  """As a reply is read by them."""
  bos, eos = tokenizer_fixture.BOS, tokenizer_fixture.EOS
  words = tokenizer.encode('the', add_special_tokens=False)
  for shown, text in (((), 'thethe'), ((bos,), '<s>the<s>the')):
    request = dataclasses.replace(
      harness.make_request('a', tokenizer.encode('a'), 9, stop=stop),
      shown_token_ids=shown,
    )
    special = tokenizer.special_tokens.values()
    made = detokenizer.Detokenizer(
      tokenizer, request, detokenizer.has_special(special, stop)
    )
    parts = [
      made.step(token, False)[0] for token in (bos, *words, bos, *words, eos)
    ]
    assert ''.join([*parts, made.flush()]) == text


@pytest.mark.parametrize(
  ('text', 'stops', 'held'),
  [
    ('abc EN', ('END',), 2),
    ('abc', ('END',), 0),
    ('END', ('END',), 0),  # The whole of a stop is found before.
    ('aab', ('aabb', 'abx'), 3),
    ('', ('END',), 0),
    ('EE', ('EEE',), 2),
  ],
)
def test_held_back(text: str, stops: tuple[str, ...], held: int) -> None:
  assert detokenizer._num_held_back(text, stops) == held


def test_of_several_tokens_none_is_told_after_a_stop_string(
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  output = letters(tokenizer, 'abENDxx')

  class AllAtOnce(harness.ScriptRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      return types.Sampled([tuple(output)], [(-1.0,) * len(output)])

  engine = harness.make_engine(
    runner=AllAtOnce({}),
    tokenizer=tokenizer,
    vocab_size=VOCAB_SIZE,
    max_model_len=128,
  )
  engine.add(
    harness.make_request(
      'a', tokenizer.encode('a'), len(output) + 1, stop=('END',)
    )
  )
  (delta,) = harness.finish(engine)['a']
  assert (delta.text, delta.stop_reason) == ('ab', 'END')
  assert list(delta.token_ids) == output[:5]
  assert len(delta.logprobs) == 5
  assert delta.metrics is not None and delta.metrics.num_output_tokens == 5
  assert engine.metrics.num_generated == 5


@pytest.mark.parametrize(
  ('output', 'stop', 'min_tokens', 'shown', 'matched'),
  [
    ('abENDxEND', ('END',), 0, 'ab', 'END'),
    ('abENDxEND', ('END',), 4, 'ab', 'END'),  # It ends with the fifth.
    ('abENDxEND', ('END',), 5, 'abENDx', 'END'),
    ('abENDxEND', ('END',), 8, 'abENDx', 'END'),
    ('abENDxEND', ('END',), 9, 'abENDxEND', None),
    # One that was complete before is not found when another begins after it.
    ('xabcde', ('ab', 'abcd'), 3, 'x', 'abcd'),
    ('xabab', ('ab', 'abcd'), 3, 'xab', 'ab'),
    ('aaaa', ('aa',), 2, 'a', 'aa'),
  ],
)
@pytest.mark.parametrize('look_ahead', [False, True])
def test_stop_strings_within_the_least_tokens_are_text(
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  output: str,
  stop: tuple[str, ...],
  min_tokens: int,
  shown: str,
  matched: str | None,
  look_ahead: bool,
) -> None:
  deltas = run(
    tokenizer,
    letters(tokenizer, output),
    look_ahead,
    stop=stop,
    min_tokens=min_tokens,
  )
  assert harness.text_of(deltas) == shown
  assert deltas[-1].stop_reason == matched

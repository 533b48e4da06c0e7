# SPDX-License-Identifier: Apache-2.0
"""The text that the quickstart model learns."""

from __future__ import annotations

import numpy as np
import pytest

from sarathi_jax.quickstart import text
from sarathi_jax.quickstart import tokenizer as tokenizer_lib


@pytest.fixture(scope='module')
def docs() -> list[text.Document]:
  return text.documents()


def test_there_is_enough_and_nothing_twice(docs: list[text.Document]) -> None:
  topics = [doc for doc in docs if doc.name.startswith('topic:')]
  assert len(topics) > 50
  assert len(docs) - len(topics) > 800
  assert len({doc.text for doc in docs}) == len(docs)
  paragraphs = [
    p for doc in topics for p in doc.text.split('\n\n') if len(p) > 80
  ]
  assert len(set(paragraphs)) == len(paragraphs)


def test_order_is_the_same_every_time(docs: list[text.Document]) -> None:
  assert text.documents(60) == docs[:60]
  assert text.documents() == docs


def test_prose_is_on_one_line_without_marks(docs: list[text.Document]) -> None:
  (topic,) = (doc for doc in docs if doc.name == 'topic:for')
  assert topic.text.startswith('The for statement is used to iterate over the')
  assert '****' not in topic.text
  assert 'range(10)' not in topic.text  # code


def test_paragraphs_of_code_are_left_alone() -> None:
  body = (
    'Heading\n=======\n\nSome words that\ngo on, see "this" and *that*;'
    ' well-\nknown.\n\n   if x:\n       y = f(x)\n'
  )
  assert text._paragraphs(body) == [
    'Heading',
    'Some words that go on, see this and that; well-known.',
    '   if x:\n       y = f(x)',
  ]


def test_code_goes_with_what_announces_it() -> None:
  told = 'x' * 70
  assert list(
    text._without_code(
      [
        'Title',
        'Such as:',
        '   f(x)',
        told + ':',
        '   g(x)',
        'A list:',
        '* one',
        'a\nb',
      ]
    )
  ) == ['Title', told + '.', 'A list:', '* one']


def test_docstrings_become_answers(docs: list[text.Document]) -> None:
  by_name = {doc.name: doc.text for doc in docs}
  assert by_name['len'] == (
    '<|user|>What does len do?<|assistant|>'
    'Return the number of items in a container.'
  )
  assert by_name['threading.Event'].startswith(
    '<|user|>What is threading.Event?<|assistant|>'
  )
  assert all(
    len(t) < 400 for name, t in by_name.items() if not name.startswith('topic:')
  )
  answers = [t for name, t in by_name.items() if not name.startswith('topic:')]
  assert all(
    t.count(text.USER) == t.count(text.ASSISTANT) == 1 for t in answers
  )


def test_held_out_documents_are_not_learned(docs: list[text.Document]) -> None:
  learned, held_out = text.split(docs)
  assert len(learned) + len(held_out) == len(docs)
  assert not set(learned) & set(held_out)
  assert 20 < len(held_out) < len(docs) / 10


def test_tokenizer_gives_any_text_back() -> None:
  tokenizer = tokenizer_lib.train(text.documents(5), 400)
  assert [tokenizer.token_to_id(t) for t in text.SPECIAL_TOKENS] == [0, 1, 2]
  for written in ('The for statement', ' a  b\n\tc', 'naïve 東京 🚀', ''):
    assert tokenizer.decode(tokenizer.encode(written).ids) == written
  ids = tokenizer.encode(f'{text.USER}Hi{text.ASSISTANT}').ids
  assert (ids[0], ids[-1]) == (1, 2)
  assert np.max(ids) < 400

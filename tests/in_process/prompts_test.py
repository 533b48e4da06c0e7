# SPDX-License-Identifier: Apache-2.0
"""What callers in Python give as prompts, and what is none."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax.in_process import prompts
from sarathi_jax.text import prompts as prompts_lib

CHAT = [{'role': 'user', 'content': 'x'}]


@pytest.mark.parametrize(
  'given,expected',
  [
    ('a', ['a']),
    (['a', 'b'], ['a', 'b']),
    (np.array(['a', 'b']), ['a', 'b']),
    ([1, 2], [[1, 2]]),
    ((1, 2), [[1, 2]]),
    ([np.int64(1), 2], [[1, 2]]),
    ([[1], (2,)], [[1], (2,)]),
    (np.array([1, 2]), [[1, 2]]),
    (jnp.array([[1], [2]]), [[1], [2]]),
    ([jnp.array([1]), 'a'], [[1], 'a']),
    ([jnp.int32(1), jnp.int32(2)], [[1, 2]]),
    (range(3), [[0, 1, 2]]),
    (CHAT, [CHAT]),
    ([CHAT, 'a'], [CHAT, 'a']),
    ([], []),
    ((prompt for prompt in ('a', [1])), ['a', [1]]),
    ({'prompt': 'a'}, ['a']),  # As vLLM writes them.
    ([{'prompt_token_ids': np.array([1])}, {'prompt': 'a'}], [[1], 'a']),
  ],
)
def test_one_or_many(given: Any, expected: Any) -> None:
  assert prompts.listed(given) == expected


@pytest.mark.parametrize(
  'given',
  [
    None,
    5,
    1.5,
    True,
    b'ab',
    {1, 2},
    object(),
    {},
    np.array(5),
    jnp.int32(5),
    {'role': 'user', 'content': 'x'},
    {'prompt': None},
    {'prompt': 5},
    [None],
    [1.0],
    [True],
    [[1.0]],
    [[1, None]],
    [[True]],
    [b'ab'],
    [[b'ab']],
    bytearray(b'ab'),
    [bytearray(b'ab')],
    [[[1]]],
    ['a', None],
    [1, 'a'],
    [np.array(1.5)],
    np.array([[1.5]]),
    [{'prompt_token_ids': 5}],
    [{1, 2}],
  ],
)
def test_what_is_no_prompt_is_refused_by_what_it_is(given: Any) -> None:
  with pytest.raises(errors.InvalidRequestError, match=r'^prompt=.*must be a'):
    for prompt in prompts.listed(given):
      if not isinstance(prompt, str):
        prompts_lib.encode_prompt(None, prompt)


def test_a_large_prompt_is_not_repeated_in_an_error() -> None:
  with pytest.raises(errors.InvalidRequestError) as caught:
    prompts_lib.encode_prompt(None, [1.5] * 10**6)  # type: ignore[list-item]
  assert len(str(caught.value)) < 300

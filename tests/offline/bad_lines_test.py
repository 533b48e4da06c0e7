# SPDX-License-Identifier: Apache-2.0
"""Lines of the input that get an error instead of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.offline import runs

VOCAB, CONTEXT, GOOD = runs.VOCAB, runs.CONTEXT, runs.GOOD


BAD_LINES: Sequence[tuple[Any, str]] = (
  (b'{"prompt": "\xff"}', 'not UTF-8'),
  (b'{"prompt": ', 'not JSON'),
  (b'[' * 100_000, 'not JSON'),
  (b'{"prompt": %s}' % (b'[' * 900 + b']' * 900), 'nested too deeply'),
  (b'{"prompt": "a", "prompt": "b"}', 'prompt is there twice'),
  (b'{"prompt_token_ids": [' + b'9' * 5000 + b']}', 'not JSON'),
  ([1, 2], 'must be a JSON object'),
  ({'prompt': 'a', 'promt': 'b'}, 'promt: unknown key'),
  ({'prompt': 'a', '\ud800': 'b'}, 'unknown key'),
  ({'request_id': 5.5, **GOOD}, 'request_id=5.5: must be a text'),
  ({'request_id': True, **GOOD}, 'request_id=True'),
  ({'request_id': None, **GOOD}, 'request_id=None'),
  ({'request_id': '', **GOOD}, "request_id=''"),
  ({}, 'has none'),
  ({'prompt': 'a', **GOOD}, 'has prompt, prompt_token_ids'),
  ({'prompt': 5}, 'prompt=5: must be a text'),
  ({'prompt': None}, 'prompt=None: must be a text'),
  ({'prompt': '\ud800'}, 'prompt'),
  ({'prompt_token_ids': []}, 'prompt: is empty'),
  ({'prompt_token_ids': 'abc'}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, True]}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, 2.0]}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, VOCAB]}, f'unknown token id {VOCAB}'),
  ({'prompt_token_ids': [-1]}, 'unknown token id -1'),
  ({'prompt_token_ids': [5] * CONTEXT}, f'max_model_len={CONTEXT}'),
  ({'messages': []}, 'must be a list of objects'),
  ({'messages': ['hello']}, 'must be a list of objects'),
  ({'sampling': {'max_tokens': 0}, **GOOD}, 'max_tokens=0'),
  ({'sampling': {'max_tokens': -3}, **GOOD}, 'max_tokens=-3'),
  ({'sampling': {'temperature': float('nan')}, **GOOD}, 'temperature=nan'),
  ({'sampling': {'top_p': 0}, **GOOD}, 'top_p=0'),
  ({'sampling': {'top_p': 2}, **GOOD}, 'top_p=2'),
  (
    {'sampling': {'best_of': 2}, **GOOD},
    'best_of=2: this sampling field is not supported',
  ),
  ({'sampling': {'temprature': 1}, **GOOD}, 'temprature=1: unknown sampling'),
  ({'sampling': [1], **GOOD}, 'sampling=[1]: must be an object'),
  ({'sampling': 'hot', **GOOD}, "sampling='hot': must be an object"),
  ({'sampling': [], **GOOD}, 'sampling=[]: must be an object'),
  ({'request_id': 'twice', **GOOD}, 'an earlier line has it, too'),
)


def test_bad_lines_are_told_by_number_and_the_rest_is_done(run):
  run.write(
    {'request_id': 'twice', **GOOD},
    *(line for line, _ in BAD_LINES),
    {'request_id': 'last', **GOOD},
  )
  code, seen = run()
  assert code == 0
  refused = {r['line']: r for r in run.results() if 'error' in r}
  assert list(refused) == list(range(2, 2 + len(BAD_LINES)))
  for number, (_, words) in enumerate(BAD_LINES, 2):
    assert words in refused[number]['error'], refused[number]
    assert set(refused[number]) == {'request_id', 'line', 'error'}
  assert refused[2]['request_id'] == 'line-2'
  assert refused[1 + len(BAD_LINES)]['request_id'] == 'twice'
  done = {r['request_id'] for r in run.results() if 'error' not in r}
  assert done == {'twice', 'last'}
  assert f'{len(BAD_LINES)}, see the output' in seen

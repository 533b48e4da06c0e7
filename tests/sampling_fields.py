# SPDX-License-Identifier: Apache-2.0
"""For each sampling field, values that it takes, and some that it does not."""

from __future__ import annotations

import math
from typing import Any

NAN, INF = math.nan, math.inf

# One that is not the default, for each.
EXAMPLES: dict[str, Any] = {
  'max_tokens': 3,
  'temperature': 0.75,
  'top_k': 5,
  'top_p': 0.875,
  'min_p': 0.125,
  'seed': 7,
  'stop': ('a', 'b'),
  'stop_token_ids': (1, 2),
  'include_stop_str_in_output': True,
  'ignore_eos': True,
  'skip_special_tokens': False,
  'logprobs': 0,
}
BAD: tuple[tuple[str, Any, str], ...] = (
  ('max_tokens', 0, 'must be an integer >= 1'),
  ('max_tokens', -1, 'must be an integer >= 1'),
  ('max_tokens', 1.5, 'must be an integer >= 1'),
  ('max_tokens', True, 'must be an integer >= 1'),
  ('max_tokens', '16', 'must be an integer >= 1'),
  ('temperature', NAN, 'must be finite and >= 0'),
  ('temperature', INF, 'must be finite and >= 0'),
  ('temperature', -0.1, 'must be finite and >= 0'),
  ('temperature', '1', 'must be finite and >= 0'),
  ('temperature', True, 'must be finite and >= 0'),
  ('top_k', -2, 'must be'),
  ('top_k', 1.0, 'must be'),
  ('top_k', True, 'must be'),
  ('top_p', 0, 'must be in (0, 1]'),
  ('top_p', 2, 'must be in (0, 1]'),
  ('top_p', -0.5, 'must be in (0, 1]'),
  ('top_p', NAN, 'must be in (0, 1]'),
  ('min_p', -0.1, 'must be in [0, 1]'),
  ('min_p', 1.1, 'must be in [0, 1]'),
  ('min_p', NAN, 'must be in [0, 1]'),
  ('seed', 2**63, 'in [-9223372036854775808, 9223372036854775807]'),
  ('seed', -(2**63) - 1, 'in [-9223372036854775808, 9223372036854775807]'),
  ('seed', 0.5, 'must be an integer in'),
  ('seed', True, 'must be an integer in'),
  ('stop', ('',), 'must be strings that are not empty'),
  ('stop', '', 'must be strings that are not empty'),
  ('stop', (1,), 'must be strings that are not empty'),
  ('stop', 3, 'must be a list'),
  ('stop', {'a': 1}, 'must be a list'),
  ('stop_token_ids', (-1,), 'must be token ids >= 0'),
  ('stop_token_ids', (1.0,), 'must be token ids >= 0'),
  ('stop_token_ids', ('a',), 'must be token ids >= 0'),
  ('stop_token_ids', 'ab', 'must be a list'),
  ('stop_token_ids', 3, 'must be a list'),
  ('include_stop_str_in_output', 1, 'must be true or false'),
  ('ignore_eos', None, 'must be true or false'),
  ('skip_special_tokens', 'no', 'must be true or false'),
)
NOT_SUPPORTED: tuple[tuple[str, Any], ...] = (
  ('allowed_token_ids', [1]),
  ('allowed_token_ids', []),
  ('bad_words', ['no']),
  ('detokenize', False),
  ('extra_args', {'a': 1}),
  ('flat_logprobs', True),
  ('frequency_penalty', 0.1),
  ('guided_decoding', {'json': {}}),
  ('logit_bias', {'1': 2.0}),
  ('logits_processors', ['p']),
  ('min_tokens', 1),
  ('n', 2),
  ('n', 0),
  ('output_kind', 1),
  ('presence_penalty', -0.1),
  ('prompt_logprobs', 0),
  ('prompt_logprobs', 1),
  ('repetition_penalty', 1.1),
  ('repetition_penalty', 0),
  ('spaces_between_special_tokens', False),
  ('structured_outputs', {'regex': 'a'}),
  ('thinking_token_budget', 0),
  ('truncate_prompt_tokens', 3),
)

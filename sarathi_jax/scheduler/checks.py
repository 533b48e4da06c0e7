# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that a scheduler can never serve."""

from __future__ import annotations

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types


def check(request: types.Request, config: config_lib.SchedulerConfig) -> None:
  """Raises InvalidRequestError for a request that can never be served.

  Args:
    request: the request.
    config: of the scheduler.
  """
  num_tokens = len(request.prompt_token_ids)
  if not num_tokens:
    raise errors.InvalidRequestError(
      'prompt: is empty; must have at least one token.'
    )
  if num_tokens >= config.max_model_len:
    raise errors.InvalidRequestError(
      f'prompt: has {num_tokens} tokens, which leaves no room to generate; '
      f'max_model_len={config.max_model_len}.'
    )
  if request.sampling.is_adjusted and not config.num_adjusted_seqs:
    raise errors.UnsupportedError(
      'sampling: needs memory that this engine does not keep, as '
      'max_adjusted_seqs=0: penalties, biases, token ids and words to allow '
      'or to rule out, min_tokens.'
    )
  field, most = 'max_num_seqs', config.max_num_seqs
  if request.sampling.is_adjusted:
    field, most = 'max_adjusted_seqs', config.num_adjusted_seqs
  if request.sampling.n > most:
    raise errors.InvalidRequestError(
      f'n={request.sampling.n}: must be at most {field}={most}, as all of '
      'them run at once.'
    )

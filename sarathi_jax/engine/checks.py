# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that ask for what a model does not have. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
import numbers
from typing import Any

from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.engine import info as info_lib
from sarathi_jax.text import tokenizer as tokenizer_lib

BadWords = tuple[tuple[int, ...], ...]


def check_tokens(request: types.Request, info: info_lib.EngineInfo) -> None:
  """Raises InvalidRequestError for tokens that the model does not have."""
  sampling = request.sampling
  for field, ids in (
    ('prompt', request.prompt_token_ids),
    ('stop_token_ids', sampling.stop_token_ids),
    ('allowed_token_ids', sampling.allowed_token_ids or ()),
    ('bad_token_ids', sampling.bad_token_ids),
    ('logit_bias', tuple(sampling.logit_bias or ())),
    ('logprob_token_ids', sampling.logprob_token_ids or ()),
  ):
    for kind in set(map(type, ids)):
      if kind is bool or not issubclass(kind, numbers.Integral):
        bad = next(i for i in ids if type(i) is kind)
        raise errors.InvalidRequestError(
          f'{field}: has {errors.shown(bad)}; token ids must be integers.'
        )
    check_known(field, ids, info.vocab_size)
  for field in ('logprobs', 'prompt_logprobs'):
    num = getattr(sampling, field)
    if num is not None and num > info.vocab_size:
      raise errors.InvalidRequestError(
        f'{field}={num}: must be at most the size of the vocabulary, '
        f'{info.vocab_size}.'
      )


def check_known(name: str, ids: Collection[int], vocab_size: int) -> None:
  """Raises InvalidRequestError for ids beyond a vocabulary; `name`s them."""
  if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
    bad = next(i for i in ids if not 0 <= i < vocab_size)
    raise errors.InvalidRequestError(
      f'{name}: has the unknown token id {errors.shown(bad)}; ids must be in '
      f'[0, {vocab_size}).'
    )


def bad_words_of(
  tokenizer: tokenizer_lib.Tokenizer | None, words: tuple[str, ...]
) -> BadWords:
  """Returns the token ids of each spelling of words.

  Raises:
    UnsupportedError: there is no tokenizer.
    InvalidRequestError: they are too many, or too long.
  """
  if not words:
    return ()
  if tokenizer is None:
    raise errors.UnsupportedError(
      f'bad_words={errors.shown(words)}: this model has no '
      'tokenizer; use bad_token_ids.'
    )
  found = tokenizer.spellings(words)
  num_long = sum(len(ids) > 1 for ids in found)
  if num_long > sampling_params.MAX_SPELLINGS:
    raise errors.InvalidRequestError(
      f'bad_words={errors.shown(words)}: must have at most '
      f'{sampling_params.MAX_SPELLINGS} spellings of several tokens, and have '
      f'{num_long}.'
    )
  longest = max(found, key=len, default=())
  if len(longest) > sampling_params.MAX_SPELLING_TOKENS:
    raise errors.InvalidRequestError(
      f'bad_words={errors.shown(words)}: must have at most '
      f'{sampling_params.MAX_SPELLING_TOKENS} tokens each, and '
      f'{errors.shown(tokenizer.decode(longest))} has {len(longest)}.'
    )
  return found


def check_some_are_left(
  request: types.Request,
  bad_words: BadWords,
  eos_token_ids: Iterable[int],
  begins: Any = None,
) -> None:
  """Raises InvalidRequestError if no token may be sampled at first.

  Args:
    request: the request.
    bad_words: see `bad_words_of`.
    eos_token_ids: the model's.
    begins: which tokens the request's grammar begins with, NumPy's [V] bool;
      None: with any.
  """
  sampling = request.sampling
  allowed = sampling.allowed_token_ids
  ruled_out = {
    *sampling.bad_token_ids,
    *(ids[0] for ids in bad_words if len(ids) == 1),
    *(
      (*eos_token_ids, *sampling.stop_token_ids) if sampling.min_tokens else ()
    ),
  }
  if begins is not None:
    left = begins.copy()
    left[list(sampling.stop_token_ids)] = True  # where it may be empty
    left[list(ruled_out)] = False
    if not (left if allowed is None else left[list(allowed)]).any():
      raise errors.InvalidRequestError(
        'structured_outputs: all tokens that begin such an output are ruled '
        'out by allowed_token_ids, bad_token_ids, bad_words or min_tokens.'
      )
  if allowed is not None and ruled_out.issuperset(allowed):
    raise errors.InvalidRequestError(
      f'allowed_token_ids={errors.shown(allowed)}: all of '
      'them are ruled out by bad_token_ids, bad_words or min_tokens.'
    )

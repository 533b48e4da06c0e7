# SPDX-License-Identifier: Apache-2.0
"""What a step tells of log-probabilities beside those of its samples.

Most batches ask for none of it. It is an output of its own, which is not
fetched then. Loads no JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools
from typing import Any, NamedTuple

from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.runner import packing

NUM_TOP = sampling_params.MAX_LOGPROBS
NUM_NAMED = sampling_params.MAX_LOGPROB_TOKEN_IDS


class ToldArrays(NamedTuple):
  """What is told of some positions, S; arrays of NumPy or JAX.

  Attributes:
    ranks: [S] int32, see `types.TokenLogprobs`.
    logprobs: [S] float32, of the tokens that are there.
    top_ids: [S, NUM_TOP] int32, the likeliest tokens.
    top_logprobs: [S, NUM_TOP] float32.
    named: [S, NUM_NAMED] float32, of the tokens that a request names; none of a
      prompt's.
  """

  ranks: Any
  logprobs: Any
  top_ids: Any
  top_logprobs: Any
  named: Any


class ToldOfStep(NamedTuple):
  """The packing of what is told of a step.

  Attributes:
    num_samples: samples of its batch, R.
    num_tokens: tokens of its batch whose successors may be told of: T, or 0.
  """

  num_samples: int
  num_tokens: int

  def split(self, buffer: Any) -> tuple[ToldArrays, ToldArrays]:
    """Returns what is told of samples, and of prompts, NumPy's or JAX's.

    Of prompts, it is of the tokens of chunks that have a `next_token`, in
    order.
    """
    samples, prompts = _packings(self)
    return (
      ToldArrays(**samples.split(buffer[: samples.size])),
      ToldArrays(**prompts.split(buffer[samples.size :])),
    )


@functools.cache
def _packings(of: ToldOfStep) -> tuple[packing.Packing, packing.Packing]:
  return (
    packing.Packing(_fields(of.num_samples, NUM_NAMED)._asdict()),
    packing.Packing(_fields(of.num_tokens, 0)._asdict()),
  )


def _fields(num: int, num_named: int) -> ToldArrays:
  """Returns shapes and dtypes."""
  return ToldArrays(
    ranks=((num,), packing.INT),
    logprobs=((num,), packing.FLOAT),
    top_ids=((num, NUM_TOP), packing.INT),
    top_logprobs=((num, NUM_TOP), packing.FLOAT),
    named=((num, num_named), packing.FLOAT),
  )


def of_samples(
  chunks: Sequence[types.Chunk], tokens: Sequence[int], arrays: ToldArrays
) -> list[types.Told] | None:
  """Returns what is told of each chunk's samples; None if nothing is.

  Args:
    chunks: of a batch.
    tokens: its samples, in order.
    arrays: of the samples.
  """
  if not any(chunk.sampling.tells for chunk in chunks):
    return None
  stops = itertools.accumulate(chunk.samples for chunk in chunks)
  return [
    _told(
      arrays,
      slice(stop - chunk.samples, stop),
      tokens[stop - chunk.samples : stop],
      chunk.sampling.logprobs or 0,
      chunk.sampling.logprob_token_ids or (),
    )
    if chunk.sampling.tells
    else ()
    for chunk, stop in zip(chunks, stops, strict=True)
  ]


def of_prompts(
  chunks: Sequence[types.Chunk], arrays: ToldArrays
) -> list[types.Told] | None:
  """Returns what is told of prompts, chunk by chunk; None if nothing is.

  Args:
    chunks: of a batch.
    arrays: of the successors of the tokens of all chunks that have any.
  """
  if all(chunk.next_token is None for chunk in chunks):
    return None
  found: list[types.Told] = []
  start = 0
  for chunk in chunks:
    if chunk.next_token is None:
      found.append(())
      continue
    after = (chunk.next_token,) if chunk.next_token >= 0 else ()
    tokens = chunk.tokens[1:] + after
    part = slice(start, start + len(tokens))
    start = part.stop
    num_top = chunk.sampling.prompt_logprobs or 0
    found.append(_told(arrays, part, tokens, num_top))
  return found


def _told(
  arrays: ToldArrays,
  part: slice,
  tokens: Sequence[int],
  num_top: int,
  named: tuple[int, ...] = (),
) -> types.Told:
  some = [
    array[part].tolist()
    for array in (
      arrays.ranks,
      arrays.logprobs,
      arrays.top_ids[:, :num_top],
      arrays.top_logprobs[:, :num_top],
      arrays.named[:, : len(named)],
    )
  ]
  return tuple(
    types.TokenLogprobs(
      (token, *ids, *named), (logprob, *logprobs, *of_named), rank
    )
    for token, rank, logprob, ids, logprobs, of_named in zip(
      tokens, *some, strict=True
    )
  )

# SPDX-License-Identifier: Apache-2.0
"""The outputs that follow grammars: what may come next in each, and when.

The mask of a token follows from the token before. A batch that was launched
before that one was fetched (look-ahead) waits here for its masks, while it
computes; the runner gets them before the next batch is launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import info as info_lib
from sarathi_jax.scheduler import runner as runner_lib
from sarathi_jax.text import tokenizer as tokenizer_lib

if TYPE_CHECKING:
  from sarathi_jax.grammar import compiler
  from sarathi_jax.grammar import matcher


class Ready(NamedTuple):
  """A batch whose masks are known; see `runner.Runner.mask`.

  It has none if all that waited for them have ended.
  """

  batch: types.ScheduledBatch
  pending: runner_lib.Pending
  masks: Mapping[int, Any]


class Following:
  """The outputs that follow grammars.

  One thread at a time may use it, except `compile`.

  Args:
    tokenizer: the model's; None if it has none.
    info: what is served.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer | None, info: info_lib.EngineInfo
  ) -> None:
    self._tokenizer = tokenizer
    self._info = info
    self._matchers: dict[str, matcher.Matcher] = {}
    # What was launched and waits for masks.
    self._waiting: deque[
      tuple[types.ScheduledBatch, runner_lib.Pending, list[int]]
    ] = deque()

  @functools.cached_property
  def grammars(self) -> compiler.Grammars:
    """The grammars of the model's outputs; not imported before they are used.

    Raises:
      UnsupportedError: there are none.
    """
    if self._tokenizer is None:
      raise errors.UnsupportedError(
        'structured_outputs: this model has no tokenizer.'
      )
    if not self._info.grammars:
      raise errors.UnsupportedError(
        'structured_outputs: this engine keeps no memory for them, as its '
        'configuration has grammars=False.'
      )
    from sarathi_jax.grammar import compiler

    return compiler.Grammars(
      self._tokenizer, self._info.vocab_size, self._info.eos_token_ids
    )

  def compile(self, sampling: types.SamplingParams) -> compiler.Grammar | None:
    """Returns the grammar of what a request asks for; None for nothing.

    Raises:
      InvalidRequestError: there is none.
    """
    outputs = sampling.structured_outputs
    if outputs is None:
      return None
    grammar = self.grammars.compile(outputs)
    if grammar.is_empty and (sampling.min_tokens or sampling.ignore_eos):
      raise errors.InvalidRequestError(
        f'{outputs.shown(outputs.kind)}: only an empty output fits, which '
        'min_tokens or ignore_eos rule out.'
      )
    return grammar

  def add(self, request: types.Request) -> None:
    """Follows a request's outputs from their beginning, if it has a grammar."""
    grammar = request.grammar or self.compile(request.sampling)
    if grammar is not None:
      for index, found in enumerate(grammar.matchers(request.sampling)):
        self._matchers[request.key_of(index)] = found

  def drop(self, key: str) -> None:
    """Follows an output no longer."""
    self._matchers.pop(key, None)

  def launched(
    self, batch: types.ScheduledBatch, pending: runner_lib.Pending
  ) -> None:
    """Notes a batch, which may wait for masks."""
    if not self._matchers:
      return
    which = [
      i
      for i, chunk in enumerate(batch.samplers)
      if chunk.samples and chunk.request_id in self._matchers
    ]
    if which:
      self._waiting.append((batch, pending, which))

  def advance(self, events: Iterable[types.TokenEvent]) -> None:
    """Takes in what outputs gained; drops those that have ended."""
    if not self._matchers:
      return
    for event in events:
      if event.request_id not in self._matchers:
        continue
      if event.finish_reason is None:
        self._matchers[event.request_id].consume(event.tokens)
      else:
        self.drop(event.request_id)

  def end(self, key: str) -> tuple[bool, str]:
    """Returns whether an output's grammar is over, and its fault, if any."""
    found = self._matchers.get(key)
    if found is None or not found.is_over:
      return False, ''
    return True, found.fault

  def ready(self) -> Ready | None:
    """Takes the next batch whose masks are known; None if there is none."""
    if not self._waiting:
      return None
    batch, pending, which = self._waiting[0]
    followed = []
    samplers = batch.samplers
    for i in which:
      chunk = samplers[i]
      found = self._matchers.get(chunk.request_id)
      if found is None or found.is_over:  # What is sampled is void.
        continue
      num_before = chunk.start + chunk.num_tokens - chunk.prompt_len
      if found.num_consumed < num_before:
        return None
      followed.append((i, found))
    self._waiting.popleft()
    masks = {}
    if followed:
      found_masks = self.grammars.masks([found for _, found in followed])
      masks = {
        i: mask for (i, _), mask in zip(followed, found_masks, strict=True)
      }
    return Ready(batch, pending, masks)

  def forget_in_flight(self) -> None:
    """Forgets the batches that wait for masks."""
    self._waiting.clear()

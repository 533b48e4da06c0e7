# SPDX-License-Identifier: Apache-2.0
"""Words the answer to a call: as a whole, or in pieces. Loads no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import time
from typing import Any, TypeVar

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.http import forms
from sarathi_jax.server.http import told as told_lib
from sarathi_jax.text import tokenizer as tokenizer_lib

_Output = TypeVar('_Output', types.OutputDelta, types.Completion)


class Answer:
  """What the answer to one call has beside its choices, and how those read.

  Args:
    form: the call's.
    call: what is asked.
    engine: of which `info` and `tokenizer` are used.
    request_id: the request's.

  Attributes:
    head: what the whole answer, and each of its pieces, begins with.
    usage: the tokens that were counted so far.
  """

  def __init__(
    self,
    form: forms.Form,
    call: forms.Call,
    engine: engine_lib.Engine,
    request_id: str,
  ) -> None:
    self._form, self._call = form, call
    self._tokenizer = engine.tokenizer
    self.head: dict[str, Any] = {
      'id': form.prefix + request_id,
      'object': form.piece if call.asked.stream else form.whole,
      'created': int(time.time()),
      'model': engine.info.model_name,
    }
    self.usage = {
      'prompt_tokens': 0,
      'completion_tokens': 0,
      'total_tokens': 0,
    }
    # What it tells of a prompt beside choices.
    self._of_prompt: dict[str, Any] = {}

  def shown(self, output: _Output) -> _Output:
    """Returns an output as far as it is asked for."""
    if self._call.has_output:
      return output
    nothing: Any = {'text': '', 'token_ids': (), 'logprobs': (), 'told': ()}
    if isinstance(output, types.Completion):
      return dataclasses.replace(output, **nothing)
    return output._replace(**nothing)

  def count(self, prompt_ids: tuple[int, ...], num_tokens: int) -> None:
    """Counts what one prompt, which is at its end, took."""
    num_tokens *= self._call.has_output
    self.usage['prompt_tokens'] += len(prompt_ids)
    self.usage['completion_tokens'] += num_tokens
    self.usage['total_tokens'] += len(prompt_ids) + num_tokens

  def choice(
    self,
    index: int,
    delta: types.OutputDelta | types.Completion,
    prompt_ids: tuple[int, ...],
    text: str,
    is_first: bool,
    num_before: int = 0,
  ) -> dict[str, Any]:
    """Returns a choice, or what it gained.

    Args:
      index: its number.
      delta: the output.
      prompt_ids: the prompt.
      text: what to tell: the output's, and what comes before it.
      is_first: whether it is the whole, or its first piece.
      num_before: characters of the pieces before.
    """
    form, asked = self._form, self._call.asked
    choice: dict[str, Any] = {
      'index': index,
      **form.text(text, asked.stream, is_first),
      'logprobs': None,
      'finish_reason': None,
    }
    if delta.finish_reason not in (None, types.FinishReason.ERROR):
      choice['finish_reason'] = delta.finish_reason.value
      choice['stop_reason'] = delta.stop_reason
    if self._call.logprobs:
      choice['logprobs'] = form.logprobs(
        self._positions(delta, prompt_ids, is_first), num_before
      )
    if asked.token_ids:
      choice['token_ids'] = delta.token_ids
    if is_first:
      self._of_prompt = {}
      if asked.token_ids:
        self._of_prompt['prompt_token_ids'] = prompt_ids
      num_top = self._call.prompt_logprobs
      if num_top is not None and delta.prompt_logprobs is not None:
        self._of_prompt['prompt_logprobs'] = told_lib.prompt_logprobs(
          delta.prompt_logprobs, num_top, self._tokenizer
        )
      if form.has_prompt_by_choice:
        choice |= self._of_prompt
        self._of_prompt = {}
    return choice

  def piece(self, choice: dict[str, Any], is_first: bool) -> dict[str, Any]:
    """Returns a piece of the answer, with a piece of one choice."""
    piece = self.head | {'choices': [choice]}
    if self._call.asked.include_usage:
      piece['usage'] = None
    return piece | self._of_prompt if is_first else piece

  def _positions(
    self,
    delta: types.OutputDelta | types.Completion,
    prompt_ids: tuple[int, ...],
    is_first: bool,
  ) -> list[told_lib.Position]:
    """Returns what is told of the tokens whose text is told."""
    positions = list(told_lib.of_output(delta, self._tokenizer))
    if not (is_first and self._call.echo):
      return positions
    num_top = self._call.asked.sampling.logprobs or 0
    of_prompt = told_lib.of_prompt(
      prompt_ids, delta.prompt_logprobs or (), num_top, self._tokenizer
    )
    return [*of_prompt, *positions]

  def whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the answer as a whole."""
    return (
      self.head | {'choices': choices, 'usage': self.usage} | self._of_prompt
    )


def echo(prompt: tokenizer_lib.Prompt, engine: engine_lib.Engine) -> str:
  """Returns the text of a prompt; any thread.

  Raises:
    UnsupportedError: it is token ids, and there is no tokenizer.
  """
  if isinstance(prompt, str):
    return prompt
  if engine.tokenizer is None:
    raise errors.UnsupportedError('echo=True: this model has no tokenizer.')
  ids: Any = prompt
  return engine.tokenizer.decode(ids)


def not_finite(request_id: str) -> errors.StepError:
  """Makes the error of a request that could not be sampled."""
  return errors.StepError(
    f'{request_id}: its logits are NaN or infinite; see the log of the server.'
  )

# SPDX-License-Identifier: Apache-2.0
"""Words the answer to a call: as a whole, or in pieces. Loads no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.http import forms
from sarathi_jax.server.http import told as told_lib
from sarathi_jax.text import reply_reader
from sarathi_jax.text import tokenizer as tokenizer_lib

_Output = types.OutputDelta | types.Completion


class Answer:
  """What the answer to one call has beside its choices, and how those read.

  Args:
    form: the call's.
    call: what is asked.
    engine: of which `info` and `tokenizer` are used.
    request_id: the request's.

  Attributes:
    form, call: see above.
    tokenizer: the engine's.
    head: what the whole answer, and each of its pieces, begins with.
    usage: the tokens that were counted so far.
    of_prompt: what is told of a prompt beside choices.
  """

  def __init__(
    self,
    form: forms.Form,
    call: forms.Call,
    engine: engine_lib.Engine,
    request_id: str,
  ) -> None:
    self.form, self.call = form, call
    self.tokenizer = engine.tokenizer
    self.head: dict[str, Any] = {
      'id': form.prefix + request_id,
      'object': form.piece if call.asked.stream else form.whole,
      'created': int(time.time()),
      'model': call.asked.adapter or engine.info.model_name,
    }
    self.usage: dict[str, Any] = {
      'prompt_tokens': 0,
      'completion_tokens': 0,
      'total_tokens': 0,
      'prompt_tokens_details': {'cached_tokens': 0},
    }
    self.of_prompt: dict[str, Any] = {}

  def shown(self, output: _Output) -> _Output:
    """Returns an output as far as it is asked for."""
    if self.call.has_output:
      return output
    nothing: Any = {
      'text': '',
      'token_ids': (),
      'logprobs': (),
      'told': (),
      'versions': (),
    }
    if isinstance(output, types.Completion):
      return dataclasses.replace(output, **nothing)
    return output._replace(**nothing)

  def count(self, num_prompt: int, num_cached: int, num_tokens: int) -> None:
    """Counts tokens of a prompt, those found of it, and its outputs'."""
    num_tokens *= self.call.has_output
    self.usage['prompt_tokens_details']['cached_tokens'] += num_cached
    self.usage['prompt_tokens'] += num_prompt
    self.usage['completion_tokens'] += num_tokens
    self.usage['total_tokens'] += num_prompt + num_tokens

  def choice(
    self,
    number: int,
    prompt: tokenizer_lib.Prompt,
    prompt_ids: tuple[int, ...],
    text: str = '',
  ) -> Choice:
    """Begins a choice.

    Args:
      number: its own.
      prompt: that it answers.
      prompt_ids: the prompt's tokens.
      text: what it begins with, before any output.
    """
    reader = None
    if self.tokenizer is not None:
      reader = self.tokenizer.reply_reader(prompt, prompt_ids)
    return Choice(self, number, prompt_ids, reader, text)

  def whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the answer as a whole."""
    return (
      self.head | {'choices': choices, 'usage': self.usage} | self.of_prompt
    )


class Choice:
  """One choice of an answer: as a whole, or piece by piece.

  Args:
    answer: its own.
    number, prompt_ids, text: see `Answer.choice`.
    reader: tells apart what the output says; None if that is content alone.
  """

  def __init__(
    self,
    answer: Answer,
    number: int,
    prompt_ids: tuple[int, ...],
    reader: reply_reader.ReplyReader | None,
    text: str,
  ) -> None:
    self._answer = answer
    self._number = number
    self._prompt_ids = prompt_ids
    self._reader = reader
    self._text = text
    self._is_first = True
    self._num_before = 0  # characters of the tokens that were told

  def num_chars(self, delta: types.OutputDelta) -> int:
    """Returns about how many characters it takes to tell what was gained."""
    num = told_lib.num_chars(delta)
    if not self._is_first:
      return num
    answer = self._answer
    return num + num_of_prompt(answer.call, self._prompt_ids, self._text)

  def event(self, delta: types.OutputDelta) -> dict[str, Any] | None:
    """Returns the event that tells of what was gained; None if none does."""
    is_first = self._is_first
    choice = self.add(delta)
    if choice is None:
      return None
    event = self._answer.head | {'choices': [choice]}
    if self._answer.call.asked.include_usage:
      event['usage'] = None
    # Of outputs of one prompt, the first one tells what is not by choice.
    is_told = is_first and not self._number
    return event | self._answer.of_prompt if is_told else event

  def add(self, output: _Output) -> dict[str, Any] | None:
    """Returns what the choice gained; None if there is nothing to tell yet."""
    form, call = self._answer.form, self._answer.call
    delta = self._answer.shown(output)
    finish_reason = delta.finish_reason
    reply = (
      types.Reply(delta.text)
      if self._reader is None
      else self._reader.read(delta.text, finish_reason is not None)
    )
    if self._text:
      reply = reply._replace(content=self._text + reply.content)
      self._text = ''
    has_ended = finish_reason not in (None, types.FinishReason.ERROR)
    tells_all = call.asked.token_ids or call.logprobs
    # Else it is in the middle of a character, or of a mark.
    if not (
      any(reply)
      or has_ended
      or (tells_all and delta.token_ids)
      or delta.prompt_logprobs is not None
    ):
      return None
    choice = {
      'index': self._number,
      **form.text(reply, call.asked.stream, self._is_first),
      'logprobs': None,
      'finish_reason': None,
    }
    if finish_reason is not None and has_ended:
      has_called = self._reader is not None and self._reader.num_whole
      choice['finish_reason'] = (
        'tool_calls'
        if has_called and finish_reason is types.FinishReason.STOP
        else finish_reason.value
      )
      choice['stop_reason'] = delta.stop_reason
    if call.logprobs:
      positions = self._positions(delta)
      choice['logprobs'] = form.logprobs(positions, self._num_before)
      self._num_before += sum(len(told_lib.text(at.token)) for at in positions)
    if call.asked.token_ids:
      choice['token_ids'] = delta.token_ids
      if delta.versions and any(v.version for v in delta.versions):
        choice['weight_versions'] = [v._asdict() for v in delta.versions]
    if self._is_first:
      choice |= self._of_prompt(delta)
    self._is_first = False
    return choice

  def _of_prompt(self, delta: _Output) -> dict[str, Any]:
    """Returns what is told of the prompt here, or leaves it to the answer."""
    answer = self._answer
    told: dict[str, Any] = {}
    if answer.call.asked.token_ids:
      told['prompt_token_ids'] = self._prompt_ids
    num_top = answer.call.prompt_logprobs
    if num_top is not None and delta.prompt_logprobs is not None:
      told['prompt_logprobs'] = told_lib.prompt_logprobs(
        delta.prompt_logprobs, num_top, answer.tokenizer
      )
    if answer.form.has_prompt_by_choice:
      return told
    if not self._number:
      answer.of_prompt = told
    return {}

  def _positions(self, delta: _Output) -> list[told_lib.Position]:
    """Returns what is told of the tokens whose text is told."""
    answer = self._answer
    positions = list(told_lib.of_output(delta, answer.tokenizer))
    if not (self._is_first and answer.call.echo):
      return positions
    num_top = answer.call.asked.sampling.logprobs or 0
    of_prompt = told_lib.of_prompt(
      self._prompt_ids, delta.prompt_logprobs, num_top, answer.tokenizer
    )
    return [*of_prompt, *positions]


def num_of_prompt(
  call: forms.Call, prompt_ids: Sequence[int], text: str
) -> int:
  """Returns about how many characters a choice has of its prompt.

  Args:
    call: says what is told.
    prompt_ids: the prompt's tokens.
    text: that is echoed.
  """
  return len(text) + told_lib.ID_CHARS * len(prompt_ids) * call.asked.token_ids


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
    f'{request_id}: no token can be sampled: its logits are NaN or infinite, '
    'or its grammar came to a dead end; see the log of the server.'
  )

# SPDX-License-Identifier: Apache-2.0
"""Words the answer to a call: as a whole, or in pieces. Loads no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.http import forms
from sarathi_jax.text import tokenizer as tokenizer_lib


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
    self._prompt_ids: tuple[int, ...] = ()

  def count(self, prompt_ids: tuple[int, ...], num_tokens: int) -> None:
    """Counts what one prompt, which is at its end, took."""
    self._prompt_ids = prompt_ids
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
    choice = {
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
        forms.scored(delta, self._tokenizer), num_before
      )
    if asked.token_ids:
      choice['token_ids'] = delta.token_ids
      if is_first and form.has_prompt_ids_by_choice:
        choice['prompt_token_ids'] = prompt_ids
    return choice

  def whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the answer as a whole."""
    whole = self.head | {'choices': choices, 'usage': self.usage}
    if self._call.asked.token_ids and not self._form.has_prompt_ids_by_choice:
      whole['prompt_token_ids'] = self._prompt_ids
    return whole


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

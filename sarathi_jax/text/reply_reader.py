# SPDX-License-Identifier: Apache-2.0
"""Tells a reply's content, reasoning and calls apart, as they come.

What is no call as the model is to write them is content, whatever it is: no
output raises anything. A call is told once its name is certain, and its
arguments as they are written; so they may be incomplete, if the output is.
Calls of tools that were not offered are content. Whitespace around reasoning,
and beside calls, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
import uuid

from sarathi_jax import types
from sarathi_jax.text import call_readers
from sarathi_jax.text import incremental
from sarathi_jax.text import replies
from sarathi_jax.text import reply_formats


class ReplyReader(call_readers.Caller):
  """Reads one reply.

  Args:
    formats: how the model writes.
    tools: the tools that it may call, by name the schema of their arguments;
      none: calls are content.
    prompt_end: the last characters of the prompt, by which it is seen whether
      the template began the reasoning.
    parallel: whether more than one call is told.
  """

  def __init__(
    self,
    formats: reply_formats.Formats,
    tools: Mapping[str, Mapping[str, Any]],
    prompt_end: str,
    parallel: bool = True,
  ) -> None:
    self._formats = formats
    self._tools = tools
    reasoning = formats.reasoning
    self._thinks = reasoning is not None and reasoning.is_begun(prompt_end)
    self._most_calls = None if parallel else 1
    self._source = incremental.Source()
    self._content: list[str] = []
    self._reasoning: list[str] = []
    self._calls: list[types.ToolCall] = []
    self._space: list[str] = []  # of which it is open whether to tell it
    self._has_reasoned = False
    self._has_content = False  # since the last call
    self._num_begun = 0
    self.num_whole = 0  # calls whose arguments are whole
    self._reading = self._read()
    next(self._reading)

  def read(self, text: str, is_last: bool = False) -> types.Reply:
    """Returns what a reply gains by `text`."""
    self._source.feed(text, is_last)
    next(self._reading, None)
    gained = types.Reply(
      ''.join(self._content),
      ''.join(self._reasoning),
      replies.merged_calls(self._calls),
    )
    self._content, self._reasoning, self._calls = [], [], []
    return gained

  def begin(self, name: str) -> Mapping[str, Any]:
    if name not in self._tools:
      raise incremental.MalformedError
    self._num_begun += 1
    self._source.record = None  # It is told, so it can't be content any more.
    self._space = []
    self._has_content = False
    self._gain(self._new_id(), name, '')
    return self._tools[name]

  def add(self, arguments: str) -> None:
    self._gain('', '', arguments)

  def end(self) -> None:
    self.num_whole += 1
    self._source.record = []

  def _gain(self, call_id: str, name: str, arguments: str) -> None:
    if self._most_calls is None or self._num_begun <= self._most_calls:
      self._calls.append(
        types.ToolCall(self._num_begun - 1, call_id, name, arguments)
      )

  def _new_id(self) -> str:
    form = self._formats.tools
    assert form is not None
    new = uuid.uuid4().hex
    return new[: form.id_chars] if form.id_chars else f'call_{new[:24]}'

  def _read(self) -> incremental.Waiting[None]:
    yield  # until there is something to read
    if self._formats.reasoning is not None:
      yield from self._think(self._formats.reasoning)
    reasoning = self._formats.reasoning
    if reasoning is not None and reasoning.before and self._thinks:
      yield from self._response(reasoning)
    yield from self._answer(self._formats.tools if self._tools else None)
    if not self._num_begun:
      self._content += self._space

  def _think(
    self, form: reply_formats.ReasoningFormat
  ) -> incremental.Waiting[None]:
    source = self._source
    if not self._thinks:
      source.record = []
      yield from source.space()
      self._thinks = yield from source.literal(form.begin)
      before, source.record = source.record, None
      if not self._thinks:
        self._say(''.join(before))
        return
    yield from self._thoughts(form)

  def _thoughts(
    self, form: reply_formats.ReasoningFormat
  ) -> incremental.Waiting[None]:
    self._space = ['\n'] if self._has_reasoned else []
    yield from self._source.space()
    yield from self._source.until((form.end,), self._reason)
    self._space = []
    yield from self._source.space()

  def _response(
    self, form: reply_formats.ReasoningFormat
  ) -> incremental.Waiting[None]:
    """Reads an answer that has marks of its own, if it has."""
    if (yield from self._source.literal(form.before)):
      yield from self._source.space()
      yield from self._source.until((form.after,), self._say)

  def _answer(
    self, form: reply_formats.ToolFormat | None
  ) -> incremental.Waiting[None]:
    source, thoughts = self._source, self._formats.reasoning
    if form is not None and form.bare is not None:
      yield from source.space(self._say)
      is_named = form.bare is reply_formats.Bare.NAME
      if is_named or (yield from source.next()) == form.bare.value:
        yield from self._call(form, '')
    marks = (*form.begins, *form.others) if form else ()
    if thoughts is not None and thoughts.others:
      marks = (*marks, *thoughts.others, thoughts.begin)
    while mark := (yield from source.until(marks, self._say)):
      if form is not None and mark in form.begins:
        yield from self._call(form, mark)
      elif thoughts is not None and mark == thoughts.begin:
        yield from self._thoughts(thoughts)

  def _call(
    self, form: reply_formats.ToolFormat, mark: str
  ) -> incremental.Waiting[None]:
    source = self._source
    source.record = [mark]
    try:
      yield from form.read(source, self, mark)
    except incremental.MalformedError:
      self._say(''.join(source.record or ()))
    source.record = None

  def _say(self, text: str) -> None:
    """Tells content; space, only before other content."""
    if not self._has_content and not text.strip():
      self._space.append(text)
      return
    self._content += [*self._space, text]
    self._space = []
    self._has_content = True

  def _reason(self, text: str) -> None:
    """Tells reasoning, but for space around it."""
    body = text.rstrip()
    tail = text[len(body) :]
    if body:
      self._reasoning += [*self._space, body]
      self._has_reasoned = True
      self._space = [tail]
    elif self._has_reasoned:
      self._space.append(tail)

# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by a checkpoint's tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import dataclasses
import pathlib
from typing import Any

import tokenizers

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.text import call_tags
from sarathi_jax.text import chat
from sarathi_jax.text import chats
from sarathi_jax.text import reply_formats
from sarathi_jax.text import reply_reader
from sarathi_jax.text import text_stream

Message = chats.Message
Prompt = str | Sequence[int] | Sequence[Message] | chats.Chat
# Characters of a prompt's last tokens are enough to find a mark at its end.
_NUM_END = 16


class Tokenizer:
  """A Hugging Face tokenizer. Thread-safe.

  Args:
    path: the folder that holds tokenizer.json and, for chats, a chat template.

  Attributes:
    folder: the same; None if it was made of a tokenizer in memory.

  Raises:
    CheckpointError: tokenizer.json or the template is damaged.
  """

  def __init__(self, path: str | pathlib.Path) -> None:
    self.folder: pathlib.Path | None = (folder := pathlib.Path(path))
    file = folder / 'tokenizer.json'
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises plain Exception.
      raise errors.CheckpointError(
        f'{file}: not a tokenizer that can be read: {error}'
      ) from error
    encode_all(self._tokenizer)
    self._pieces = text_stream.Pieces(self._tokenizer)
    self._chat = chat.ChatTemplate.from_folder(folder)
    self._formats = _formats(self._chat)

  @classmethod
  def copy_of(
    cls,
    tokenizer: tokenizers.Tokenizer,
    template: chat.ChatTemplate | None = None,
  ) -> Tokenizer:
    """Copies a tokenizer in memory, which others may change later on.

    Args:
      tokenizer: the tokenizer to copy.
      template: of chats; None if there is none.
    """
    copied = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    encode_all(copied)
    made = object.__new__(cls)
    made.folder = None
    made._tokenizer = copied
    made._pieces = text_stream.Pieces(copied)
    made._chat = template
    made._formats = _formats(template)
    return made

  @classmethod
  def from_folder(cls, path: str | pathlib.Path) -> Tokenizer | None:
    """Reads a folder's tokenizer; returns None if it has none."""
    if not (pathlib.Path(path) / 'tokenizer.json').exists():
      return None
    return cls(path)

  def with_parsers(self, tool_parser: str, reasoning_parser: str) -> Tokenizer:
    """Returns the same, by which replies are read so.

    Raises:
      ConfigError: there is no such parser; see `reply_formats.choose`.
    """
    made = copy.copy(self)
    made._formats = _formats(self._chat, tool_parser, reasoning_parser)
    return made

  def encode(
    self,
    text: str,
    add_special_tokens: bool = True,
    check: Callable[[int], None] | None = None,
  ) -> tuple[int, ...]:
    """Returns a prompt's token ids, with the special tokens that start one.

    Args:
      text: the prompt.
      add_special_tokens: whether to add those.
      check: told how many ids there are, before they are listed, which keeps
        all threads; may refuse them.

    Raises:
      InvalidRequestError: it can't be tokenized.
    """
    return self._encode(text, add_special_tokens, check)

  def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Returns words as token ids: at the start of a text, and after a space.

    As in vLLM, the second only if it begins with another token and has as many:
    otherwise it ends with the first one.
    """
    found: list[tuple[int, ...]] = []
    for word in (word.lstrip() for word in words):
      first = self._encode(word, add_special_tokens=False)
      spaced = self._encode(f' {word}', add_special_tokens=False)
      found.append(first)
      if spaced[:1] != first[:1] and len(spaced) == len(first):
        found.append(spaced)
    return tuple(ids for ids in found if ids)

  def decode(
    self, token_ids: Iterable[int], skip_special_tokens: bool = True
  ) -> str:
    # A batch, as the library's `decode` lets no other thread run.
    (text,) = self._tokenizer.decode_batch(
      [list(token_ids)], skip_special_tokens=skip_special_tokens
    )
    return str(text)

  def bytes_of(self, token_id: int) -> bytes:
    """Returns what a token adds to a text, special ones included; b'' if it is
    unknown."""
    return self._pieces.bytes_of(token_id)

  def apply_chat_template(
    self,
    messages: Sequence[Message] | chats.Chat,
    check: Callable[[int], None] | None = None,
  ) -> tuple[int, ...]:
    """Returns a chat's token ids, up to where the assistant's answer begins.

    Args:
      messages: the chat.
      check: see `encode`.

    Raises:
      InvalidRequestError: they are not messages that the template takes.
      UnsupportedError: there is no chat template, or it knows no tools.
    """
    if self._chat is None:
      raise errors.UnsupportedError(
        'messages: this model has no chat template, or none that is called '
        'default; send a prompt.'
      )
    if not isinstance(messages, chats.Chat):
      messages = chats.Chat(messages=messages)
    if messages.offered and not self._chat.takes_tools:
      raise errors.UnsupportedError(
        "tools: this model's chat template has no place for tools."
      )
    text = self._chat.render(
      messages.messages, messages.offered, messages.chat_template_kwargs
    )
    # The template writes the special tokens itself.
    return self._encode(text, add_special_tokens=False, check=check)

  def reply_reader(
    self, prompt: Prompt, prompt_token_ids: Sequence[int]
  ) -> reply_reader.ReplyReader | None:
    """Returns what reads the reply to a chat; None if it is content alone.

    Args:
      prompt: the chat; there is nothing to read in the output after others.
      prompt_token_ids: its token ids.
    """
    if not isinstance(prompt, chats.Chat):
      return None
    formats = self._formats
    if not prompt.callable:
      formats = formats._replace(tools=None)
    if formats == reply_formats.Formats():
      return None
    return reply_reader.ReplyReader(
      formats,
      prompt.callable,
      self._end_of(prompt_token_ids),
      prompt.parallel_tool_calls,
    )

  def _end_of(self, prompt_token_ids: Sequence[int]) -> str:
    ids = prompt_token_ids[-_NUM_END:]
    return self.decode(ids, skip_special_tokens=False)

  def prepare(
    self, request: types.Request, chat: chats.Chat | None = None
  ) -> types.Request:
    """Returns a request so that its reply can be read, and has to be what it
    and its tools ask for. Its grammar begins where the reasoning ends.

    Args:
      request: the request, with its prompt.
      chat: the chat that this is of; None if there are no tools.

    Raises:
      InvalidRequestError: it asks for calls that can't be.
    """
    form, reasoning = self._formats
    if chat is not None and chat.offered and form is None:
      raise errors.UnsupportedError(
        "tools: how this model writes calls of tools can't be told from its "
        'chat template; whoever serves it may say so by tool_parser.'
      )
    sampling = request.sampling
    outputs = call_tags.outputs_of(
      self._formats,
      chat,
      self._end_of(request.prompt_token_ids),
      sampling.structured_outputs,
    )
    if outputs is not sampling.structured_outputs:
      sampling = dataclasses.replace(sampling, structured_outputs=outputs)
    calls = form.marks if form and chat is not None and chat.offered else ()
    ids = map(self.token_id, (*calls, *(reasoning.marks if reasoning else ())))
    special = self.special_tokens
    return dataclasses.replace(
      request,
      sampling=sampling,
      shown_token_ids=tuple(i for i in ids if i is not None and i in special),
    )

  def _encode(
    self,
    text: str,
    add_special_tokens: bool,
    check: Callable[[int], None] | None = None,
  ) -> tuple[int, ...]:
    # A batch, as the library's `encode` lets no other thread run; `fast`
    # computes no offsets.
    try:
      (encoding,) = self._tokenizer.encode_batch_fast(
        [text], add_special_tokens=add_special_tokens
      )
    except Exception as error:  # Lone surrogates, for example.
      raise errors.InvalidRequestError(
        f"prompt: can't be tokenized: {errors.cut(str(error))}"
      ) from error
    if check is not None:
      check(len(encoding))
    return tuple(encoding.ids)

  def stream(
    self, prompt: Sequence[int], skip_special_tokens: bool
  ) -> text_stream.TextStream:
    """Returns a stream that decodes the tokens after `prompt`, one by one."""
    return text_stream.TextStream(
      self._tokenizer, self._pieces, prompt, skip_special_tokens
    )

  def token_id(self, text: str) -> int | None:
    """Returns the id of the token of this text; None if there is none."""
    found: int | None = self._tokenizer.token_to_id(text)
    return found

  def to_json(self) -> str:
    """Returns what tokenizer.json has, for who reads it anew."""
    text: str = self._tokenizer.to_str()
    return text

  @property
  def added_tokens(self) -> Mapping[int, str]:
    """The texts of tokens that only these are, special or not, by id."""
    return self._pieces.added

  @property
  def special_tokens(self) -> Mapping[int, str]:
    """The texts of the special tokens, by id."""
    return self._pieces.special


def _formats(
  template: chat.ChatTemplate | None, *parsers: str
) -> reply_formats.Formats:
  return reply_formats.choose(template.words if template else '', *parsers)


def encode_all(tokenizer: tokenizers.Tokenizer) -> bool:
  """Has a tokenizer encode whole texts, always in the same way.

  tokenizer.json keeps what its last user, perhaps a training script, had set: a
  length to truncate or pad to, or a probability of leaving merges out.

  Returns:
    Whether anything of that kind was set.
  """
  model: Any = tokenizer.model
  varies = getattr(model, 'dropout', None) is not None
  was_set = varies or bool(tokenizer.truncation or tokenizer.padding)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if varies:
    model.dropout = None
  return was_set

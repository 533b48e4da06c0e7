# SPDX-License-Identifier: Apache-2.0
"""Puts the pieces of replies together, and writes replies as OpenAI does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sarathi_jax import types


def merged(pieces: Iterable[types.Reply]) -> types.Reply:
  """Returns the whole of which these are the pieces."""
  pieces = list(pieces)
  return types.Reply(
    ''.join(piece.content for piece in pieces),
    ''.join(piece.reasoning for piece in pieces),
    merged_calls(call for piece in pieces for call in piece.tool_calls),
  )


def merged_calls(
  pieces: Iterable[types.ToolCall],
) -> tuple[types.ToolCall, ...]:
  """Returns the calls of which these are the pieces."""
  calls: dict[int, tuple[types.ToolCall, list[str]]] = {}
  for piece in pieces:
    _, arguments = calls.setdefault(piece.number, (piece, []))
    arguments.append(piece.arguments)
  return tuple(
    first._replace(arguments=''.join(arguments))
    for first, arguments in calls.values()
  )


def message(reply: types.Reply) -> dict[str, Any]:
  """Returns a reply as an assistant's message."""
  calls = [_call(call) for call in reply.tool_calls]
  return {**_first(reply), **({'tool_calls': calls} if calls else {})}


def delta(reply: types.Reply, is_first: bool) -> dict[str, Any]:
  """Returns what a reply gained, as the delta of an event."""
  said = {'content': reply.content} if reply.content else {}
  if reply.reasoning:
    said['reasoning_content'] = reply.reasoning
  calls = [{'index': c.number, **_call(c)} for c in reply.tool_calls]
  return {
    **(_first(reply) if is_first else said),
    **({'tool_calls': calls} if calls else {}),
  }


def _first(reply: types.Reply) -> dict[str, Any]:
  says_more = reply.reasoning or reply.tool_calls
  return {
    'role': 'assistant',
    'content': reply.content or (None if says_more else ''),
    **({'reasoning_content': reply.reasoning} if reply.reasoning else {}),
  }


def _call(call: types.ToolCall) -> dict[str, Any]:
  named = {'name': call.name} if call.name else {}
  return {
    **({'id': call.id, 'type': 'function'} if call.id else {}),
    'function': {**named, 'arguments': call.arguments},
  }

# SPDX-License-Identifier: Apache-2.0
"""A log with a line of JSON for each request; prompts only if asked for."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import sys
from typing import Any

from absl import logging

from sarathi_jax import errors
from sarathi_jax.server import frontend
from sarathi_jax.server.protocols import status
from sarathi_jax.server.telling import whole_lines


def outcome(ended: frontend.Ended) -> str:
  """Returns a finish reason, 'CANCELLED', or a refusal's status code."""
  if ended.error is None:
    reason = ended.last.finish_reason if ended.last else None
    return 'abort' if reason is None else reason.value
  if isinstance(ended.error, (asyncio.CancelledError, GeneratorExit)):
    return 'CANCELLED'
  if isinstance(ended.error, Exception):
    return status.of(ended.error)[0].name
  return type(ended.error).__name__


class RequestLog:
  """Writes the lines.

  Args:
    path: the file; '-' for standard error.
    with_prompts: whether prompts' token ids are in the lines.

  Raises:
    ConfigError: the file can't be opened.
  """

  def __init__(self, path: str, *, with_prompts: bool) -> None:
    self._with_prompts = with_prompts
    self._num_missing = 0  # lines, since one was written
    self._file: whole_lines.WholeLines | None = None
    try:
      if path != '-':
        self._file = whole_lines.WholeLines(path)
    except OSError as error:
      raise errors.ConfigError(
        f"request_log={path!r}: can't be written: {error.strerror}."
      ) from error

  def __call__(self, ended: frontend.Ended) -> None:
    """Writes one line; a full disk does not hold up requests."""
    try:
      self._write(json.dumps(self._line(ended)) + '\n')
    except (OSError, ValueError) as error:
      self._num_missing += 1
      logging.log_every_n_seconds(
        logging.ERROR,
        'The request log misses %d lines: %s. It goes on when '
        'it can; serving goes on.',
        60,
        self._num_missing,
        error,
      )
      return
    if self._num_missing:
      logging.warning(
        'The request log goes on; %d lines are missing.', self._num_missing
      )
      self._num_missing = 0

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def _write(self, line: str) -> None:
    if self._file is not None:
      self._file.write(line.encode())
    else:
      sys.stderr.write(line)
      sys.stderr.flush()

  def _line(self, ended: frontend.Ended) -> dict[str, Any]:
    request = ended.request
    line: dict[str, Any] = {
      'time': datetime.datetime.fromtimestamp(
        ended.started, datetime.UTC
      ).isoformat(timespec='milliseconds'),
      'request_id': ended.request_id,
      'client': ended.caller.client,
      'protocol': ended.protocol,
      'outcome': outcome(ended),
      'output_tokens': ended.num_tokens,
    }
    if request is not None:
      line |= {
        'prompt_tokens': len(request.prompt_token_ids),
        'priority': request.priority,
      }
      if request.adapter is not None:
        line['adapter'] = request.adapter.name
    if ended.last is not None and ended.last.metrics is not None:
      line |= {
        name: round(value, 6)
        for name, value in dataclasses.asdict(ended.last.metrics).items()
        if name.endswith('_s') and value is not None
      }
    if isinstance(ended.error, errors.SarathiError):
      # A message may quote a value, so of an invalid request only its field.
      line['error'] = (
        str(ended.error)
        if self._with_prompts
        or not isinstance(ended.error, errors.InvalidRequestError)
        else str(ended.error).partition('=')[0][:80]
      )
    if self._with_prompts and request is not None:
      line['prompt_token_ids'] = list(request.prompt_token_ids)
    return line

# SPDX-License-Identifier: Apache-2.0
"""Where messages are read and made: on the event loop only if it is no work.

Large ones wait for each other, on few threads of their own: many of them, which
one client can send, hold up nobody's prompt of usual size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent import futures
import functools
import itertools
import os
from typing import TypeVar

from sarathi_jax import types

T = TypeVar('T')

# Messages up to this size are read at once, which takes less time than the way
# to another thread and back.
_INLINE = 1024
# Texts beyond this size take some 30 ms or more to tokenize.
_LARGE = 65_536
# As so many bytes count those that a message of gRPC is made of: 0.3 us each.
_TOLD = 8


def num_told(delta: types.OutputDelta) -> int:
  """Counts the log-probabilities that are told beside an output."""
  if not (delta.told or delta.prompt_logprobs):
    return 0
  told = itertools.chain(delta.told, delta.prompt_logprobs or ())
  return sum(len(at.token_ids) for at in told)


async def read(size: float, function: Callable[[], T]) -> T:
  """Returns what `function` does, which takes time for each of `size` bytes."""
  if size <= _INLINE:
    return function()
  return await asyncio.get_running_loop().run_in_executor(
    _threads_of_large() if size > _LARGE else None, function
  )


async def make(
  delta: types.OutputDelta, function: Callable[[], T], size: int = 0
) -> T:
  """Returns what `function` makes of an output, and of all that is told.

  Args:
    delta: the output.
    function: makes the message.
    size: bytes that it has beside these.
  """
  if not (delta.told or delta.prompt_logprobs or size):
    return function()
  return await read(size + _TOLD * num_told(delta), function)


@functools.cache
def _threads_of_large() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(max((os.cpu_count() or 1) // 2, 1), 'large')

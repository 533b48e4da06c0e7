# SPDX-License-Identifier: Apache-2.0
"""Where a message is read: on the event loop only if that takes no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar('T')

# What is up to this size is done at once, which takes less than the way to
# another thread and back.
_INLINE = 1024


async def read(size: float, function: Callable[[], T]) -> T:
  """Returns what `function` does, which takes time for each of `size` bytes."""
  if size <= _INLINE:
    return function()
  return await asyncio.get_running_loop().run_in_executor(None, function)

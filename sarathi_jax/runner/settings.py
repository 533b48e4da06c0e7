# SPDX-License-Identifier: Apache-2.0
"""Sets JAX up as the engine needs it, whatever the program has set."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def own() -> Iterator[None]:
  """Sets 32-bit types, compiled functions, and transfers within the block.

  A trainer may compute in 64 bits, or forbid transfers to find those it did not
  intend; the engine intends all of its own.
  """
  with (
    jax.enable_x64(False),
    jax.transfer_guard('allow'),
    jax.disable_jit(False),
  ):
    yield

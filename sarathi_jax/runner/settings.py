# SPDX-License-Identifier: Apache-2.0
"""JAX as the engine needs it, whatever the program around it has set."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def own() -> Iterator[None]:
  """Types of 32 bits, compiled functions, and transfers that are meant.

  A trainer may compute in 64 bits, or forbid transfers to find its own that
  are not meant; those of the engine all are.
  """
  with (jax.enable_x64(False), jax.transfer_guard('allow'),
        jax.disable_jit(False)):
    yield

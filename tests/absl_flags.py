# SPDX-License-Identifier: Apache-2.0
"""Flags that are gone after a test: absl has one list of them a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib

from absl import flags

FLAGS = flags.FLAGS


@contextlib.contextmanager
def defined(define: Callable[[], None]) -> Iterator[None]:
  """Defines flags, for a while."""
  before = set(FLAGS)
  define()
  try:
    yield
  finally:
    for name in set(FLAGS) - before:
      delattr(FLAGS, name)


def parse(*args: str) -> list[str]:
  """Parses a command line; what it lacks is at its default.

  Returns:
    The arguments that are no flags.
  """
  FLAGS.unparse_flags()
  for name in FLAGS:
    FLAGS[name].unparse()
  rest: list[str] = FLAGS(['main', *args])[1:]
  return rest

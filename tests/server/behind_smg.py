# SPDX-License-Identifier: Apache-2.0
"""A server behind the gateway smg."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
from typing import Any

from tests.server import fake
from tests.server.http_client import Client


@contextlib.contextmanager
def serve(
  folder: pathlib.Path, **config: Any
) -> Iterator[tuple[fake.RunningServer, Client]]:
  """A server of `fake` behind the gateway."""
  changes = config.pop('engine', {})
  port = fake.free_port()
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=folder, **changes),
      gateway_port=port,
      **config,
    )
  ) as running:
    yield running, Client(port, 't3 t4 t5 t6')

# SPDX-License-Identifier: Apache-2.0
"""Loads and unloads adapters while the server serves, for administrators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import functools
from typing import Any

from absl import logging

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import frontend as frontend_lib

# Reads an adapter of a name and a path, any thread; see `LLM.read_adapter`.
Read = Callable[[str, str], Any]


class Loader:
  """What protocols do with adapters.

  Args:
    frontend: reaches the engine.
    read: reads one; None if the model can't.
  """

  def __init__(
    self, frontend: frontend_lib.Frontend, read: Read | None
  ) -> None:
    self._frontend = frontend
    self._read = read
    self._loading = asyncio.Lock()

  async def load(
    self, name: str, path: str, *, replace: bool, fields: tuple[str, str]
  ) -> None:
    """Lets requests name an adapter from now on.

    Args:
      name: of the adapter.
      path: a folder of PEFT on this machine, or a hub id.
      replace: whether there may be one of this name, which is gone then;
        requests that have it keep it.
      fields: what clients call the name and the path.

    Raises:
      InvalidRequestError: one is there, or there is no name or path.
      ConfigError: it can't be served.
      UnsupportedError: this server can't read adapters.
    """
    if self._read is None:
      raise errors.UnsupportedError(
        f"{fields[0]}={errors.shown(name)}: this server can't read adapters."
      )
    for field, value in zip(fields, (name, path), strict=True):
      if not value:
        raise errors.InvalidRequestError(f"{field}='': must not be empty.")
    again = functools.partial(self._read, name, path)

    def check(engine: engine_lib.Engine) -> None:
      if name in engine.adapters.names and not replace:
        raise errors.InvalidRequestError(
          f'{fields[0]}={errors.shown(name)}: is loaded already; unload it, or '
          'say that it is to be replaced.'
        )

    async with self._loading:
      check(self._frontend.engine)  # before it is read
      await self._load(name, again)

  async def read_again(self, name: str) -> types.Adapter | None:
    """Returns an adapter that went for others (`--max_cpu_loras`), read again.

    Raises:
      NotFoundError: it was unloaded meanwhile; or its files are not there any
        more, or others.
    """
    async with self._loading:
      adapters = self._frontend.engine.adapters
      if again := adapters.away(name):
        try:
          return await self._load(name, again)
        except errors.ConfigError as error:
          # It has paths, which are for those who load adapters.
          logging.error("Adapter %r can't be read again: %s", name, error)
          raise errors.NotFoundError(
            f"adapter={errors.shown(name)}: can't be read again; see the log "
            'of the server.'
          ) from error
      return adapters.find(name)  # Who waited here before has read it.

  async def _load(self, name: str, again: Callable[[], Any]) -> types.Adapter:
    """Reads an adapter beside the engine, and loads it between two steps."""
    matrices = await asyncio.get_running_loop().run_in_executor(None, again)
    return await self._frontend.engine_thread.call(
      lambda engine: engine.adapters.load(name, matrices, again)
    )

  async def unload(self, name: str) -> None:
    """Forgets an adapter; requests that have it keep it until they end.

    Raises:
      NotFoundError: there is none of this name.
    """
    await self._frontend.engine_thread.call(
      lambda engine: engine.adapters.unload(name)
    )

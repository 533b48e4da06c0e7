# SPDX-License-Identifier: Apache-2.0
"""Servers of an engine whose tokens count up; see fake.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import pathlib
from typing import Any

import pytest

from tests.server import fake
from tests.server import http_client


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return fake.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def server(tokenizer_folder: pathlib.Path) -> Iterator[fake.RunningServer]:
  """One that steps freely, shared by a module's tests."""
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine,
        tokenizer_folder=tokenizer_folder,
        eos_token_ids=frozenset({60}),
      )
    )
  ) as running:
    yield running


@pytest.fixture(scope='module')
def roomy() -> Iterator[fake.RunningServer]:
  """One with a chat template, that takes prompts of 100,000 tokens."""
  from sarathi_jax.benchmarks import server_front  # It loads JAX.

  with contextlib.closing(
    fake.RunningServer(
      functools.partial(server_front.make_roomy_engine, 16, 0.0)
    )
  ) as running:
    yield running


@pytest.fixture
def gated() -> Iterator[Callable[..., Any]]:
  """Makes (server, runner) whose steps the test lets through."""
  with contextlib.ExitStack() as stack:

    def make(*, config: dict[str, Any] | None = None, **changes: Any) -> Any:
      runners: list[fake.GatedRunner] = []

      def make_runner(*args: int) -> fake.GatedRunner:
        runners.append(fake.GatedRunner(*args))
        return runners[0]

      running = fake.RunningServer(
        functools.partial(fake.make_engine, make_runner, **changes),
        **(config or {}),
      )
      stack.callback(running.close)
      stack.callback(runners[0].open)
      return running, runners[0]

    yield make


@pytest.fixture(scope='session')
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return http_client.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def ours(
  chat_folder: pathlib.Path,
) -> Iterator[tuple[fake.RunningServer, http_client.Client]]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine,
        tokenizer_folder=chat_folder,
        eos_token_ids=frozenset({60}),
      ),
      http_port=0,
    )
  ) as running:
    yield running, http_client.Client.of(running)


@pytest.fixture(scope='module')
def client(
  ours: tuple[fake.RunningServer, http_client.Client],
) -> http_client.Client:
  return ours[1]


@pytest.fixture
def stepped(
  gated: Callable[..., Any], chat_folder: pathlib.Path
) -> Iterator[Callable[..., Any]]:
  """Makes (server, runner, client) whose steps the test lets through."""
  with contextlib.ExitStack() as stack:

    def make(**changes: Any) -> Any:
      config = {'http_port': 0, **changes.pop('config', {})}
      running, runner = gated(
        tokenizer_folder=chat_folder, config=config, **changes
      )
      client = stack.enter_context(
        contextlib.closing(http_client.Client.of(running))
      )
      return running, runner, client

    yield make

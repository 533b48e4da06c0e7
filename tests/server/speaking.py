# SPDX-License-Identifier: Apache-2.0
"""An engine that writes what a test has it write, to any prompt."""

from __future__ import annotations

from collections.abc import Callable
import pathlib
from typing import Any

import tokenizers

from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from tests import tokenizer_fixture
from tests.server import fake

VOCAB_SIZE = 512


class Runner(fake_runner.FakeRunner):
  """Writes `script`, and ends."""

  script: tuple[int, ...] = ()

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    sampled = super().launch(batch)
    places = [
      chunk.start + chunk.num_tokens - chunk.prompt_len
      for chunk in batch.chunks
    ]
    written = [*self.script, *[tokenizer_fixture.EOS] * 2]
    sampled = sampled._replace(
      tokens=[
        (written[min(place, len(written) - 1)],) if chunk.samples else ()
        for place, chunk in zip(places, batch.chunks, strict=True)
      ]
    )
    self._latest = sampled, batch.chunks
    return sampled


class Speaker:
  """Makes engines, and has them speak.

  Args:
    folder: for the files of its tokenizer.
    template: of chats.
    special: more special tokens.
  """

  def __init__(
    self, folder: pathlib.Path, template: str, special: tuple[str, ...] = ()
  ) -> None:
    words = tokenizers.Tokenizer.from_str(tokenizer_fixture.make().to_str())
    words.add_special_tokens(list(special))
    tokenizer_fixture.write(folder, template, words)
    self.words = words
    self._folder = folder
    self._runner: Runner | None = None

  def make_engine(self, **changes: Any) -> engine_lib.Engine:
    def make_runner(vocab_size: int, max_num_seqs: int) -> Runner:
      self._runner = Runner(vocab_size, max_num_seqs)
      return self._runner

    return fake.make_engine(
      make_runner,
      self._folder,
      vocab_size=VOCAB_SIZE,
      max_model_len=4096,
      num_pages=4096,
      eos_token_ids=frozenset({tokenizer_fixture.EOS}),
      **changes,
    )

  def say(self, text: str) -> None:
    """Has the engine write a text from now on."""
    assert self._runner is not None
    ids = self.words.encode(text, add_special_tokens=False).ids
    self._runner.script = tuple(ids)


Speak = Callable[[str], None]

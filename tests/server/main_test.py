# SPDX-License-Identifier: Apache-2.0
"""From the server's flags to the engine that it is to load."""

from __future__ import annotations

from typing import Any

from absl import app
import pytest

from sarathi_jax import quickstart
from sarathi_jax.launch import loading
from sarathi_jax.server import main as main_lib
from tests import absl_flags

QUICKSTART = str(quickstart.MODEL)


@pytest.mark.parametrize(
  ('flags', 'checkpoint', 'name', 'max_num_seqs'),
  [
    (('--checkpoint=org/model',), 'org/model', None, 128),
    (('org/model',), 'org/model', None, 128),
    (('org/model', '--served_model_name=llama'), 'org/model', 'llama', 128),
    ((), QUICKSTART, 'quickstart', 16),
    (('--served_model_name=tiny',), QUICKSTART, 'tiny', 16),
    (('--config=yi_34b_a100_tp2',), QUICKSTART, 'quickstart', 128),
    (('org/model', '--config=quickstart'), 'org/model', None, 16),
  ],
)
def test_arguments_say_what_is_loaded(
  *,
  flags: tuple[str, ...],
  checkpoint: str,
  name: str | None,
  max_num_seqs: int,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  asked: dict[str, Any] = {}

  class Engine:
    has_grammars = False

    def warm_up_grammars(self) -> None:
      self.has_grammars = True

  class Loaded:
    engine = Engine()

  def load_llm(checkpoint: str, config: Any, **fields: Any) -> Loaded:
    asked.update(fields, checkpoint=checkpoint, config=config)
    return Loaded()

  def serve(config: Any, make_engine: Any, *more: Any) -> None:
    asked.update(server=config, engine=make_engine())

  monkeypatch.setattr(loading, 'load_llm', load_llm)
  monkeypatch.setattr(main_lib, 'serve', serve)
  with absl_flags.defined(main_lib.define_flags):
    main_lib.main(
      absl_flags.parse(
        '--port=1234',
        '--drain_s=2',
        '--cache_dir=c',
        '--token_budget=256',
        *flags,
      )
    )
  assert (asked['checkpoint'], asked['cache_dir']) == (checkpoint, 'c')
  assert asked['model_name'] == name
  assert asked['config'].max_num_seqs == max_num_seqs
  assert asked['engine'] is Loaded.engine and Loaded.engine.has_grammars
  assert asked['config'].token_budget == 256
  assert (asked['server'].port, asked['server'].drain_s) == (1234, 2)


@pytest.mark.parametrize('arguments', [('a', 'b'), ('a', '--checkpoint=b')])
def test_a_second_checkpoint_is_refused(arguments: tuple[str, ...]) -> None:
  with (
    absl_flags.defined(main_lib.define_flags),
    pytest.raises(app.UsageError, match='unexpected argument'),
  ):
    main_lib.main(absl_flags.parse(*arguments))

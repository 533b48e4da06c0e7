# SPDX-License-Identifier: Apache-2.0
"""From the server's flags to the engine that it is to load."""

from __future__ import annotations

from typing import Any

import pytest

from sarathi_jax import loading
from sarathi_jax.server import main as main_lib
from tests import absl_flags


@pytest.mark.parametrize(('flags', 'name'), [
  ((), None), (('--served_model_name=llama',), 'llama')])
def test_flags_say_what_is_loaded(
    flags: tuple[str, ...], name: str | None,
    monkeypatch: pytest.MonkeyPatch) -> None:
  asked: dict[str, Any] = {}

  class Loaded:
    engine = 'an engine'

  def load_llm(checkpoint: str, config: Any, **fields: Any) -> Loaded:
    asked.update(fields, checkpoint=checkpoint, config=config)
    return Loaded()

  def serve(config: Any, make_engine: Any, *more: Any) -> None:
    asked.update(server=config, engine=make_engine())

  monkeypatch.setattr(loading, 'load_llm', load_llm)
  monkeypatch.setattr(main_lib, 'serve', serve)
  with absl_flags.defined(main_lib.define_flags):
    absl_flags.parse(
      '--checkpoint=org/model', '--port=1234', '--drain_s=2', '--cache_dir=c',
      '--token_budget=256', *flags)
    main_lib.main(['server'])
  assert (asked['checkpoint'], asked['cache_dir']) == ('org/model', 'c')
  assert asked['model_name'] == name
  assert asked['engine'] == 'an engine'
  assert asked['config'].token_budget == 256
  assert (asked['server'].port, asked['server'].drain_s) == (1234, 2)

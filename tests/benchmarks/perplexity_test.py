# SPDX-License-Identifier: Apache-2.0
"""Rounding costs little perplexity, of a text that was not learned."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import io
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from checkpoints_convert import convert
import sarathi_jax
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax import quickstart
from sarathi_jax.benchmarks import perplexity
from sarathi_jax.benchmarks import perplexity_table
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.models import quantization
from sarathi_jax.models import quantized
from sarathi_jax.quickstart import text
from tests import absl_flags
from tests import source_tree

WINDOW = 128
# codes, rows of a group, and how much larger perplexity may be.
BOUNDS = (
  ('int8', None, 0.005),
  ('int4', 64, 0.03),
  ('int4', 32, 0.03),
)
ENGINE: dict[str, Any] = dict(
  token_budget=128,
  max_num_seqs=4,
  max_model_len=WINDOW,
  page_size=32,
  num_pages=32,
  max_adjusted_seqs=4,
  grammars=False,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  target = tmp_path_factory.mktemp('perplexity') / 'converted'
  convert.convert(quickstart.MODEL, target, dtype='float32')
  return target


@pytest.fixture(scope='module')
def llm(folder: pathlib.Path) -> sarathi_jax.LLM:
  config = sarathi_jax.EngineConfig(**ENGINE)
  return sarathi_jax.LLM.from_checkpoint(folder, config=config)


def _tokens(llm: sarathi_jax.LLM) -> list[int]:
  tokenizer = llm.engine.tokenizer
  assert tokenizer is not None
  return list(tokenizer.encode(quickstart.HELD_OUT.read_text()))


def _rounded(
  folder: pathlib.Path, how: quantization.Quantization, wrong: bool = False
) -> Any:
  """The weights as they are after rounding; or with nibbles swapped."""
  params = checkpoint.restore_params(folder)
  model = checkpoint.load_metadata(folder).model
  nodes = models.quantize(dataclasses.replace(model, quantization=how), params)

  def one(leaf: Any, node: Any) -> Any:
    if not isinstance(node, quantized.Quantized):
      return node
    if wrong:
      values = node.values >> 4 | node.values << 4
      node = dataclasses.replace(node, values=values)
    return quantized.dequantize(node, jnp.float32, leaf.shape[-2])

  return jax.tree.map(one, models.param_specs(model), nodes)


@pytest.mark.slow
def test_rounding_costs_little(
  llm: sarathi_jax.LLM, folder: pathlib.Path
) -> None:
  tokens = _tokens(llm)
  exact = perplexity.measure(llm, tokens, WINDOW)
  assert exact.num_tokens > 5000
  for codes, group, most in BOUNDS:
    how = quantization.Quantization.rounding_to(codes, group)
    llm.update_params(_rounded(folder, how))
    more = perplexity.measure(llm, tokens, WINDOW).more_than(exact)
    assert -most < more <= most, (codes, group, more)
  llm.update_params(_rounded(folder, how, wrong=True))
  assert perplexity.measure(llm, tokens, WINDOW).more_than(exact) > 1
  llm.update_params(checkpoint.restore_params(folder))
  assert perplexity.measure(llm, tokens[:500], WINDOW).num_tokens == 496


class _Scorer:
  """Stands in for an LLM."""

  def __init__(self, score: float = -1.0) -> None:
    info = types.SimpleNamespace(max_model_len=4, model_name='tiny')
    tokenizer = types.SimpleNamespace(encode=lambda text: list(range(10)))
    self.engine = types.SimpleNamespace(info=info, tokenizer=tokenizer)
    self.asked: list[Any] = []
    self._score = score

  def score(self, prompts: Any, completions: Any) -> list[np.ndarray]:
    self.asked = list(zip(prompts, completions, strict=True))
    return [np.full(len(c), self._score, np.float32) for c in completions]


def test_windows_are_no_longer_than_the_model_takes() -> None:
  llm: Any = _Scorer()
  result = perplexity.measure(llm, range(9), 100)
  assert result == (6, 1.0) and result.perplexity == pytest.approx(np.e)
  assert [[*p, *c] for p, c in llm.asked] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  with pytest.raises(errors.ConfigError, match='there is none to predict'):
    perplexity.measure(llm, [1], WINDOW)
  with pytest.raises(errors.CheckpointError, match='tiny: its logits are not'):
    bad: Any = _Scorer(np.nan)
    perplexity.measure(bad, range(9), 100)


def test_the_text_was_not_learned() -> None:
  learned, _ = text.split(text.documents())
  whole = '\n'.join(document.text for document in learned)
  answers = [
    paragraph
    for block in quickstart.HELD_OUT.read_text().split('\n\n')
    for paragraph in block.splitlines()
    if not paragraph.startswith('What ')
  ]
  assert len(answers) > 200
  assert np.mean([answer in whole for answer in answers]) < 0.01


@pytest.fixture
def _flags() -> Iterator[None]:
  with absl_flags.defined(perplexity.define_flags):
    yield


def test_checkpoints_are_compared_with_what_they_are_rounded_to(
  _flags: None,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  one, two = perplexity.Result(9, 2.0), perplexity.Result(9, 2.1)
  results = iter((one, two, two))
  monkeypatch.setattr(perplexity, 'measure', lambda *_: next(results))
  rounded = []
  monkeypatch.setattr(
    convert, 'convert', lambda *args, **how: rounded.append(how)
  )
  monkeypatch.setattr(
    sarathi_jax.LLM, 'from_checkpoint', lambda path, **_: _Scorer()
  )
  out = io.StringIO()
  monkeypatch.setattr(
    rich.console, 'Console', lambda **_: _CONSOLE(file=out, width=80)
  )
  path = tmp_path / 'out.json'
  absl_flags.parse(
    f'--checkpoint={quickstart.MODEL}',
    '--checkpoint=b',
    '--rounded=int4:64',
    f'--json={path}',
  )
  perplexity.main()
  lines = [line.split() for line in out.getvalue().splitlines()]
  for name in ('b', 'int4:64'):
    assert [name, '9', '8.166', '+10.52'] in lines
  assert rounded == [dict(quantize='int4', quantize_group=64)]
  found = json.loads(path.read_text())
  assert found['flags']['checkpoint'] == ['model', 'b']
  assert [(row['name'], row['loss']) for row in found['results']] == [
    ('model', 2.0),
    ('b', 2.1),
    ('int4:64', 2.1),
  ]


def test_the_readme_is_what_the_results_say() -> None:
  text = (source_tree.ROOT / 'README.md').read_text()
  table = perplexity_table.readme(perplexity_table.read())
  assert serve_tables.insert(text, table, perplexity_table.BEGIN) == text


_CONSOLE = rich.console.Console

# SPDX-License-Identifier: Apache-2.0
"""Steps that were compiled are found without being traced, and no others."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import logging
import os
import pathlib
import pickle
import threading
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from sarathi_jax.models import transformer
from sarathi_jax.runner import compiled
from sarathi_jax.runner import compiling
from sarathi_jax.runner import kept
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs
from tests import tiny

MODEL = dataclasses.replace(tiny.MODEL, num_kv_heads=2)
PARAMS = tiny.make_params(model=MODEL)

# Of 4 tokens and as many sequences.
ALL = [4, programs.SET_UP, programs.COPY, programs.masked(4)]
FEW = [4, programs.COPY]  # of `tiny.STEPS_ALONE`


def make(folder: pathlib.Path, **fields: Any) -> llm_lib.LLM:
  """Has one step to compile, and the other programs."""
  return llm_lib.LLM(
    MODEL,
    PARAMS,
    eos_token_ids=(),
    config=tiny.engine_config(
      token_budget=4, compilation_cache_dir=str(folder), **fields
    ),
  )


def tokens_of(llm: llm_lib.LLM) -> list[tuple[int, ...]]:
  return [
    done.token_ids
    for done in llm.generate(
      [[1, 2, 3], [4] * 20], types.SamplingParams(temperature=0, max_tokens=8)
    )
  ]


def test_what_jaxs_cache_had_is_not_kept(tmp_path: pathlib.Path) -> None:
  """As after an update of our code: XLA can't write again what it read."""
  expected = tokens_of(make(tmp_path, **tiny.STEPS_ALONE))
  for path in tmp_path.glob('step-*'):
    path.unlink()
  jax.clear_caches()
  assert tokens_of(make(tmp_path, **tiny.STEPS_ALONE)) == expected
  assert not list(tmp_path.glob('step-*'))
  jax.clear_caches()
  assert tokens_of(make(tmp_path, **tiny.STEPS_ALONE)) == expected


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  """The sizes that are traced meanwhile."""
  sizes: list[int] = []
  lower = programs.StepPrograms.lower

  def count(self: Any, size: int, num_pages: int) -> Any:
    sizes.append(size)
    return lower(self, size, num_pages)

  monkeypatch.setattr(programs.StepPrograms, 'lower', count)
  return sizes


@pytest.mark.parametrize(
  ('fields', 'asked'),
  [
    ({}, ALL),
    ({'kv_cache_dtype': 'int8', **tiny.STEPS_ALONE}, FEW),
    ({'tp': 2, **tiny.STEPS_ALONE}, FEW),
  ],
  ids=str,
)
def test_a_second_start_traces_nothing(
  fields: dict[str, Any],
  asked: list[int],
  tmp_path: pathlib.Path,
  lowered: list[int],
) -> None:
  first = tokens_of(make(tmp_path, **fields))
  assert lowered == asked
  names = sorted(os.listdir(tmp_path))
  assert len([n for n in names if n.startswith('step-')]) == len(asked)
  again = make(tmp_path, **fields)
  assert lowered == asked
  assert tokens_of(again) == first
  assert sorted(os.listdir(tmp_path)) == names  # and nothing is left


def test_where_a_function_was_replaced_nothing_is_found_or_kept(
  tmp_path: pathlib.Path, lowered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
  first = tokens_of(make(tmp_path, **tiny.STEPS_ALONE))
  names = os.listdir(tmp_path)
  unembed = transformer.unembed
  monkeypatch.setattr(transformer, 'unembed', lambda *args: -unembed(*args))
  assert tokens_of(make(tmp_path, **tiny.STEPS_ALONE)) != first
  assert lowered == FEW * 2
  assert {n for n in os.listdir(tmp_path) if n.startswith('step-')} == {
    n for n in names if n.startswith('step-')
  }


def test_what_is_kept_is_told_as_what_is_compiled(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  steps, told = make_programs(), []
  monkeypatch.setattr(
    kept.Place, 'load', lambda place: None if place.path is None else 'found'
  )
  steps.compile(
    24,
    lambda *count: told.append(count),
    steps.sizes,
    kept=kept.Kept(pathlib.Path('/'), True),
  )
  assert told[0] == (0, 2) and told[-1] == (2, 2) and told == sorted(told)
  assert [steps[size] for size in steps.sizes] == ['found'] * 2


def test_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
  """Where there is no bar that moves, one line every minute needs a cause."""
  monkeypatch.setattr(compiling, '_TELL_S', 0.01)
  told: list[tuple[int, int]] = []
  enough = threading.Event()

  class Slow:
    def compile(self, options: Any) -> str:
      assert enough.wait(60)
      return 'compiled'

  def on_compiled(*count: int) -> None:
    told.append(count)
    if told.count((0, 1)) == 5:
      enough.set()

  monkeypatch.setattr(
    programs.StepPrograms, 'lower', lambda self, size, num_pages: Slow()
  )
  steps = make_programs()
  steps.compile(24, on_compiled, steps.sizes[:1])
  assert told[-1] == (1, 1) and steps[steps.sizes[0]] == 'compiled'


@pytest.fixture
def place(tmp_path: pathlib.Path) -> kept.Place:
  return kept.Kept(tmp_path, True).place('facts', jax.devices()[:1])


@pytest.fixture(scope='module')
def doubling() -> jax.stages.Compiled:
  return jax.jit(lambda x: 2 * x).lower(jnp.float32(0)).compile()


def test_what_was_saved_is_loaded(
  place: kept.Place, doubling: jax.stages.Compiled
) -> None:
  assert place.load() is None
  place.save(doubling)
  step = place.load()
  assert step is not None and step(jnp.float32(3)) == 6


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: b'',
    lambda data: data[:-100],
    lambda data: b'?' + data[1:],
    lambda data: zlib.compress(pickle.dumps((b'x', None, None))),
  ],
  ids=['empty', 'truncated', 'no zlib', 'another'],
)
def test_a_file_that_is_damaged_is_as_good_as_none(
  damage: Callable[[bytes], bytes],
  place: kept.Place,
  doubling: jax.stages.Compiled,
  caplog: pytest.LogCaptureFixture,
) -> None:
  place.save(doubling)
  assert place.path is not None
  place.path.write_bytes(damage(place.path.read_bytes()))
  with caplog.at_level(logging.WARNING, 'absl'):
    assert place.load() is None
  assert f"{place.path}: can't be loaded" in caplog.text


def test_a_full_disk_is_no_error(
  place: kept.Place,
  doubling: jax.stages.Compiled,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  caplog: pytest.LogCaptureFixture,
) -> None:
  def fail(old: str, new: pathlib.Path) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', fail)
  with caplog.at_level(logging.WARNING, 'absl'):
    place.save(doubling)
  assert "can't be kept: [Errno 28]" in caplog.text
  assert not os.listdir(tmp_path)


def test_a_folder_that_can_only_be_read_is_not_written(
  place: kept.Place,
  doubling: jax.stages.Compiled,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  place.save(doubling)
  names = os.listdir(tmp_path)
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with (
    pytest.warns(RuntimeWarning, match='are not kept'),
    compiled.kept_in(str(tmp_path)) as found,
  ):
    assert found.place('facts', jax.devices()[:1]).load() is not None
    found.place('others', jax.devices()[:1]).save(doubling)
  assert os.listdir(tmp_path) == names


def test_several_processes_have_jax_find_theirs(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with compiled.kept_in(str(tmp_path)) as found:
    assert found == kept.NOWHERE
  with compiled.kept_in(None) as found:
    assert found == kept.NOWHERE


def path_of(facts: Any = 'facts') -> pathlib.Path | None:
  return kept.Kept(pathlib.Path('/'), True).place(facts, jax.devices()[:1]).path


def test_what_is_not_the_same_is_kept_elsewhere(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  paths = [path_of(), path_of('others')]
  with jax.default_matmul_precision('highest'):  # of this thread alone
    paths.append(path_of())
  with jax.enable_x64(True):
    paths.append(path_of())
  paths.append(
    kept.Kept(pathlib.Path('/'), True).place('facts', jax.devices()[1:2]).path
  )
  with monkeypatch.context() as patch:
    patch.setenv('XLA_FLAGS', f'{os.environ.get("XLA_FLAGS", "")} --of_xla=1')
    paths.append(path_of())
  with monkeypatch.context() as patch:
    patch.setattr(kept, '_SOURCE', 'of other code')
    paths.append(path_of())
  with monkeypatch.context() as patch:
    patch.setattr(kept.importlib.metadata, 'version', lambda name: '0.0')
    paths.append(path_of())
  assert len(set(paths)) == len(paths)
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', '/elsewhere')
  try:
    assert path_of() == paths[0]  # A folder that was moved has what it had.
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


def make_programs(
  model: Any = tiny.MODEL,
  *,
  max_model_len: int = 64,
  dtype: Any = jnp.float32,
  kv_dtype: Any = jnp.float32,
  layout: Any = placement.of_live,
  **fields: Any,
) -> programs.StepPrograms:
  return programs.StepPrograms(
    model,
    mesh_lib.make(),
    tiny.engine_config(**fields),
    layout=layout(jnp.dtype(dtype)),
    kv_dtype=jnp.dtype(kv_dtype),
    max_model_len=max_model_len,
    max_step_tokens=8,
  )


def test_no_two_steps_have_a_place_in_common(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  places: list[kept.Place] = []
  place = kept.Kept.place

  class Enough(Exception):
    pass

  def remember(self: kept.Kept, *args: Any) -> kept.Place:
    places.append(place(self, *args))
    raise Enough

  monkeypatch.setattr(kept.Kept, 'place', remember)

  def ask(
    steps: programs.StepPrograms, num_pages: int = 24, **options: Any
  ) -> None:
    for size in steps.sizes:
      with pytest.raises(Enough):
        steps.compile(
          num_pages,
          lambda *count: None,
          [size],
          options,
          kept.Kept(pathlib.Path('/'), True),
        )

  ask(make_programs())
  for model in (
    dataclasses.replace(
      tiny.MODEL, rope=dataclasses.replace(tiny.MODEL.rope, theta=5.0)
    ),
    dataclasses.replace(tiny.MODEL, sliding_window=9),
    MODEL,
  ):
    ask(make_programs(model))
  for fields in (
    {'max_model_len': 32},
    {'dtype': jnp.bfloat16},
    {'kv_dtype': jnp.int8},
    {'layout': functools.partial(placement.of_checkpoint, mesh_lib.make())},
    {'page_size': 4},
    {'max_num_seqs': 3},
    {'attention': 'xla'},
  ):
    ask(make_programs(**fields))
  ask(make_programs(), 25)
  ask(make_programs(), xla_cpu_enable_fast_math=True)
  paths = [place.path for place in places]
  assert len(set(paths)) == len(paths) > 24

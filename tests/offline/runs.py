# SPDX-License-Identifier: Apache-2.0
"""Offline runs in the process of a test."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from sarathi_jax import offline
from sarathi_jax.cli import mains
from tests import absl_flags

VOCAB, CONTEXT = 300, 256
# A program of one size.
ENGINE = ['--token_budget=4', '--max_num_seqs=4', '--page_size=16']
SAMPLING = ['--max_tokens=5', '--ignore_eos']
GOOD: dict[str, Any] = {'prompt_token_ids': [5, 6]}
Result = dict[str, Any]


class Runner:
  """Runs main in this process; files are in a folder of the test's."""

  def __init__(
    self,
    folder: pathlib.Path,
    checkpoint: pathlib.Path,
    cache_dir: pathlib.Path,
    capsys: Any,
  ) -> None:
    self.folder = folder
    self.prompts, self.output = folder / 'in.jsonl', folder / 'out.jsonl'
    self.flags = [
      f'--checkpoint={checkpoint}',
      f'--prompts={self.prompts}',
      f'--output={self.output}',
      f'--cache_dir={cache_dir}',
      *ENGINE,
      *SAMPLING,
    ]
    self._capsys = capsys

  def write(self, *lines: Any) -> None:
    """Objects become JSON; bytes stay as they are."""
    self.prompts.write_bytes(
      b''.join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b'\n'
        for line in lines
      )
    )

  def __call__(self, *flags: str) -> tuple[int, str]:
    """Returns the exit code and what a person sees."""
    absl_flags.parse(*self.flags, *flags)
    code: Any = 0
    self._capsys.readouterr()
    try:
      code = mains.call(offline.main, ['offline']) or 0
    except SystemExit as error:
      code = error.code
    seen = self._capsys.readouterr()
    assert seen.out == ''
    return code, seen.err

  def results(self) -> list[Result]:
    return [json.loads(line) for line in self.output.read_bytes().splitlines()]

  def fails(self, *flags: str) -> str:
    """The one clear line of a run that fails."""
    code, seen = self(*flags)
    assert code == 1, seen
    lines = [line for line in seen.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and seen.splitlines()[-1] == lines[0], seen
    assert 'Traceback' not in seen
    return lines[0]


def by_id(results: Sequence[Result]) -> dict[tuple[str, int | None], Result]:
  """Results without what differs from run to run: times, and last bits."""
  found = {
    (r['request_id'], r.get('line')): {
      k: v for k, v in r.items() if k not in ('metrics', 'logprobs')
    }
    for r in results
  }
  assert len(found) == len(results)
  return found

# SPDX-License-Identifier: Apache-2.0
"""Lines for where there is no terminal: a minute apart."""

from __future__ import annotations

import io

import pytest
import rich.console

from sarathi_jax.in_process import progress


@pytest.mark.parametrize(
  'is_terminal,expected', [(False, '[5]\n[65]\n[125]\n'), (True, '')]
)
def test_a_line_a_minute(is_terminal: bool, expected: str) -> None:
  now = 0
  out = io.StringIO()
  lines = progress.Lines(
    rich.console.Console(file=out, force_terminal=is_terminal), lambda: now
  )
  for now in range(130):
    lines.tell(f'[{now}]'.strip)
  assert out.getvalue() == expected


def test_a_count_is_told_where_it_takes_long(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(progress, 'FIRST_LINE_S', 0.0)
  with progress.counted('Compiling steps') as tell:
    tell(1, 3)
  assert 'Compiling steps: 1 of 3' in capsys.readouterr().err

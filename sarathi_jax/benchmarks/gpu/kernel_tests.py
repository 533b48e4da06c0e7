# SPDX-License-Identifier: Apache-2.0
"""Runs tests, and keeps the result of each at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sarathi_jax.benchmarks import journal as journal_lib


class _Recorder:
  """A plugin of pytest, in the process that the others report to."""

  def __init__(self, journal: journal_lib.Journal) -> None:
    self._journal = journal

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    if report.failed:
      crash = getattr(report.longrepr, 'reprcrash', None)
      self._journal.add(
        report.nodeid,
        {'error': str(crash.message if crash else report.longrepr)[-500:]},
      )
    elif report.passed and report.when == 'call':
      self._journal.add(report.nodeid, {'seconds': report.duration})


def run(journal: journal_lib.Journal, arguments: Sequence[str]) -> None:
  """Runs tests, less those that passed before.

  Args:
    journal: takes a row for each test, and has those of an earlier run.
    arguments: arguments of pytest.

  Raises:
    RuntimeError: pytest could not run them.
  """
  passed = [f'--deselect={test}' for test in journal.rows if test in journal]
  # A warning of a newer JAX is no failure of a GPU.
  status = pytest.main(
    ['-q', '-p', 'no:cacheprovider', '-W', 'default', *arguments, *passed],
    plugins=[_Recorder(journal)],
  )
  ran = (
    pytest.ExitCode.OK,
    pytest.ExitCode.TESTS_FAILED,
    pytest.ExitCode.NO_TESTS_COLLECTED,
  )
  if status not in ran or not journal.rows:
    raise RuntimeError(f'pytest: exit status {int(status)}')

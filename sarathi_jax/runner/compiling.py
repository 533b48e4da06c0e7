# SPDX-License-Identifier: Apache-2.0
"""Compiles programs, several at a time, or finds them where they are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import Any

from sarathi_jax.runner import kept as kept_lib

OnCompiled = Callable[[int, int], object]  # (programs compiled, of how many)
_Compiled = tuple[int, Any]  # a number and its program; None if to compile
_Job = futures.Future[_Compiled]
_TELL_S = 5.0


def run(
  places: Mapping[int, kept_lib.Place],
  lower: Callable[[int], Any],
  on_compiled: OnCompiled,
  options: Mapping[str, Any],
) -> dict[int, Any]:
  """Returns programs by their numbers, compiled.

  Args:
    places: the number of each program -> where it is kept, in the order to
      compile them in.
    lower: lowers the program of a number; it is called on this thread.
    on_compiled: called with the progress, at least every few seconds.
    options: XLA's options by name, beside those of the environment.
  """
  done: dict[int, Any] = {}

  def gather(
    jobs: Collection[_Job], timeout_s: float = _TELL_S
  ) -> Collection[_Job]:
    """Takes the jobs that are done, tells the count, returns the rest."""
    ready, rest = futures.wait(
      jobs, timeout_s, return_when=futures.FIRST_COMPLETED
    )
    for job in ready:
      number, compiled = job.result()
      if compiled is not None:
        done[number] = compiled
    on_compiled(len(done), len(places))
    return rest

  def load(number: int) -> _Compiled:
    return number, places[number].load()

  def compile_and_keep(number: int, lowered: Any) -> _Compiled:
    return number, places[number].compile(lowered, options)

  on_compiled(0, len(places))
  pool = futures.ThreadPoolExecutor(max_workers=4)
  try:
    jobs: Collection[_Job] = [pool.submit(load, n) for n in places]
    while jobs:
      jobs = gather(jobs)
    for n in places:
      if n not in done:
        jobs = {*jobs, pool.submit(compile_and_keep, n, lower(n))}
        jobs = gather(jobs, 0)
    while jobs:
      jobs = gather(jobs)
  finally:  # No compilation heeds Ctrl-C, so don't wait for any after it.
    pool.shutdown(wait=False, cancel_futures=True)
  return done

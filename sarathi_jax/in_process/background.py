# SPDX-License-Identifier: Apache-2.0
"""A thread that owns an `LLM`, and serves others while a trainer trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.text import collector

if TYPE_CHECKING:
  from sarathi_jax.in_process import served

_T = TypeVar('_T')
Completions = list[types.Completion]


class _Job:
  """The requests of one `submit`."""

  def __init__(self, requests: Sequence[types.Request]) -> None:
    self.requests = list(requests)
    self.future: futures.Future[Completions] = futures.Future()
    self.inbox: deque[types.OutputDelta] = deque()
    self._collected = {
      request.request_id: collector.Collector(request) for request in requests
    }
    self._done: dict[str, Completions] = {}

  def read(self) -> bool:
    """Reads what came; returns whether that was all."""
    while self.inbox:
      delta = self.inbox.popleft()
      if completions := self._collected[delta.request_id].add(delta):
        self._done[delta.request_id] = completions
    return len(self._done) == len(self.requests)

  def finish(self) -> None:
    """Tells what was generated, unless nobody wants it any more."""
    if self.future.set_running_or_notify_cancel():
      self.future.set_result(
        [done for r in self.requests for done in self._done[r.request_id]]
      )


class Background:
  """Generates in a thread of its own, which alone uses the LLM until `close`.

    with llm.background() as rollouts:
      future = rollouts.submit(prompts, SamplingParams(max_tokens=500))
      ...  # training; then, between two steps of it:
      rollouts.update_params(params, on_update='keep')
      done = future.result()  # or await asyncio.wrap_future(future)

  Any thread may call its methods; they share the steps. While the LLM sleeps,
  or its weights were donated, requests wait for `wake` or `update_params`.
  """

  def __init__(self, llm: served.Served) -> None:
    """Begins; called by `LLM.background`.

    Raises:
      BusyError: another thread uses the LLM.
    """
    self._llm = llm
    self._commands: queue.SimpleQueue[Callable[[], object]] = (
      queue.SimpleQueue()
    )
    self._lock = threading.Lock()
    self._jobs: list[_Job] = []
    self._is_paused = False
    self._is_open = True
    began: futures.Future[None] = futures.Future()
    self._thread = threading.Thread(
      target=self._run, args=(began,), name='background', daemon=True
    )
    self._thread.start()
    began.result()

  def submit(
    self, prompts: Any, sampling: Any = None, *, adapter: Any = None
  ) -> futures.Future[Completions]:
    """Begins to continue prompts, and returns at once.

    Args:
      prompts, sampling, adapter: see `LLM.generate`.

    Returns:
      What `LLM.generate` returns, once it is there. To cancel it aborts the
      requests.

    Raises:
      InvalidRequestError: a prompt can't be served; none was started.
      BusyError: it is closed.
    """
    job = _Job(self._llm._requests(prompts, sampling, adapter))
    job.future.add_done_callback(
      lambda future: future.cancelled() and self._send(lambda: self._drop(job))
    )
    if not self._send(lambda: self._begin(job)):
      raise errors.BusyError('submit: the background thread is closed.')
    return job.future

  def call(self, do: Callable[[], _T]) -> _T:
    """Does something with the LLM between two steps, and waits for it.

    Args:
      do: calls the LLM's methods, such as `load_adapter`.

    Raises:
      BusyError: it is closed.
    """
    if threading.current_thread() is self._thread:  # by a future's callback
      return do()
    answer: futures.Future[_T] = futures.Future()

    def command() -> None:
      try:
        answer.set_result(do())
      except BaseException as error:  # sys.exit() is its caller's, too.
        answer.set_exception(error)

    if not self._send(command):
      raise errors.BusyError('call: the background thread is closed.')
    return answer.result()

  def update_params(self, params: Any, **options: Any) -> None:
    """Serves new weights from the next step on; see `LLM.update_params`."""
    self.call(lambda: self._llm.update_params(params, **options))

  def sleep(self) -> None:
    """Gives the KV cache's memory back; see `LLM.sleep`."""
    self.call(self._llm.sleep)

  def wake(self) -> None:
    """Takes it again, and goes on; see `LLM.wake`."""
    self.call(self._llm.wake)

  def pause(self) -> None:
    """Makes no step until `resume`; requests stay where they are."""
    self.call(lambda: self._set_paused(True))

  def resume(self) -> None:
    """Goes on after `pause`."""
    self.call(lambda: self._set_paused(False))

  def close(self) -> None:
    """Cancels what is under way, and lets other threads use the LLM."""
    with contextlib.suppress(errors.BusyError):
      self.call(self._stop)
    if threading.current_thread() is not self._thread:
      self._thread.join()

  def __enter__(self) -> Background:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _send(self, command: Callable[[], object]) -> bool:
    """Has the thread do something; returns False if it is closed."""
    with self._lock:
      if self._is_open:
        self._commands.put(command)
      return self._is_open

  # -- In the thread --

  def _run(self, began: futures.Future[None]) -> None:
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(self._llm._runs.turns.take('background'))
      except errors.BusyError as error:
        self._is_open = False
        began.set_exception(error)
        return
      began.set_result(None)
      try:
        while self._is_open:
          self._obey(waits=not self._can_step())
          if self._can_step():
            self._step()
      finally:
        self._stop()
        self._obey(waits=False)  # Whoever came at the last moment.

  def _can_step(self) -> bool:
    runner = self._llm._runner
    return (
      bool(self._jobs)
      and not self._is_paused
      and not runner.is_asleep
      and runner.has_params
    )

  def _obey(self, *, waits: bool) -> None:
    """Does what was sent; `waits` for it if there is nothing."""
    if waits:
      self._commands.get()()
    with contextlib.suppress(queue.Empty):
      while True:
        self._commands.get_nowait()()

  def _step(self) -> None:
    try:
      self._llm._runs.step()
    except Exception as error:  # A device's faults have no common type.
      for job in self._jobs:
        self._abandon(job)
        if job.future.set_running_or_notify_cancel():
          job.future.set_exception(error)
      self._jobs = []
      return
    done = [job for job in self._jobs if job.read()]
    self._jobs = [job for job in self._jobs if job not in done]
    for job in done:
      job.finish()

  def _begin(self, job: _Job) -> None:
    if not self._is_open:
      job.future.cancel()
    elif not job.future.cancelled():
      self._jobs.append(job)
      for request in job.requests:
        self._llm._runs.begin(request, job)

  def _drop(self, job: _Job) -> None:
    if job in self._jobs:
      self._jobs.remove(job)
      self._abandon(job)

  def _abandon(self, job: _Job) -> None:
    self._llm._runs.abandon({r.request_id for r in job.requests})

  def _set_paused(self, is_paused: bool) -> None:
    self._is_paused = is_paused

  def _stop(self) -> None:
    with self._lock:
      self._is_open = False
    jobs, self._jobs = self._jobs, []
    for job in jobs:
      self._abandon(job)
      job.future.cancel()

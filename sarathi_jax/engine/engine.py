# SPDX-License-Identifier: Apache-2.0
"""The serving loop: schedule, launch, fetch, complete. No JAX, no gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import time
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import logging

from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import adapters as adapters_lib
from sarathi_jax.engine import checks
from sarathi_jax.engine import following
from sarathi_jax.engine import info as info_lib
from sarathi_jax.engine import live as live_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.engine import state
from sarathi_jax.engine import step_times
from sarathi_jax.scheduler import pace as pace_lib
from sarathi_jax.scheduler import page_log
from sarathi_jax.scheduler import runner as runner_lib
from sarathi_jax.scheduler import sequence
from sarathi_jax.text import detokenizer
from sarathi_jax.text import tokenizer as tokenizer_lib

_ERROR, _STOP = types.FinishReason.ERROR, types.FinishReason.STOP
# Requests' lists of words of which it is remembered what was found in them.
_KEPT_WORDS = 1024
Pending = runner_lib.Pending
Runner = runner_lib.Runner
EngineInfo = info_lib.EngineInfo


class _InFlight(NamedTuple):
  """A batch between its launch and its completion."""

  batch: types.ScheduledBatch
  pending: Pending
  num_rows: int
  launched: float  # seconds on the engine's clock


class Engine:
  """Runs requests to their end, one hybrid batch after another.

  One thread at a time may call it, except `check`, which is pure.

  Args:
    scheduler: decides each step.
    runner: computes it.
    info: what is served.
    tokenizer: None for token ids in and out only.
    clock: returns seconds, monotonic.
    adapters: name -> the matrices of each that requests may name.

  Attributes:
    adapters: those that are loaded.
    weight_version: which weights are served: 0 at first, see `new_weights`.
  """

  def __init__(
    self,
    scheduler: scheduler_lib.Scheduler,
    runner: Runner,
    *,
    info: EngineInfo,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    clock: Callable[[], float] = time.monotonic,
    adapters: Mapping[str, Any] = MappingProxyType({}),
  ) -> None:
    self._info = info
    self.adapters = adapters_lib.Adapters(adapters, info.model_name)
    self.weight_version = 0
    self.tokenizer = tokenizer
    self.clock = clock
    self.metrics = metrics_lib.EngineMetrics()
    # So those of a request are tokenized once, by `check`, on another thread.
    self._bad_words_of = functools.lru_cache(_KEPT_WORDS)(
      functools.partial(checks.bad_words_of, tokenizer)
    )
    self._has_special = functools.lru_cache(_KEPT_WORDS)(
      functools.partial(
        detokenizer.has_special,
        tokenizer.special_tokens.values() if tokenizer else (),
      )
    )
    self._following = following.Following(tokenizer, info)
    self._scheduler = scheduler
    self._runner = runner
    self._live: dict[str, live_lib.Live] = {}  # by the sequence's key
    # Of requests of several sequences, the keys of those that go on.
    self._several: dict[str, list[str]] = {}
    self._in_flight: deque[_InFlight] = deque()
    self._observers: tuple[state.Observer, ...] = ()
    self._steps = step_times.StepTimes(scheduler.config.num_stages)
    self._last_step_tokens = 0
    # The batch that the runner is working on: the culprit, if that raises.
    self._suspect: types.ScheduledBatch | None = None
    self._drained: list[types.OutputDelta] = []  # not yet returned by step

  @property
  def info(self) -> EngineInfo:
    """What is served at the moment; any thread may read it."""
    return dataclasses.replace(
      self._info,
      token_budget=self._scheduler.config.token_budget,
      adapters=self.adapters.names,
    )

  def check(self, request: types.Request) -> None:
    """Raises InvalidRequestError for a request that can never be served."""
    self._scheduler.check(request)
    checks.check_tokens(request, self._info)
    sampling = request.sampling
    if sampling.stop and self.tokenizer is None:
      raise errors.UnsupportedError(
        f'stop={errors.shown(sampling.stop)}: this model has no tokenizer, so '
        'its output has no text to find stop strings in; use stop_token_ids.'
      )
    if sampling.stop:
      self._has_special(sampling.stop)
    bad_words = self._bad_words_of(sampling.bad_words)
    grammar = self._following.compile(sampling)
    checks.check_some_are_left(
      request,
      bad_words,
      self._info.eos_token_ids,
      None if grammar is None else grammar.begins,
    )

  def prepared(self, request: types.Request) -> types.Request:
    """Returns a checked request with what `add` would take time for."""
    if request.sampling.structured_outputs is None:
      return request
    return dataclasses.replace(
      request, grammar=self._following.compile(request.sampling)
    )

  def warm_up_grammars(self) -> None:
    """Reads the vocabulary for grammars now, which keeps all threads.

    Takes a second for 150,000 tokens; otherwise the first request with a
    grammar does.
    """
    if self.tokenizer is not None and self._info.grammars:
      self._following.grammars.warm_up()

  def add(self, request: types.Request) -> None:
    """Queues a request that `check` accepted, with a key of its own."""
    assert request.key not in self._live, f'{request.key}: is there already'
    bad_words = self._bad_words_of(request.sampling.bad_words)
    self._following.add(request)
    seqs = self._scheduler.add(request, bad_words)
    has_grammar = request.sampling.structured_outputs is not None
    stops = request.sampling.stop
    has_special = bool(stops) and self._has_special(stops)
    for seq in seqs:
      detok = None
      if self.tokenizer is not None:
        detok = detokenizer.Detokenizer(self.tokenizer, request, has_special)
      self._live[seq.key] = live_lib.Live(seq, detok, has_grammar)
    if len(seqs) > 1:
      self._several[request.key] = [seq.key for seq in seqs]

  def abort(self, request_id: str) -> bool:
    """Drops a request and frees its pages; returns False if it is unknown."""
    num_aborted = self._drop(request_id)
    if num_aborted:
      self._drained = [d for d in self._drained if d.request_id != request_id]
      self.metrics.num_aborted += num_aborted
    return num_aborted > 0

  @property
  def pace(self) -> pace_lib.Pace | None:
    """The pace that the budget follows, with its model of step times.

    None where the budget follows none.
    """
    return self._scheduler.pace

  @property
  def has_work(self) -> bool:
    return bool(self._live or self._in_flight or self._drained)

  @property
  def step_at(self) -> float:
    """When to call `step` next, on the clock; any time past is now.

    While a batch computes, the next one may still change: what is added before
    this time is in it. So a prompt waits for the step under way, and not for
    another one that was planned without it. It is early enough for the device
    not to wait. Pipeline stages have batches to compute at any time.
    """
    if len(self._in_flight) != 1 or self._scheduler.config.num_stages > 1:
      return 0.0
    ahead = self._in_flight[0]
    return self._steps.next_launch(ahead.num_rows, ahead.launched)

  def step(self) -> list[types.OutputDelta]:
    """Launches what can be launched, then completes the oldest batch.

    Returns:
      What requests gained by it.
    """
    while (batch := self._scheduler.schedule(now := self.clock())).chunks:
      self._suspect = batch
      pending = self._runner.launch(batch)
      self._suspect = None
      self._following.launched(batch, pending)
      self._send_masks()
      num_rows = self._runner.num_rows(batch.size)
      self._in_flight.append(_InFlight(batch, pending, num_rows, now))
      self._last_step_tokens = batch.num_tokens
      self.metrics.record_step(
        batch.num_tokens,
        num_rows,
        self._scheduler.config.token_budget,
        self._steps.launched(num_rows),
      )
    if self._in_flight:
      self._complete_oldest()
    outputs, self._drained = self._drained, []
    return outputs

  def drain(self) -> None:
    """Completes the batches in flight; `step` returns their outputs."""
    while self._in_flight:
      self._complete_oldest()

  def invalidate_cache(self) -> None:
    """Drops the whole KV cache, for new weights; recomputes what is running."""
    self.drain()
    self._scheduler.preempt_all()

  def new_weights(
    self, version: int | None = None, *, keeps: bool = False
  ) -> None:
    """Is told that other weights are served from now on.

    Args:
      version: a number for them; None: one more than the last.
      keeps: whether what runs goes on with its pages, or is recomputed.
    """
    self.drain()
    self._scheduler.new_weights(keeps=keeps)
    last = self.weight_version
    self.weight_version = last + 1 if version is None else version

  def reset_prefix_cache(self) -> bool:
    """Forgets what prompts could begin with; False while there are requests.

    Theirs is in use: `invalidate_cache` recomputes them. Those that are gone,
    but for a batch in flight, put nothing there any more.
    """
    if self._live:
      return False
    self._scheduler.pages.unregister_all()
    return True

  def keep_page_log(self) -> None:
    """Keeps a log of what can be found in the cache; before any request.

    Without a prefix cache there is nothing to keep one of.
    """
    self._scheduler.prefixes.keep_log()

  @property
  def page_log(self) -> page_log.PageLog | None:
    """The log of what can be found in the cache; None without."""
    return self._scheduler.pages.log

  def recover(self, fault: Exception) -> list[str]:
    """Goes on after `step` raised `fault`, if the device can.

    Gives up the requests of the batch that failed, and recomputes the others.

    Returns:
      The keys of the requests that were given up.

    Raises:
      Exception: `fault`, if it is not the runner's, or what the runner raised
        when it tried to go on.
    """
    suspect, self._suspect = self._suspect, None
    if suspect is None:
      raise fault
    self.metrics.num_step_faults += 1
    self._in_flight.clear()
    self._following.forget_in_flight()
    self._scheduler.forget_in_flight()
    self._runner.recover()
    in_it = [self._live.get(chunk.request_id) for chunk in suspect.samplers]
    failed = list(dict.fromkeys(live.seq.request.key for live in in_it if live))
    for key in failed:
      self._drop(key)
    self._drained = [d for d in self._drained if d.request_id not in failed]
    return failed

  def set_token_budget(self, token_budget: int) -> None:
    """Changes the most tokens of a step, from the next one on.

    Raises:
      InvalidRequestError: it is less than max_num_seqs, or more than what
        was compiled.
    """
    least, most = self._info.max_num_seqs, self._info.token_budget
    if not least <= token_budget <= most:
      raise errors.InvalidRequestError(
        f'token_budget={token_budget}: must be in [{least}, {most}]: from '
        'max_num_seqs to what was compiled.'
      )
    self._scheduler.set_token_budget(token_budget)

  def observe(self, observer: state.Observer, *, on: bool = True) -> None:
    """Begins to tell `observer` what the engine does, or ends it.

    Args:
      observer: whom to tell.
      on: whether to begin or to end.
    """
    self._observers = tuple(o for o in self._observers if o is not observer)
    if on:
      self._observers += (observer,)

  def room(self, priority: int) -> tuple[int, int]:
    """Returns (sequences, tokens) that a step could begin beside the waiting.

    Args:
      priority: of the requests to begin; waiting ones that are less urgent
        don't count.
    """
    return state.room(self._scheduler, priority)

  def num_missing(self, request: types.Request) -> int:
    """Returns the tokens of a request that its prefill would compute now.

    Any thread may ask. It hashes the prompt: some microseconds a page.
    """
    prefixes = self._scheduler.prefixes
    return prefixes.num_missing(prefixes.looked_for(request))

  @property
  def cache_aware_window(self) -> int:
    """See `EngineConfig`."""
    return self._scheduler.config.cache_aware_window

  def looked_for(self, request: types.Request) -> sequence.Sequence:
    """Returns what `most_found` compares, of a request that was not added."""
    return self._scheduler.prefixes.looked_for(request)

  def most_found(self, few: Iterable[sequence.Sequence]) -> sequence.Sequence:
    """Returns the one of which the most is in the cache; of equals the first.

    It looks for each once, and again only where that may be gone.
    """
    return next(self._scheduler.prefixes.by_found(few))

  def num_output(self, key: str) -> int:
    """Returns the tokens generated so far by what goes on of a request."""
    return sum(
      self._live[k].seq.num_output
      for k in self._several.get(key, (key,))
      if k in self._live
    )

  def requests(self) -> list[state.RequestState]:
    """Returns how far each sequence is, by arrival."""
    now = self.clock()
    return [state.request_state(live.seq, now) for live in self._live.values()]

  def adapter_states(self) -> list[state.AdapterState]:
    """Returns how much each adapter is used, in the order of their loading."""
    return state.adapter_states(self._scheduler, self.adapters)

  def load(self) -> state.Load:
    """Returns what routers go by, at this moment."""
    return state.load(self._scheduler, self.metrics)

  def stats(self) -> state.EngineStats:
    """Returns all that is known of the load at this moment."""
    return state.engine_stats(
      self._scheduler,
      self.metrics,
      num_in_flight=len(self._in_flight),
      last_step_tokens=self._last_step_tokens,
    )

  def _complete_oldest(self) -> None:
    """Completes the oldest batch; `_drained` gets what requests gained."""
    batch, pending, num_rows, launched = self._in_flight.popleft()
    start = self.clock()
    self._suspect = batch
    sampled = self._runner.fetch(pending)
    self._suspect = None
    now = self.clock()
    self.metrics.wait_s += now - start
    began = self._steps.completed(num_rows, launched, now)
    self.metrics.busy_s += now - began
    for observer in self._observers:
      observer.on_step(batch, num_rows, launched, began, now)
    events = self._scheduler.complete(batch, sampled)
    self._following.advance(events)
    try:
      self._send_masks()  # First, as the device may be waiting for them.
    finally:  # What was gained is told even if that fails.
      self._drained += self._deltas(events, now, sampled.tells)

  def _deltas(
    self, events: list[types.TokenEvent], now: float, tells: bool
  ) -> list[types.OutputDelta]:
    lives = [self._live[event[0]] for event in events]
    num_gained = len(events)
    while num_gained and events[num_gained - 1].finish_reason is _ERROR:
      num_gained -= 1
    self.metrics.record_tokens(lives[:num_gained], now, self._steps.cycle_s)
    outputs = [
      self._output(event, live, now)
      for event, live in zip(events, lives, strict=True)
    ]
    if tells:
      outputs = [
        output._replace(
          told=event.told[: len(output.token_ids)],
          prompt_logprobs=event.prompt_logprobs,
        )
        for output, event in zip(outputs, events, strict=True)
      ]
    if self.weight_version:
      outputs = [o.with_version(self.weight_version) for o in outputs]
    self.metrics.num_generated += sum([len(o.token_ids) for o in outputs])
    if self._several:
      outputs = list(map(self._of_request, outputs, lives))
    return outputs

  def _send_masks(self) -> None:
    while (ready := self._following.ready()) is not None:
      self._suspect = ready.batch
      if ready.masks:
        self._runner.mask(ready.pending, ready.masks)
      self._suspect = None

  def _of_request(
    self, output: types.OutputDelta, live: live_lib.Live
  ) -> types.OutputDelta:
    """Returns a sequence's output as one of its request's."""
    seq = live.seq
    left = self._several.get(seq.request.key)
    if left is None:
      return output
    if output.finish_reason is not None:
      left.remove(seq.key)
    if not left:
      del self._several[seq.request.key]
    return output._replace(
      request_id=seq.request.key, output_index=seq.index, num_left=len(left)
    )

  def _drop(self, key: str) -> int:
    """Gives up what goes on of a request; returns how many sequences."""
    keys = self._several.pop(key, (key,))
    lives = [self._live.pop(k) for k in keys if k in self._live]
    for live in lives:
      self._following.drop(live.seq.key)
      self._scheduler.remove(live.seq)
    return len(lives)

  def _output(
    self, event: types.TokenEvent, live: live_lib.Live, now: float
  ) -> types.OutputDelta:
    request_id, tokens, logprobs, reason, _, _ = event
    text = ''
    stop_reason: int | str | None = None
    if reason is _ERROR:
      logging.log_every_n_seconds(
        logging.ERROR,
        '%s: ends, as no token can be sampled: its logits are NaN or infinite '
        '(the weights may be), or all that its sampling allows is ruled out.',
        10,
        live.seq.request.request_id,
      )
    elif live.detokenizer is not None:
      if len(tokens) == 1:
        text, stop_reason = live.detokenizer.step(tokens[0], reason is _STOP)
      else:
        text, stop_reason, num = live.detokenizer.read(tokens, reason is _STOP)
        tokens, logprobs = tokens[:num], logprobs[:num]
    if live.has_grammar and reason is None and stop_reason is None:
      reason = self._end_of_grammar(live)
    if reason is None and stop_reason is None:
      return types.OutputDelta(request_id, text, tokens, logprobs)
    if live.detokenizer is not None and stop_reason is None:
      text += live.detokenizer.flush()
    if stop_reason is not None:
      if reason is None:
        self._scheduler.remove(live.seq)
      reason = _STOP
    elif (
      reason is _STOP and tokens[-1] in live.seq.request.sampling.stop_token_ids
    ):
      stop_reason = tokens[-1]
    assert reason is not None
    del self._live[request_id]
    self._following.drop(request_id)
    summary = live.times.summary(
      live.seq, live.seq.num_output - len(event.tokens) + len(tokens), now
    )
    self.metrics.record_finished(summary, reason, live.seq.index)
    for observer in self._observers:
      observer.on_finished(live.seq, summary, reason, now)
    return types.OutputDelta(
      request_id, text, tokens, logprobs, reason, stop_reason, summary
    )

  def _end_of_grammar(self, live: live_lib.Live) -> types.FinishReason | None:
    """Ends a request whose grammar is over; returns why, None if it is not."""
    request = live.seq.request
    is_over, fault = self._following.end(live.seq.key)
    if not is_over:
      return None
    self._scheduler.remove(live.seq)
    if not fault:
      return _STOP
    logging.log_every_n_seconds(
      logging.ERROR,
      '%s: ends, as its grammar gave up: %s',
      10,
      request.request_id,
      errors.cut(fault),
    )
    return _ERROR

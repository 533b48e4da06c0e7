# SPDX-License-Identifier: Apache-2.0
"""The progress of one sequence: of a request, or of one of its several."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import itertools

from sarathi_jax import config as config_lib
from sarathi_jax import sampling_params
from sarathi_jax import types

_MIN_SEED = sampling_params.MIN_SEED


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
  """Its tokens and place in the KV cache. Only the scheduler writes it.

  A request has `sampling.n` of them. The first one computes the prompt; the
  others are its forks until then, begin where its prefill ends, and share its
  pages.

  Prefill, chunk, decode and recompute are all "compute the next n tokens".
  Tokens [0, num_computed) are in the cache, or will be once the batches in
  flight ran. Then come the rest of `tokens`, and `num_pending` more that
  batches in flight sample and only the device knows.

  Attributes:
    request: the request.
    index: which of the request's sequences it is, from 0.
    key: `request.key_of(index)`.
    urgency: (priority, order of arrival); the smallest is the most urgent.
    seed: of its random numbers: the request's, and one more for each index.
    stop_ids: tokens that end it.
    setup: what its slot is set up with, but for its tokens; None if its logits
      are not adjusted.
    prompt_len: tokens of the prompt.
    max_len: its length, prompt and output, at which it ends.
    rope_len: see `types.Chunk`.
    tokens: prompt and output, as far as the host knows them.
    num_computed: see above.
    num_pending: see above.
    prefill_len: tokens to compute before the next one is sampled, set when
      it is admitted: the prompt, and after a preemption the output too.
    num_prefilled: tokens of the prompt that were computed at least once.
    slot: its row on the device while it runs, else -1.
    is_set_up: whether a chunk of it told the device what `setup` has, since
      it has its slot.
    adapter_slot: see `types.Chunk.adapter`, while it runs.
    forks: the sequences that begin where its prefill ends; they run when it
      does, and have slots, but are in no queue.
    pages: its pages of the cache, in order; see `grouped` where layers form
      several groups.
    num_behind: of each group with a window, its first pages that were given
      back; for several groups, of all.
    page_table: the same pages, as the tuple that chunks share.
    copy_from: the page after these that it shares, one of each group, of which
      it has to have a copy before it writes; empty for none.
    room: tokens for which it has pages that it may write to.
    keys: of its first full pages, as far as they were needed.
    contents: the tokens of these pages, int32, which `keys` are made of.
    num_registered: its first places whose pages others can find.
    full_at: the tokens in the cache with which one more page can be found; 0
      if it was not looked at yet.
    keeps_to_itself: whether others must not find its pages, as they hold what
      weights gave that are no more served.
    found: while it waits, pages that hold its beginning; as `pages`.
    found_at: what the pool had forgotten when these were found.
    found_after: what the pool had registered and forgotten then, where groups
      have windows.
    waits_since: the step from which on it waits for what another computes.
    num_passed: sequences that came later and went first; see `passing`.
    num_cached: tokens of the prompt that were found, and not computed.
    num_in_flight: the number of batches in flight that hold it.
    last_step: the step of the last batch that held it.
    num_preemptions: how often its pages were taken back.
    first_scheduled_time: seconds on the engine's clock; None before.
    prompt_logprobs: what is told of the prompt so far, from its second token
      on; None if nothing is, or it was all given with the first token.
    is_finished: whether it ended or was removed; results still in flight are
      then void.
  """

  request: types.Request
  index: int
  key: str
  urgency: tuple[int, int]
  seed: int
  stop_ids: frozenset[int]
  setup: types.SlotSetup | None
  prompt_len: int
  max_len: int
  rope_len: int
  tokens: list[int]
  num_computed: int = 0
  num_pending: int = 0
  prefill_len: int = 0
  num_prefilled: int = 0
  slot: int = -1
  is_set_up: bool = False
  adapter_slot: int = 0
  forks: list[Sequence] = dataclasses.field(default_factory=list)
  pages: list[int] = dataclasses.field(default_factory=list)
  num_behind: list[int] = dataclasses.field(default_factory=list)
  page_table: tuple[int, ...] = ()
  copy_from: tuple[int, ...] = ()
  room: int = 0
  keys: list[bytes] = dataclasses.field(default_factory=list)
  contents: list[bytes] = dataclasses.field(default_factory=list)
  num_registered: int = 0
  full_at: float = 0
  keeps_to_itself: bool = False
  found: list[int] = dataclasses.field(default_factory=list)
  found_at: int = 0
  found_after: tuple[int, int] | None = None
  waits_since: int | None = None
  num_passed: int = 0
  num_cached: int = 0
  num_in_flight: int = 0
  last_step: int = -1
  num_preemptions: int = 0
  first_scheduled_time: float | None = None
  prompt_logprobs: list[types.TokenLogprobs] | None = None
  is_finished: bool = False

  @classmethod
  def of(
    cls,
    request: types.Request,
    config: config_lib.SchedulerConfig,
    order: int,
    seed: int,
    bad_words: tuple[tuple[int, ...], ...] = (),
    first: Sequence | None = None,
    index: int = 0,
  ) -> Sequence:
    """Makes a sequence of a request that came after `order` others.

    Args:
      request, config: the request, and the scheduler's limits.
      order: how many came before.
      seed: of the request's random numbers.
      bad_words: the token ids of each of the request's.
      first: the request's first, which has what is the same for all of them;
        None to make it.
      index: which of the request's sequences.
    """
    sampling = request.sampling
    prompt_len, max_len = lens_of(request, config)
    return cls(
      request=request,
      index=index,
      key=request.key_of(index),
      urgency=(request.priority, order),
      # As vLLM derives it; what is too large is the smallest again.
      seed=(seed + index - _MIN_SEED) % 2**64 + _MIN_SEED,
      stop_ids=first.stop_ids if first else _stop_ids(sampling, config),
      setup=first.setup if first else _setup(sampling, config, bad_words),
      prompt_len=prompt_len,
      max_len=max_len,
      rope_len=max_len if config.rope_counts_outputs else prompt_len,
      tokens=list(request.prompt_token_ids),
      # Told once, with the first of several outputs.
      prompt_logprobs=None if index or sampling.prompt_logprobs is None else [],
    )

  @property
  def num_output(self) -> int:
    return len(self.tokens) - self.prompt_len

  @property
  def is_prefilling(self) -> bool:
    return self.num_computed < self.prefill_len

  @property
  def num_left(self) -> int:
    """The tokens of the prefill that are still to be computed."""
    return self.prefill_len - self.num_computed

  def end(self, num_new: int) -> tuple[int, types.FinishReason]:
    """Drops the tokens after the one that ends the sequence.

    Args:
      num_new: how many of the last tokens are new; one of them ends it.

    Returns:
      How many of the new tokens are left, and why it ends.
    """
    first = len(self.tokens) - num_new
    stop, reason = self.max_len, types.FinishReason.LENGTH
    for i, token in enumerate(self.tokens[first:stop], first):
      if token in self.stop_ids:
        stop, reason = i + 1, types.FinishReason.STOP
        break
    del self.tokens[stop:]
    return stop - first, reason

  def next_token(self, stop: int) -> int | None:
    """Returns the `Chunk.next_token` of a chunk that ends before `stop`."""
    assert self.prompt_logprobs is not None
    if stop >= self.prompt_len:
      return -1
    # Recomputed; what is told of it is there already.
    is_told = stop <= len(self.prompt_logprobs)
    return None if is_told else self.tokens[stop]

  def keep_told(self, start: int, told: types.Told) -> None:
    """Keeps what is told of a part of the prompt, if it is not there already.

    Args:
      start: of the chunk that it is told of.
      told: of the successors of its tokens.
    """
    if self.prompt_logprobs is not None:
      self.prompt_logprobs += told[len(self.prompt_logprobs) - start :]

  def take_told(self) -> types.Told | None:
    """Returns what is told of the prompt, once."""
    told, self.prompt_logprobs = self.prompt_logprobs, None
    return None if told is None else tuple(told)

  def count_prefilled(self, stop: int) -> int:
    """Notes that tokens [0, stop) were computed.

    Returns:
      How many of the prompt's tokens were computed for the first time, and not
      again after a preemption.
    """
    new = max(min(stop, self.prompt_len) - self.num_prefilled, 0)
    self.num_prefilled += new
    return new


def with_told(
  events: list[types.TokenEvent],
  seqs: Iterable[Sequence],
  sampled: types.Sampled,
) -> list[types.TokenEvent]:
  """Returns events with what is told of their tokens, and of prompts, once."""
  told = sampled.told or itertools.repeat(())
  of = {seq.key: (seq, at) for seq, at in zip(seqs, told, strict=False)}
  return [
    event._replace(
      told=of[event.request_id][1][: len(event.tokens)],
      prompt_logprobs=of[event.request_id][0].take_told(),
    )
    for event in events
  ]


def lens_of(
  request: types.Request, config: config_lib.SchedulerConfig
) -> tuple[int, int]:
  """Returns the prompt's length, and the most that a sequence may come to."""
  prompt_len = len(request.prompt_token_ids)
  room = config.max_model_len - prompt_len
  return prompt_len, prompt_len + min(request.sampling.max_tokens or room, room)


def _stop_ids(
  sampling: types.SamplingParams, config: config_lib.SchedulerConfig
) -> frozenset[int]:
  return frozenset(sampling.stop_token_ids).union(
    () if sampling.ignore_eos else config.eos_token_ids
  )


def _setup(
  sampling: types.SamplingParams,
  config: config_lib.SchedulerConfig,
  bad_words: tuple[tuple[int, ...], ...],
) -> types.SlotSetup | None:
  if not sampling.is_adjusted:
    return None
  # As in vLLM, the model's own end even if it would be ignored.
  ends = (*config.eos_token_ids, *sampling.stop_token_ids)
  return types.SlotSetup((), ends if sampling.min_tokens else (), bad_words)

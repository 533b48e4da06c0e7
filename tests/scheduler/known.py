# SPDX-License-Identifier: Apache-2.0
"""A sequence as it is seen from outside the scheduler."""

from __future__ import annotations

import dataclasses

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax import types
from tests.scheduler import simulated


@dataclasses.dataclass(eq=False, slots=True)
class Known:
  """What is known of one sequence of a request from the outside.

  Attributes:
    request: what was asked.
    index: which of the request's it is.
    order: counts the sequences as they were added.
    max_len: its length at which it must end.
    num_computed: tokens in the cache.
    num_settled: tokens in the cache as far as completed batches tell.
    num_tokens: its length, tokens still on the device included.
    num_on_host: its length as far as completed batches tell.
    newest_step: the step that sampled its newest token; -1 for the prompt.
    flights: steps in flight that hold it.
    num_waited: steps since it could decode, that it was not in.
    is_gone: finished or removed.
    first: the sequence at the end of whose prefill it begins; None since then.
    num_passed: how many that came later were admitted before it.
    chain: for each of its first tokens a number that stands for all up to it.
  """

  request: types.Request
  index: int
  order: int
  max_len: int
  num_computed: int = 0
  num_settled: int = 0
  num_tokens: int = 0
  num_on_host: int = 0
  newest_step: int = -1
  flights: set[int] = dataclasses.field(default_factory=set)
  seed: int | None = None
  finish_reason: types.FinishReason | None = None
  num_waited: int = 0
  is_gone: bool = False
  first: Known | None = None
  num_passed: int = 0
  chain: list[int] = dataclasses.field(default_factory=list)

  @property
  def id(self) -> str:
    return self.request.key_of(self.index)

  @property
  def prompt_len(self) -> int:
    return len(self.request.prompt_token_ids)

  @property
  def urgency(self) -> tuple[int, int]:
    """The smallest is the most urgent."""
    return self.request.priority, self.order

  def token(self, position: int) -> int:
    if position < self.prompt_len:
      return self.request.prompt_token_ids[position]
    return simulated.token_at(self.id, position)

  def content(self, position: int) -> int:
    """Returns what stands for all tokens up to a position."""
    while len(self.chain) <= position:
      token = self.token(len(self.chain))
      before = self.chain[-1] if self.chain else 0
      self.chain.append(hash((before, token, self.request.cache_salt)))
    return self.chain[position]

  def check_windows(
    self, pages: list[int], config: config_lib.SchedulerConfig
  ) -> None:
    """What no token yet to be computed attends to is given back; no more."""
    size, settled = config.page_size, self.num_settled
    for group, window in enumerate(config.windows):
      mine = pages[group :: len(config.windows)]
      first = mine.count(page_groups.NOWHERE)
      assert page_groups.NOWHERE not in mine[first:], 'a page is missing'
      assert first <= page_groups.first_place(window, settled, size), (
        f'{self.id}: gave back what is yet to be read'
      )
      # As soon as a page is full.
      settled_pages = settled // size * size
      assert not mine or first >= min(
        len(mine), page_groups.first_place(window, settled_pages, size)
      ), f'{self.id}: keeps what nobody reads'

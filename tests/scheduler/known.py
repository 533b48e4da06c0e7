# SPDX-License-Identifier: Apache-2.0
"""A request as it is seen from outside the scheduler."""

from __future__ import annotations

import dataclasses

from sarathi_jax import types


@dataclasses.dataclass(eq=False, slots=True)
class Known:
  """What is known of one request from the outside.

  Attributes:
    request: what was asked.
    order: counts the requests as they were added.
    max_len: its length at which it must end.
    num_computed: tokens in the cache.
    num_tokens: its length, tokens still on the device included.
    num_on_host: its length as far as completed batches tell.
    newest_step: the step that sampled its newest token; -1 for the prompt.
    flights: steps in flight that hold it.
    num_waited: steps since it could decode, that it was not in.
    is_gone: finished or removed.
  """

  request: types.Request
  order: int
  max_len: int
  num_computed: int = 0
  num_tokens: int = 0
  num_on_host: int = 0
  newest_step: int = -1
  flights: set[int] = dataclasses.field(default_factory=set)
  seed: int | None = None
  finish_reason: types.FinishReason | None = None
  num_waited: int = 0
  is_gone: bool = False

  @property
  def id(self) -> str:
    return self.request.request_id

  @property
  def urgency(self) -> tuple[int, int]:
    """The smallest is the most urgent."""
    return self.request.priority, self.order

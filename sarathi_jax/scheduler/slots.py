# SPDX-License-Identifier: Apache-2.0
"""The device's slots, of which each running sequence has one."""

from __future__ import annotations

from sarathi_jax.scheduler import adapter_slots
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import urgency

Sequence = sequence.Sequence


class Slots:
  """Hands out slots; the first ones to sequences whose logits are adjusted.

  Others have these, too, where no other slot is free.

  Args:
    num: how many there are.
    num_adjusted: how many of them, the first ones, have room for adjustments.
    num_adapters: how many adapters they may have at once.

  Attributes:
    adapters: the slots of these.
    able: see `adapter_slots`; None if no sequence has an adapter.
  """

  def __init__(
    self, num: int, num_adjusted: int, num_adapters: int = 0
  ) -> None:
    # Those that run at once may pass: a slot is kept for at most so many more.
    self.adapters = adapter_slots.AdapterSlots(num_adapters, most_passed=num)
    self.able: urgency.Able = self.adapters.able if num_adapters else None
    slots = list(range(num))[::-1]
    self._num_adjusted = num_adjusted
    self._others = slots[: num - num_adjusted]
    self._adjusted = slots[num - num_adjusted :]

  def num_free(self, *, is_adjusted: bool = False) -> int:
    """Returns how many sequences could have a slot."""
    return len(self._adjusted) + (0 if is_adjusted else len(self._others))

  def give(self, seq: Sequence) -> None:
    """Gives a sequence a slot that was free, and its adapter's."""
    is_adjusted = seq.setup is not None
    first = is_adjusted or not self._others
    seq.slot = (self._adjusted if first else self._others).pop()
    seq.is_set_up = False
    seq.adapter_slot = self.adapters.take(seq.request.adapter)

  def take_back(self, seq: Sequence) -> None:
    """Frees a sequence's slot."""
    is_adjusted = seq.slot < self._num_adjusted
    (self._adjusted if is_adjusted else self._others).append(seq.slot)
    self.adapters.give_back(seq.adapter_slot)
    seq.slot = -1

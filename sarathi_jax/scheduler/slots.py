# SPDX-License-Identifier: Apache-2.0
"""The device's slots, of which each running sequence has one."""

from __future__ import annotations


class Slots:
  """Hands out slots; the first ones to sequences whose logits are adjusted.

  Others have these, too, where no other slot is free.

  Args:
    num: how many there are.
    num_adjusted: how many of them, the first ones, have room for adjustments.
  """

  def __init__(self, num: int, num_adjusted: int) -> None:
    slots = list(range(num))[::-1]
    self._num_adjusted = num_adjusted
    self._others = slots[: num - num_adjusted]
    self._adjusted = slots[num - num_adjusted :]

  def num_free(self, *, is_adjusted: bool = False) -> int:
    """Returns how many sequences could have a slot."""
    return len(self._adjusted) + (0 if is_adjusted else len(self._others))

  def take(self, *, is_adjusted: bool) -> int:
    """Returns a slot that was free."""
    if is_adjusted or not self._others:
      return self._adjusted.pop()
    return self._others.pop()

  def give_back(self, slot: int) -> None:
    """Frees a slot."""
    is_adjusted = slot < self._num_adjusted
    (self._adjusted if is_adjusted else self._others).append(slot)

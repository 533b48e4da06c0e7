# SPDX-License-Identifier: Apache-2.0
"""The device's slots for adapters, which running sequences share."""

from __future__ import annotations

from sarathi_jax import types


class AdapterSlots:
  """Hands out slots; an adapter that nobody uses stays until one is needed.

  Then the one goes that was not used for the longest.

  Args:
    num: how many there are.
  """

  def __init__(self, num: int) -> None:
    self._num_users = [0] * num
    self.forget()

  def forget(self) -> None:
    """Takes note that all slots are empty; nobody uses one."""
    assert not any(self._num_users)
    # Slot -> what is in it, the one that was not used for the longest first.
    self._held: dict[int, types.Adapter | None] = dict.fromkeys(
      range(len(self._num_users))
    )
    self._loads: list[tuple[int, types.Adapter]] = []

  def has_room(self, adapter: types.Adapter | None) -> bool:
    """Whether `take` would find a slot."""
    return (
      adapter is None or 0 in self._num_users or adapter in self._held.values()
    )

  def take(self, adapter: types.Adapter | None) -> int:
    """Gives one more sequence its adapter's slot; returns one more than that.

    Or 0, if it has none.
    """
    if adapter is None:
      return 0
    free = (slot for slot in self._held if not self._num_users[slot])
    slot = next((s for s, held in self._held.items() if held is adapter), None)
    if slot is None:
      slot = next(free)
      self._loads.append((slot, adapter))
    del self._held[slot]
    self._held[slot] = adapter
    self._num_users[slot] += 1
    return slot + 1

  def give_back(self, number: int) -> None:
    """Takes note that a sequence ends that had this number of `take`."""
    if number:
      self._num_users[number - 1] -= 1

  def take_loads(self) -> tuple[tuple[int, types.Adapter], ...]:
    """Returns what to put into slots, since it was asked last."""
    loads, self._loads = self._loads, []
    return tuple(loads)

# SPDX-License-Identifier: Apache-2.0
"""The device's slots for adapters, which running sequences share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import itertools

from sarathi_jax import types
from sarathi_jax.scheduler import sequence

Sequence = sequence.Sequence


class AdapterSlots:
  """Hands out slots; an adapter that nobody uses stays until one is needed.

  Then the one goes that was not used for the longest.

  Args:
    num: how many there are.
    most_passed: how many that came later may take a slot before one that waits
      for one.
  """

  def __init__(self, num: int, most_passed: int) -> None:
    self._num_users = [0] * num
    self._most_passed = most_passed
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

  def able(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
    """Yields those that could begin: they have no adapter, or it finds a slot.

    Who finds none holds up nobody, until it was passed as often as may be. Then
    none that comes later takes a slot, so that one gets free.

    Args:
      waiting: in order.
    """
    is_held = False
    for seq in waiting:
      adapter = seq.request.adapter
      if adapter is None or (not is_held and self.has_room(adapter)):
        yield seq
      else:
        is_held = is_held or seq.num_passed >= self._most_passed

  def note(self, waiting: Iterable[Sequence], goes: Sequence) -> None:
    """Notes whom one passes that is about to take a slot."""
    if goes.request.adapter is not None:
      for seq in itertools.takewhile(lambda seq: seq is not goes, waiting):
        seq.num_passed += not self.has_room(seq.request.adapter)

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

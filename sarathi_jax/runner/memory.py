# SPDX-License-Identifier: Apache-2.0
"""Plans the memory that a deployment takes of each device, before loading."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import page_groups
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import adapters
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs as programs_lib


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
  """The memory of one device, in bytes where not said otherwise.

  Attributes:
    usable: the memory that may be used; None where the device can't tell.
    weights: its part of the parameters.
    state: the state that steps keep beside the cache, see `state.DeviceState`.
    temporaries: what the largest step needs beside its arguments.
    page: one page of the cache, with the heads that the device has of a group
      of its layers.
    num_pages: the number of pages in the cache; 0 if a sequence has no room.
    page_size: tokens in a page.
    max_model_len: the most tokens of a sequence.
    max_num_seqs: the most sequences running at once.
    problem: why there is no room for the cache; '' if there is.
    windows: of the groups of layers.
    chunk: the most tokens of a step.
    adapters: the room for LoRA adapters.
  """

  usable: int | None
  weights: int
  state: int
  temporaries: int
  page: int
  num_pages: int
  page_size: int
  max_model_len: int
  max_num_seqs: int
  problem: str = ''
  windows: page_groups.Windows = page_groups.ONE_GROUP
  chunk: int = 1
  adapters: int = 0

  @property
  def kv_cache(self) -> int:
    return self.num_pages * self.page

  @property
  def kv_tokens(self) -> int:
    """The tokens that the cache holds, of the longest sequences."""
    return page_groups.num_tokens(
      self.windows, self.num_pages, self.page_size, self.max_model_len
    )

  @property
  def missing(self) -> int:
    """The bytes that are missing to hold one sequence; 0 if it fits."""
    if self.usable is None or self.num_pages:
      return 0
    pages = self._pages(self.max_model_len, self.chunk)
    return (
      self.weights
      + self.adapters
      + self.state
      + self.temporaries
      + pages * self.page
      - self.usable
    )

  def num_seqs_at(self, context: int) -> int:
    """Returns the most sequences of `context` tokens that run at once."""
    pages = self._pages(context)
    # Prompts hold more before they are computed, a step's tokens of them.
    more = self._pages(context, self.chunk) - pages
    return min(self.max_num_seqs, max(self.num_pages - more, 0) // pages)

  def _pages(self, num_tokens: int, chunk: int = 1) -> int:
    return page_groups.num_pages(
      self.windows, num_tokens, self.page_size, min(chunk, num_tokens)
    )


def machine_bytes() -> int:
  """Returns the bytes of this machine's memory."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def check_weights(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  mesh: jax.sharding.Mesh,
  layout: placement.Layout,
) -> None:
  """Raises ConfigError if a device, or a CPU's machine, can't hold its weights.

  Call it before any are read. What else is needed is known later.
  """
  needed = placement.bytes_of(placement.shapes(model, mesh, layout))
  if (slots := adapters.slots_of(config)) is not None:
    needed += placement.bytes_of(adapters.shapes(model, mesh, layout, slots))
  for device in mesh.local_devices:
    stats = device.memory_stats()
    if stats is None:  # A CPU's, which can't tell.
      _check_machine(config, needed * len(mesh.local_devices), layout)
      return
    usable = stats.get('bytes_limit', math.inf) * config.memory_utilization
    config_lib.check(
      needed <= usable,
      'tp, pp',
      tuple(mesh.shape[axis] for axis in (mesh_lib.TP, mesh_lib.PP)),
      f'the weights take {needed / kv_cache.GIB:.3g} GiB of each device, and '
      f'{usable / kv_cache.GIB:.3g} GiB may be used; use more devices',
    )


def _check_machine(
  config: config_lib.EngineConfig, needed: int, layout: placement.Layout
) -> None:
  usable = machine_bytes()
  config_lib.check(
    needed <= usable,
    'dtype',
    config.dtype,
    f'the weights take {needed / kv_cache.GIB:.3g} GiB in '
    f'{layout.given_dtype}, and this '
    f'machine has {usable / kv_cache.GIB:.3g} GiB of memory'
    + (
      '; bfloat16 takes half of it' if layout.given_dtype == jnp.float32 else ''
    ),
  )


def plan(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  mesh: jax.sharding.Mesh,
  programs: programs_lib.StepPrograms,
  *,
  kv_dtype: Any,
  temporaries: int,
  device_bytes: int | None,
) -> MemoryPlan:
  """Divides up a device's memory as the engine does.

  Args:
    model, config, mesh, programs: the deployment.
    kv_dtype: dtype of the cache.
    temporaries: of the largest step, see `programs.extra_bytes`.
    device_bytes: memory of a device that JAX has; None where it can't tell.
  """
  parallelism = mesh_lib.parallelism_of(mesh)
  context = config.max_model_len or model.context_len
  weights = placement.bytes_of(programs.weights)
  state, room = programs.state_bytes, programs.adapter_bytes
  stats = (
    None
    if device_bytes is None
    else {'bytes_limit': device_bytes, 'bytes_in_use': weights + room + state}
  )
  problem = ''
  groups = kv_cache.groups_of(model, config, parallelism)
  chunk = programs.sizes[-1]
  try:
    num_pages = kv_cache.choose_num_pages(
      model, config, context, kv_dtype, [stats], temporaries, parallelism, chunk
    )
  except errors.ConfigError as error:
    num_pages, problem = 0, str(error)
  usable = (
    None
    if device_bytes is None
    else int(device_bytes * config.memory_utilization)
  )
  return MemoryPlan(
    usable=usable,
    weights=weights,
    adapters=room,
    state=state,
    temporaries=temporaries,
    page=kv_cache.page_bytes(
      model, config.page_size, kv_dtype, parallelism, groups.num_arrays
    ),
    num_pages=num_pages,
    page_size=config.page_size,
    max_model_len=page_groups.longest(
      groups.windows, num_pages, config.page_size, context, chunk
    )
    or context,
    max_num_seqs=config.max_num_seqs,
    problem=problem,
    windows=groups.windows,
    chunk=chunk,
  )

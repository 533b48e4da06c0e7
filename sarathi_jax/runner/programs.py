# SPDX-License-Identifier: Apache-2.0
"""Compiles the step for every size that it will have."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import adapters
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import compiling
from sarathi_jax.runner import copying
from sarathi_jax.runner import kept as kept_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import masking
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import page_tables
from sarathi_jax.runner import placement
from sarathi_jax.runner import state as state_lib
from sarathi_jax.runner import step

OnCompiled = compiling.OnCompiled

# The numbers of the programs that set up a slot, and that copy pages; a step's
# is its size.
SET_UP, COPY = -1, -2
PUT_ADAPTER = 0  # what other hosts are told; no program


def masked(num_rows: int) -> int:
  """Returns the number of the program that samples so many rows anew."""
  return COPY - num_rows


# On GPUs, steps of fewer tokens take as long as reading the weights: they are
# for decodes, and hybrid batches take this size.
_LEAST_HYBRID = 128

# From so many bytes of weights on, a CPU's small steps take as long as reading
# them. The steps of smaller models take as long as their many operations.
LARGE = 32 << 20


class StepPrograms:
  """The step, compiled for every size of the ladder.

  A size that was not compiled at warm-up can't be run: no request can make
  the engine compile while it serves.

  All programs are called alike, (leaves, state, ints) -> (state, outputs), of
  which there are two, see `step.stage_step`. Steps for batches with adapters
  have these among their leaves, behind the weights.
  Callers, here or on other hosts, need only a program's number and its
  integers. Beside the steps there are `SET_UP` and `COPY`, whose integers are
  `adjusting.message` and `copying.messages` and whose outputs are empty, and
  those of `masked`, see `masking`.

  Args:
    model, mesh, config: the deployment.
    layout: how the weights lie.
    kv_dtype: dtype of the cache.
    max_model_len: the most tokens of a sequence.
    max_step_tokens: the most tokens of a step.

  Attributes:
    sizes: the steps' numbers of tokens, ascending.
    others: the numbers of the other programs.
    masked: of these, those that sample rows anew -> how many rows.
    layouts: the number of a step's program, its size but for those that come
      after the largest, -> the layout of its batches.
    places: of a sequence's whole page table, that of each group of layers.
    windows: of these groups.
    weights: the weights on the mesh, as ShapeDtypeStruct.
    slots: the room for adapters; None if there is none.
    adapters: these on the mesh, as ShapeDtypeStruct; nothing if there is none.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    mesh: Mesh,
    config: config_lib.EngineConfig,
    *,
    layout: placement.Layout,
    kv_dtype: Any,
    max_model_len: int,
    max_step_tokens: int,
  ) -> None:
    self._config = config
    max_num_seqs = config.max_num_seqs
    is_cpu = mesh.devices.flat[0].platform == 'cpu'
    self.weights = placement.shapes(model, mesh, layout)
    self._deterministic = config.deterministic
    self.sizes: tuple[int, ...] = (max_step_tokens,)
    if not self._deterministic:
      self.sizes = batch_lib.ladder(
        max_step_tokens,
        max_num_seqs,
        fine=is_cpu,
        small=is_cpu and placement.bytes_of(self.weights) >= LARGE,
      )
    self._groups = kv_cache.groups_of(
      model, config, mesh_lib.parallelism_of(mesh)
    )
    self.places = math.ceil(max_model_len / config.page_size)
    self.windows = self._groups.windows
    self._num_stages = mesh.shape[mesh_lib.PP]
    # Batches of different sizes meet in a pipeline, so all have as many rows.
    rows = {
      n: min(n, max_num_seqs) if self._num_stages == 1 else max_num_seqs
      for n in self.sizes
    }
    is_apart = _tells_apart(mesh) and not self._deterministic
    self.layouts = {
      n: batch_lib.BatchLayout(
        num_tokens=n,
        num_rows=rows[n],
        num_samples=rows[n],
        pages_per_seq=tables.size
        if (tables := self._tables(n)) is not None
        else self.places,
        tables=tables,
        tells_prompts=not is_apart
        and (_tells_prompts(n) or n == self.sizes[-1]),
      )
      for n in self.sizes
    }
    # Programs beside those of the sizes are numbered after these.
    if is_apart:
      self.layouts[self.sizes[-1] + 1] = dataclasses.replace(
        self.layouts[self.sizes[-1]], tells_prompts=True
      )
    # A size -> the number of its program for decodes alone.
    self._of_decodes: dict[int, int] = {}
    if _knows_decodes(mesh) and not self._deterministic:
      for n in self.sizes[:-1]:
        if n <= max_num_seqs:
          has_both = n >= _LEAST_HYBRID
          number = n + (self.sizes[-1] + 1) * has_both
          self._of_decodes[n] = number
          self.layouts[number] = dataclasses.replace(
            self.layouts[n], decodes_only=True
          )
    self.slots = adapters.slots_of(config)
    self.adapters: list[Any] = []
    # What is added to a program's number for the same one with adapters.
    self._adapted = 0
    if self.slots is not None:
      self.adapters = adapters.shapes(model, mesh, layout, self.slots)
      self._adapted = max(self.layouts) + 1
      self.layouts |= {
        number + self._adapted: dataclasses.replace(one, has_adapters=True)
        for number, one in self.layouts.items()
      }
    self._model = model
    self._mesh = mesh
    self._dtype = layout.dtype
    self._kv_dtype = kv_dtype
    num_adjusted = config.num_adjusted_seqs(model.vocab_size)
    # Numbers of the programs that sample rows anew -> how many.
    self.masked = {
      masked(n): n
      for n in (masking.sizes(max_num_seqs) if config.grammars else ())
      if not self._deterministic or n == max_num_seqs
    }
    self.others = (
      *([SET_UP] if num_adjusted else ()),
      *([COPY] if max_num_seqs > 1 else ()),  # else none share pages
      *self.masked,
      *(self.layouts.keys() - set(self.sizes)),
    )
    self._steps: dict[int, Any] = {}

  @property
  def pages_per_seq(self) -> int:
    """Pages that a sequence has, if none is given back."""
    return self.places * len(self.windows)

  def _tables(self, size: int) -> page_tables.PageTables | None:
    """Returns how a step of some size is sent page tables."""
    if self.windows == page_groups.ONE_GROUP:
      return None
    return page_tables.PageTables(
      # Where keys are cut into blocks follows from where a table begins.
      (None,) * len(self.windows) if self._deterministic else self.windows,
      self._config.page_size,
      self.places,
      # Batches of different sizes meet in a pipeline.
      size if self._num_stages == 1 else self.sizes[-1],
    )

  def state_shapes(self, num_pages: int) -> state_lib.DeviceState:
    """Returns the state that steps update, as ShapeDtypeStruct.

    Raises:
      NotImplementedError: attention doesn't support such pages.
    """
    return state_lib.shapes(
      self._model,
      self._mesh,
      self._config,
      num_pages=num_pages,
      max_tokens=self.sizes[-1],
      dtype=self._dtype,
      kv_dtype=self._kv_dtype,
    )

  @property
  def adapter_bytes(self) -> int:
    """The bytes of a device that adapters take."""
    return placement.bytes_of(self.adapters)

  @property
  def state_bytes(self) -> int:
    """The bytes of a device that the state takes beside the cache."""
    return placement.bytes_of(dataclasses.replace(self.state_shapes(1), kv=[]))

  def lower(self, size: int, num_pages: int) -> Any:
    """Lowers one program; returns a jax.stages.Lowered.

    Args:
      size: of a step, or the number of another program.
      num_pages: of the cache.
    """
    if size == SET_UP:
      return self._lower_set_up(num_pages)
    if size == COPY:
      return self._lower_copy(num_pages)
    if size in self.masked:
      return self._lower_masked(self.masked[size], num_pages)
    layout = self.layouts[size]
    state = self.state_shapes(num_pages)
    leaves, treedef = jax.tree.flatten(self.weights)
    added, of_added = jax.tree.flatten(self._added(size))
    num, leaves = len(leaves), leaves + added
    spec = self._spec(size, state)

    def run(leaves: Any, state: state_lib.DeviceState, ints: Any) -> Any:
      # Flat leaves: walking the tree of weights each step costs milliseconds.
      return step.step(
        spec,
        jax.tree.unflatten(treedef, leaves[:num])
        | jax.tree.unflatten(of_added, leaves[num:]),
        state,
        ints.reshape(self._num_stages, layout.size),
      )

    ints = jax.ShapeDtypeStruct(
      (self._num_stages * layout.size,),
      jnp.int32,
      sharding=mesh_lib.on(self._mesh),
    )
    return jax.jit(run, donate_argnames='state').lower(leaves, state, ints)

  def _added(self, size: int) -> dict[str, Any]:
    """Returns what a program has beside the weights, by name."""
    return {'adapters': self.adapters} if self.has_adapters(size) else {}

  def has_adapters(self, size: int) -> bool:
    """Whether a program is a step for batches with adapters."""
    return size in self.layouts and self.layouts[size].has_adapters

  def _lower_set_up(self, num_pages: int) -> Any:
    def set_up(state: state_lib.DeviceState, ints: Any) -> Any:
      adjustments = state.slots.adjustments
      assert adjustments is not None
      slots = dataclasses.replace(
        state.slots, adjustments=adjusting.set_up(adjustments, ints)
      )
      return dataclasses.replace(state, slots=slots), (ints[:0], ints[:0])

    return self._lower_other(
      'set_up', set_up, adjusting.message().size, num_pages
    )

  def _lower_copy(self, num_pages: int) -> Any:
    lies = jax.tree.map(
      lambda leaf: leaf.sharding, self.state_shapes(num_pages).kv
    )

    def copy(state: state_lib.DeviceState, ints: Any) -> Any:
      kv = copying.copy(state.kv, ints, self._mesh, lies)
      return dataclasses.replace(state, kv=kv), (ints[:0], ints[:0])

    return self._lower_other(
      'copy', copy, copying.size(self._num_stages), num_pages
    )

  def _lower_masked(self, num_rows: int, num_pages: int) -> Any:
    return self._lower_other(
      'sample_masked',
      functools.partial(
        masking.sample,
        self._model,
        self._mesh,
        num_rows,
        deterministic=self._deterministic,
      ),
      masking.message(num_rows, self._model.vocab_size).size,
      num_pages,
    )

  def _lower_other(
    self,
    name: str,
    function: Callable[..., Any],
    num_ints: int,
    num_pages: int,
  ) -> Any:
    """Lowers (state, ints) -> (state, outputs), of so many integers."""
    state = self.state_shapes(num_pages)
    everywhere = mesh_lib.on(self._mesh)

    def run(leaves: Any, state: state_lib.DeviceState, ints: Any) -> Any:
      del leaves
      return function(state, ints)

    run.__name__ = name
    return jax.jit(
      run,
      donate_argnames='state',
      out_shardings=(
        jax.tree.map(lambda leaf: leaf.sharding, state),
        (everywhere,) * 2,
      ),
    ).lower(
      jax.tree.leaves(self.weights),
      state,
      jax.ShapeDtypeStruct((num_ints,), jnp.int32, sharding=everywhere),
    )

  def compile(
    self,
    num_pages: int,
    on_compiled: OnCompiled,
    sizes: Collection[int],
    options: Mapping[str, Any] | None = None,
    kept: kept_lib.Kept = kept_lib.NOWHERE,
  ) -> None:
    """Compiles some sizes, the largest first, several at a time.

    Args:
      num_pages: of the cache.
      on_compiled: called with the progress, at least every few seconds.
      sizes: those of `self.sizes` and `self.others` to compile.
      options: XLA's options by name, beside those of the environment.
      kept: finds steps that were compiled before, and keeps these.
    """
    # Settings that affect programs may be a thread's own: read them here.
    places = {
      n: kept.place(
        self._facts(n, num_pages, options), self._mesh.local_devices
      )
      for n in sorted(sizes, reverse=True)
    }
    self._steps |= compiling.run(
      places,
      lambda size: self.lower(size, num_pages),
      on_compiled,
      options or {},
    )

  def temp_bytes(self, num_pages: int) -> int:
    """Returns bytes of a device that any program needs; see `extra_bytes`."""
    largest = self.sizes[-1]
    return max(
      extra_bytes(self.lower(n, num_pages).compile())
      for n in (largest, *self.others)
      if n < self._adapted or n == largest + self._adapted or not self._adapted
    )

  def with_others(self, sizes: Collection[int]) -> tuple[int, ...]:
    """Returns the numbers of what is to be compiled beside steps of sizes."""
    left_out = set(self.sizes) - set(sizes)
    left_out |= {size + self._adapted for size in left_out}
    return tuple(n for n in (*sizes, *self.others) if n not in left_out)

  def size_for(
    self,
    num_tokens: int,
    *,
    decodes_only: bool = False,
    tells_prompts: bool = False,
    has_adapters: bool = False,
  ) -> int:
    """Returns the number of the smallest step that holds so many tokens.

    Args:
      num_tokens: of a batch.
      decodes_only: whether it has no chunks of prefills.
      tells_prompts: whether the step is to tell of prompts.
      has_adapters: whether it has sequences with adapters. Where rows must not
        depend on others, all steps are of that kind, if any is.
    """
    added = self._adapted * (has_adapters or self._deterministic)
    sizes = self.sizes[bisect.bisect_left(self.sizes, num_tokens) :]
    if decodes_only:
      return self._of_decodes.get(sizes[0], sizes[0]) + added
    return added + next(
      size
      for size in (*sizes, *self.others)
      if size in self.layouts
      and not self.layouts[size].decodes_only
      and not self.layouts[size].has_adapters
      and self.layouts[size].tells_prompts >= tells_prompts
    )

  def __getitem__(self, size: int) -> Any:
    return self._steps[size]

  def _spec(self, size: int, state: state_lib.DeviceState) -> step.StepSpec:
    added = self._added(size)
    return step.StepSpec(
      self._model,
      self._mesh,
      self.layouts[size],
      self._config.page_size,
      self._config.attention,
      self._dtype,
      self._deterministic,
      self._groups,
      self.slots if added else None,
      *jax.tree.map(lambda leaf: leaf.sharding, (self.weights | added, state)),
    )

  def _facts(
    self, size: int, num_pages: int, options: Mapping[str, Any] | None
  ) -> Any:
    """Returns all that `lower` and `compile` make a step of."""
    state = self.state_shapes(num_pages)
    return (
      self._spec(size, state)
      if size in self.layouts
      else (size, self._model, self._deterministic),
      state,
      self.weights | self._added(size),
      sorted((options or {}).items()),
    )


def _knows_decodes(mesh: Mesh) -> bool:
  """Whether decodes have programs of their own, without what prefills need."""
  return bool(mesh.devices.flat[0].platform != 'cpu')


def _tells_prompts(size: int) -> bool:
  """Whether a step tells of prompts, which takes a fourth more to compile."""
  return size >= 32 and size.bit_count() == 1


def _tells_apart(mesh: Mesh) -> bool:
  """Whether a program of its own tells of prompts.

  The devices of a mesh talk to one another to do that, and a condition in which
  they do can't be in a CUDA graph.
  """
  return mesh_lib.is_of_gpus(mesh)


def extra_bytes(compiled: Any) -> int:
  """Returns the bytes of a device that a program needs beside its arguments.

  Args:
    compiled: a jax.stages.Compiled.
  """
  analysis = compiled.memory_analysis()
  extra: int = (
    analysis.temp_size_in_bytes
    + analysis.output_size_in_bytes
    - (analysis.alias_size_in_bytes)
  )
  return extra

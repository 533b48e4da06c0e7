# SPDX-License-Identifier: Apache-2.0
"""Runs batches on a mesh of devices. Owns the weights and the KV cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
import functools
import itertools
import sys
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import page_groups
from sarathi_jax import types
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import adapters as adapters_lib
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import copying
from sarathi_jax.runner import hosts
from sarathi_jax.runner import in_flight
from sarathi_jax.runner import kept as kept_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs as programs_lib
from sarathi_jax.runner import settings
from sarathi_jax.runner import state as state_lib
from sarathi_jax.runner import weights as weights_lib

Params = Any  # a pytree of arrays, as placement.places says
OnCompiled = programs_lib.OnCompiled
Pending = in_flight.Pending


class DeviceRunner:
  """A `scheduler.runner.Runner` on one device or many.

  Compiles every step at once, which takes seconds to minutes.

  With pipeline stages, each step lets one batch in and another one out, which
  was let in as many steps ago as there are stages. If there is no batch to let
  in, but one to wait for, an empty one is let in.

  Args:
    model: the model.
    params: its weights, placed on the mesh (`placement`).
    layout: how they lie.
    mesh: a mesh ('pp', 'tp'), see `mesh`.
    config: the engine's configuration.
    max_step_tokens: returns the most tokens of a step of the scheduler's
      policy, given the most tokens of a sequence.
    on_compiled: told of the progress.
    leader: tells other processes of each step, if there are any.
    sizes: the sizes of the ladder to compile now; None: all. The others can't
      be run before `compile`.
    kept: finds steps that were compiled before, see `kept`.

  Raises:
    ConfigError: the KV cache has no room, or attention is unknown.

  Attributes:
    mesh: the mesh that it runs on.
    num_pages: pages of the KV cache.
    windows: of the groups of layers, see `models.layer_groups`.
    max_model_len: the most tokens of a sequence.
    num_programs: the number of programs to compile, nearly all of them steps.
    num_stages: stages of the pipeline.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    params: Params,
    layout: placement.Layout,
    mesh: Mesh,
    config: config_lib.EngineConfig,
    max_step_tokens: Callable[[int], int],
    on_compiled: OnCompiled = lambda done, total: None,
    leader: hosts.Leader | None = None,
    sizes: Collection[int] | None = None,
    kept: kept_lib.Kept = kept_lib.NOWHERE,
  ) -> None:
    self._model = model
    self._leaves: list[jax.Array] = jax.tree.leaves(params)
    self._layout = layout
    self.mesh = mesh
    self._leader = leader
    devices = mesh.local_devices
    kv_dtype = kv_cache.choose_dtype(
      config.kv_cache_dtype, layout.dtype, devices[0].platform
    )
    context = config.max_model_len or model.context_len
    # The reference is a loop in Python, for tests of the others.
    known = [name for name in rpa.IMPLEMENTATIONS if name != 'reference']
    config_lib.check(
      config.attention in (None, *known),
      'attention',
      config.attention,
      f'must be one of {", ".join(known)}',
    )

    def programs(max_model_len: int) -> programs_lib.StepPrograms:
      return programs_lib.StepPrograms(
        model,
        mesh,
        config,
        layout=layout,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens(max_model_len),
      )

    with jax.default_device(devices[0]):
      trial = programs(context)
      try:
        trial.state_shapes(1)
      except NotImplementedError as error:
        raise errors.UnsupportedError(str(error)) from error
      # Before the rest of the memory is the cache's.
      self._adapters = (
        None
        if trial.slots is None
        else adapters_lib.DeviceAdapters(model, mesh, layout, trial.slots)
      )
      stats = [device.memory_stats() for device in devices]
      parallelism = mesh_lib.parallelism_of(mesh)
      self.num_pages = hosts.smallest(
        kv_cache.choose_num_pages(
          model,
          config,
          context,
          kv_dtype,
          stats,
          _temp_bytes(config, stats[0], trial),
          parallelism,
          trial.sizes[-1],
        )
      )
      groups = kv_cache.groups_of(model, config, parallelism)
      self.windows = groups.windows
      self.max_model_len = page_groups.longest(
        groups.windows,
        self.num_pages,
        config.page_size,
        context,
        trial.sizes[-1],
      )
      self._programs = programs(self.max_model_len)
      numbers = (*self._programs.sizes, *self._programs.others)
      self.num_programs = len(numbers)
      self.num_stages = parallelism.pp
      self._page_bytes = kv_cache.page_bytes(
        model, config.page_size, kv_dtype, parallelism, groups.num_arrays
      )
      self._start()
      self._programs.compile(
        self.num_pages,
        on_compiled,
        numbers if sizes is None else self._programs.with_others(sizes),
        kept=kept,
      )
    self._builder = batch_lib.BatchBuilder(
      config.max_num_seqs,
      self._programs.places,
      len(self._programs.windows),
    )

  def _start(self) -> None:
    """Makes all state anew: the cache is zeros, and nothing is under way."""
    # The old state is freed first.
    self._state: state_lib.DeviceState | None = None
    self._state = state_lib.take(
      self._programs.state_shapes(self.num_pages),
      self.num_pages,
      self._page_bytes,
    )
    size = self._programs.size_for(0, decodes_only=True)
    one = self._programs.layouts[size]
    self._nothing = in_flight.AtStage(
      np.zeros(one.size, np.int32),
      0,
      True,
      False,
      has_adapters=one.has_adapters,
    )
    self._stages = deque([self._nothing] * self.num_stages, self.num_stages)
    self._num_steps = 0
    # Step -> what it computed, of batches that left.
    self._outputs: dict[int, in_flight.Output] = {}
    # Step -> what to sample anew after it, and what was.
    self._asked: dict[int, in_flight.Asked] = {}
    self._masked: dict[int, in_flight.Masked] = {}

  def program_for(self, batch: types.ScheduledBatch) -> int:
    """Returns the number of the step that a batch takes, if it is alone."""
    prefills = in_flight.prefills(batch)
    return self._programs.size_for(
      batch.size,
      decodes_only=not prefills,
      tells_prompts=in_flight.tells_prompts(prefills),
      has_adapters=self._adapters is not None
      and any(chunk.adapter for chunk in batch.chunks),
    )

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    prefills, size = in_flight.prefills(batch), self.program_for(batch)
    buffer = self._builder.build(batch, self._programs.layouts[size])
    setups = itertools.chain.from_iterable(
      adjusting.messages(chunk)
      for chunk in batch.samplers
      if chunk.setup is not None
    )
    layout = self._programs.layouts[size]
    for slot, adapter in batch.loads:
      self._put_adapter(slot, adapter.matrices)
    self._step(
      in_flight.AtStage(
        buffer,
        batch.size,
        not prefills,
        True,
        layout.tells(buffer),
        in_flight.tells_prompts(prefills),
        layout.has_adapters,
        tuple(setups),
        batch.copies,
      )
    )
    return Pending(
      batch.samplers,
      self._num_steps + self.num_stages - 2,
      layout.split(buffer),
    )

  def _put_adapter(self, slot: int, matrices: adapters_lib.Matrices) -> None:
    """Puts an adapter in a slot, on all hosts."""
    assert self._adapters is not None
    if self._leader is not None:
      for message in adapters_lib.messages(slot, matrices):
        self._leader.send(programs_lib.PUT_ADAPTER, message)
    self._adapters.put(slot, matrices)

  def mask(self, pending: Pending, masks: Mapping[int, np.ndarray]) -> None:
    asked = in_flight.asked(
      pending,
      masks,
      self._programs.masked.values(),
      self._model.vocab_size,
    )
    if pending.step >= self._num_steps:
      self._asked[pending.step] = asked
      return
    # The next step takes what this one sampled, and keeps logits of its own.
    assert pending.step == self._num_steps - 1, 'masks come before another step'
    self._sample_masked(pending.step, asked)

  def fetch(self, pending: Pending) -> types.Sampled:
    while self._num_steps <= pending.step:
      self._step(self._nothing)
    return in_flight.sampled(
      pending,
      self._outputs.pop(pending.step),
      self._masked.pop(pending.step, None),
    )

  def num_rows(self, num_tokens: int) -> int:
    return self._programs.layouts[
      self._programs.size_for(num_tokens, decodes_only=True)
    ].num_tokens

  def compile(
    self, program: int, options: Mapping[str, Any] | None = None
  ) -> None:
    """Compiles a step, even if it was compiled before.

    Args:
      program: its number, see `program_for`.
      options: XLA's options by name, beside those of the environment.
    """
    with jax.default_device(self.mesh.local_devices[0]):
      self._programs.compile(
        self.num_pages, lambda done, total: None, [program], options
      )

  @property
  def has_params(self) -> bool:
    """Whether all weights are there: none was donated or deleted."""
    return not any(leaf is None or leaf.is_deleted() for leaf in self._leaves)

  @property
  def is_asleep(self) -> bool:
    """Whether there is no cache, so that nothing can be computed."""
    return self._state is None

  def sleep(self) -> None:
    """Gives the memory of the cache back; nothing may be in flight."""
    self._state = None

  def wake(self) -> None:
    """Takes the memory again that `sleep` gave back.

    Raises:
      ConfigError: there is not enough; it sleeps on.
    """
    self._start()

  def recover(self) -> None:
    """Makes the cache anew, as a failed step may have destroyed it.

    Raises:
      EngineDeadError: the weights are gone, too; or there are several hosts.
      JaxRuntimeError: the device does not work any more.
    """
    if not self.has_params:
      raise errors.EngineDeadError('the weights were lost with a step')
    if self._leader is not None:
      # The others may wait for ever in the step that failed here.
      fault = sys.exception() or errors.EngineDeadError('a step failed')
      self._leader.fail_later(fault)
      raise errors.EngineDeadError('a step failed on one of several hosts')
    with settings.own():
      self._start()
      if self._adapters is not None:
        self._adapters.start()

  def update_params(self, params: Params) -> None:
    """Replaces the weights by live ones of the same shapes and dtypes.

    Gives up the old ones once all the new ones are there; or one by one, where
    there is no memory for both.

    Raises:
      EngineDeadError: there was no memory even so; the old ones are gone.
      Exception: they could not be moved; the old ones stay.
    """
    place = functools.partial(
      weights_lib.place_live, self._model, self.mesh, self._layout, params
    )
    try:
      placed = place()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      try:
        placed = place(old=self._leaves)
      except Exception as fault:
        raise errors.EngineDeadError(
          'there was no memory for new weights, and some of the old ones are '
          f'gone: {errors.describe(fault)}'
        ) from fault
    self._leaves = jax.tree.leaves(placed)

  def load_params(self, read: params_reader.Read) -> None:
    """Replaces the weights by those that `read` reads, in the same dtype."""
    self._leaves = jax.tree.leaves(
      weights_lib.load(
        self._model, self.mesh, self._layout, read, old=self._leaves
      )
    )

  def _step(self, entering: in_flight.AtStage) -> None:
    """Runs one step: one batch enters, the others advance by one stage."""
    self._stages.appendleft(entering)
    size = self._programs.size_for(
      max(stage.num_tokens for stage in self._stages),
      decodes_only=all(stage.decodes_only for stage in self._stages),
      tells_prompts=self._stages[-1].tells_prompts,
      has_adapters=any(stage.has_adapters for stage in self._stages),
    )
    layout = self._programs.layouts[size]
    ints = in_flight.packed(self._stages, layout)
    # Not earlier: batches between may be of those who had the slots before.
    for setup in self._stages[-1].setups:
      self._run(programs_lib.SET_UP, setup)
    if any(stage.copies for stage in self._stages):
      for message in copying.messages([s.copies for s in self._stages]):
        self._run(programs_lib.COPY, message)
    output, told = self._run(size, ints)
    if self._stages[-1].is_batch:
      tells = self._stages[-1].tells
      with jax.transfer_guard_device_to_host('allow'):
        output.copy_to_host_async()
        if tells:
          told.copy_to_host_async()
      self._outputs[self._num_steps] = in_flight.Output(
        layout, output, told if tells else None
      )
    self._num_steps += 1
    asked = self._asked.pop(self._num_steps - 1, None)
    if asked is not None:
      self._sample_masked(self._num_steps - 1, asked)

  def _sample_masked(self, step: int, asked: in_flight.Asked) -> None:
    """Samples rows of the batch that has just left the last stage."""
    output, told = self._run(programs_lib.masked(asked.num_rows), asked.ints)
    with jax.transfer_guard_device_to_host('allow'):
      output.copy_to_host_async()
    self._masked[step] = in_flight.Masked(
      asked.rows, asked.num_rows, output, told
    )

  def _run(self, program: int, ints: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Runs a program on all hosts; returns its outputs."""
    if self._leader is not None:
      self._leader.send(program, ints)
    return self._compute(program, ints)

  def connect(self) -> None:
    """Runs an empty step, in which all processes have to take part."""
    self._step(self._nothing)
    jax.block_until_ready(self._state)

  def follow(self, follower: hosts.Follower) -> None:
    """Computes what another process's runner does, until this process ends.

    Raises:
      JaxRuntimeError: a step failed here.
    """
    computing: deque[tuple[jax.Array, jax.Array]] = deque()

    def wait(num_left: int = 0) -> None:
      while len(computing) > num_left:  # Nobody else would notice a fault.
        jax.block_until_ready(computing.popleft())

    received = adapters_lib.Received()
    for program, ints in follower.steps(on_idle=wait):
      if program == programs_lib.PUT_ADAPTER:
        assert self._adapters is not None
        received.take(ints, self._adapters)
        continue
      computing.append(self._compute(program, ints))
      wait(self.num_stages + 1)  # as many as the first process has in flight

  def _compute(
    self, program: int, ints: np.ndarray
  ) -> tuple[jax.Array, jax.Array]:
    """Runs a program of `StepPrograms` on the state; returns its outputs."""
    # The steps are compiled already, so this setting must not keep them out.
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
      with jax.disable_jit(False):
        return self._compute(program, ints)
    # The call itself moves the integers to where the program wants them:
    # jax.device_put would take as long as the rest of the call.
    leaves = self._leaves
    if self._adapters is not None and self._programs.has_adapters(program):
      leaves = leaves + self._adapters.leaves
    with jax.transfer_guard_host_to_device('allow'):
      outputs: tuple[jax.Array, jax.Array]
      self._state, outputs = self._programs[program](leaves, self._state, ints)
    return outputs


def _temp_bytes(
  config: config_lib.EngineConfig, stats: Any, trial: programs_lib.StepPrograms
) -> int:
  """Returns the bytes of a device that steps take beside weights and cache.

  The cache gets the memory that remains. Returns 0 where the cache's size is
  given or the device can't tell, so the step need not be compiled to find out.

  Args:
    config: the engine's configuration.
    stats: `jax.Device.memory_stats()`.
    trial: the steps.
  """
  if not stats or config.num_pages or config.kv_cache_gib:
    return 0
  return trial.temp_bytes(trial.pages_per_seq) + trial.state_bytes

# SPDX-License-Identifier: Apache-2.0
"""Runs batches on a device. Owns the weights and the KV cache."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from concurrent import futures
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import step

Params = Any  # a pytree of arrays, as models.param_specs says
OnCompiled = Callable[[int, int], None]  # (programs compiled, of how many)


class Pending(NamedTuple):
  """A batch being computed."""

  num_chunks: int
  sampled: jax.Array  # [2, S] int32, see step.stage_step


class StepPrograms:
  """The step, compiled for every size of the ladder.

  A size that was not compiled at warm-up can't be run: no request can make
  the engine compile while it serves.
  """

  def __init__(self, model: model_config_lib.ModelConfig, *, page_size: int,
               pages_per_seq: int, max_num_seqs: int, max_step_tokens: int,
               attention: str | None) -> None:
    self.sizes = batch_lib.ladder(max_step_tokens, max_num_seqs)
    self.pages_per_seq = pages_per_seq
    self.layouts = {
      n: batch_lib.BatchLayout(n, min(n, max_num_seqs), pages_per_seq)
      for n in self.sizes}
    self._steps: dict[int, Any] = {}
    self._max_num_seqs = max_num_seqs
    self._fixed: dict[str, Any] = dict(
      model=model, page_size=page_size, attention=attention)

  def lower(self, size: int, params: Params, kv: Any) -> Any:
    """The step of one size, lowered for arguments like these."""
    layout = self.layouts[size]
    leaves, treedef = jax.tree.flatten(params)
    device_arrays = (jax.ShapeDtypeStruct((n,), jnp.int32)
                     for n in (self._max_num_seqs, layout.size))

    def run(leaves: Any, kv: Any, last_tokens: Any, buffer: Any) -> Any:
      # Flat leaves: walking the tree of weights each step costs milliseconds.
      return step.stage_step(
        jax.tree.unflatten(treedef, leaves), kv, last_tokens, buffer,
        layout=layout, **self._fixed)

    return jax.jit(run, donate_argnums=(1, 2)).lower(
      leaves, kv, *device_arrays)

  def compile(self, params: Params, kv: Any, on_compiled: OnCompiled) -> None:
    """Compiles all sizes, the largest first, several at a time."""
    pool = futures.ThreadPoolExecutor(max_workers=4)
    try:
      jobs = {
        pool.submit(self.lower(n, params, kv).compile): n
        for n in reversed(self.sizes)}
      on_compiled(0, len(jobs))
      for done, job in enumerate(futures.as_completed(jobs), 1):
        self._steps[jobs[job]] = job.result()
        on_compiled(done, len(jobs))
    finally:  # After Ctrl-C, which no compilation heeds, wait for none.
      pool.shutdown(wait=False, cancel_futures=True)

  def temp_bytes(self, params: Params, kv: Any) -> int:
    """Device memory that the largest step needs beside its arguments."""
    compiled = self.lower(self.sizes[-1], params, kv).compile()
    analysis: Any = compiled.memory_analysis()
    extra: int = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - (
      analysis.alias_size_in_bytes)
    return extra

  def size_for(self, num_tokens: int) -> int:
    """The smallest compiled size that holds so many tokens."""
    return self.sizes[bisect.bisect_left(self.sizes, num_tokens)]

  def __getitem__(self, size: int) -> Any:
    return self._steps[size]


class DeviceRunner:
  """An `engine.Runner` on one device.

  Compiles every step at once, which takes seconds to minutes.

  Args:
    model: the model.
    params: its weights, on the device that is to run it.
    config: what was asked for.
    max_step_tokens: the most tokens of a step, by the scheduler's policy and
      a given longest sequence.
    on_compiled: told of the progress.

  Raises:
    ConfigError: the KV cache has no room, or attention is unknown.

  Attributes:
    device: where it runs.
    num_pages: pages of the KV cache.
    max_model_len: the most tokens of a sequence.
    num_programs: compiled steps.
  """

  def __init__(self, model: model_config_lib.ModelConfig, params: Params,
               config: config_lib.EngineConfig,
               max_step_tokens: Callable[[int], int],
               on_compiled: OnCompiled = lambda done, total: None) -> None:
    self._leaves = jax.tree.leaves(params)
    device, = self._leaves[0].devices()
    self.device: jax.Device = device
    dtype = kv_cache.dtype_on(device, self._leaves[0].dtype)
    context = config.max_model_len or model.context_len
    page_size = config.page_size
    # The reference is a loop in Python, for tests of the others.
    known = [name for name in rpa.IMPLEMENTATIONS if name != 'reference']
    config_lib.check(
      config.attention in (None, *known), 'attention', config.attention,
      f'must be one of {", ".join(known)}')

    def programs(max_model_len: int) -> StepPrograms:
      return StepPrograms(
        model, page_size=page_size,
        pages_per_seq=math.ceil(max_model_len / page_size),
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=max_step_tokens(max_model_len),
        attention=config.attention)

    with jax.default_device(device):
      try:
        jax.eval_shape(lambda: kv_cache.init(
          model, 1, page_size, dtype, config.attention))
      except NotImplementedError as error:
        raise errors.UnsupportedError(str(error)) from error
      temp_bytes = 0
      if device.memory_stats():  # What is free after the largest step's needs.
        trial = programs(context)
        kv = jax.eval_shape(lambda: kv_cache.init(
          model, trial.pages_per_seq, page_size, dtype, config.attention))
        temp_bytes = trial.temp_bytes(params, kv)
      self.num_pages = kv_cache.choose_num_pages(
        model, config, context, dtype, device, temp_bytes)
      self.max_model_len = min(context, self.num_pages * page_size)
      self._programs = programs(self.max_model_len)
      self.num_programs = len(self._programs.sizes)
      self._kv = _init_kv(
        model, self.num_pages, page_size, dtype, config.attention)
      self._last_tokens = jnp.zeros(config.max_num_seqs, jnp.int32)
      self._programs.compile(params, self._kv, on_compiled)
    self._builder = batch_lib.BatchBuilder(
      config.max_num_seqs, self._programs.pages_per_seq)

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    size = self._programs.size_for(batch.num_tokens)
    buffer = self._builder.build(batch, self._programs.layouts[size])
    self._kv, self._last_tokens, sampled = self._programs[size](
      self._leaves, self._kv, self._last_tokens, buffer)
    sampled.copy_to_host_async()
    return Pending(len(batch.chunks), sampled)

  def fetch(self, pending: Pending) -> types.Sampled:
    tokens, bits = np.asarray(pending.sampled)[:, :pending.num_chunks]
    return types.Sampled(tokens.tolist(), bits.view(np.float32).tolist())

  def num_rows(self, num_tokens: int) -> int:
    return self._programs.size_for(num_tokens)

  @property
  def has_params(self) -> bool:
    """False once an array of the weights was donated or deleted."""
    return not any(leaf.is_deleted() for leaf in self._leaves)

  def recover(self) -> None:
    """Makes the cache anew: a step that failed may have taken it along.

    Raises:
      EngineDeadError: the weights are gone, too.
      JaxRuntimeError: the device does nothing more.
    """
    if not self.has_params:
      raise errors.EngineDeadError('the weights were lost with a step')
    lost = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      (self._kv, self._last_tokens))
    self._kv, self._last_tokens = [], None  # freed before they are made anew
    self._kv, self._last_tokens = jax.block_until_ready(jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), lost))

  def update_params(self, params: Params) -> None:
    """Replaces the weights: the same tree, shapes, dtypes and device."""
    self._leaves = jax.tree.leaves(params)


def _init_kv(model: model_config_lib.ModelConfig, num_pages: int,
             page_size: int, dtype: Any, attention: str | None,
             ) -> list[kv_cache.LayerKv]:
  try:
    return jax.block_until_ready(
      kv_cache.init(model, num_pages, page_size, dtype, attention))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    size = num_pages * kv_cache.page_bytes(model, page_size, dtype)
    raise errors.ConfigError(
      f'num_pages={num_pages}: {size / kv_cache.GIB:.3g} GiB of KV cache are '
      'more than the device has free; lower num_pages or kv_cache_gib.'
    ) from error

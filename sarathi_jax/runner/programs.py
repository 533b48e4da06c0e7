# SPDX-License-Identifier: Apache-2.0
"""The step, compiled for every size that it will have."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import config as config_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import step

OnCompiled = Callable[[int, int], None]  # (programs compiled, of how many)


@dataclasses.dataclass(frozen=True)
class StepArrays:
  """What a step takes and returns updated: arrays, or ShapeDtypeStruct.

  Attributes:
    kv: the pages, one pair a layer of a stage.
    last_tokens: [max_num_seqs] int32, each slot's last sampled token.
    hidden: [pp * tokens, D] what stages hand on; None without stages.
  """

  kv: list[kv_cache.LayerKv]
  last_tokens: Any
  hidden: Any


class StepPrograms:
  """The step, compiled for every size of the ladder.

  A size that was not compiled at warm-up can't be run: no request can make
  the engine compile while it serves.

  Args:
    model, mesh, config: the deployment.
    dtype, kv_dtype: of weights and cache.
    max_model_len: the most tokens of a sequence.
    max_step_tokens: the most tokens of a step.
    transposed: how weights lie, see `placement.places`.

  Attributes:
    sizes: tokens of a step, ascending.
    layouts: of the batches of each size.
    pages_per_seq: P.
  """

  def __init__(self, model: model_config_lib.ModelConfig, mesh: Mesh,
               config: config_lib.EngineConfig, *, dtype: Any, kv_dtype: Any,
               max_model_len: int, max_step_tokens: int,
               transposed: bool = False) -> None:
    max_num_seqs = config.max_num_seqs
    self.sizes = batch_lib.ladder(
      max_step_tokens, max_num_seqs,
      fine=mesh.devices.flat[0].platform == 'cpu')
    self.pages_per_seq = math.ceil(max_model_len / config.page_size)
    self._num_stages = mesh.shape[mesh_lib.PP]
    # Batches of several sizes meet in a pipeline, so their rows are as many.
    self.layouts = {
      n: batch_lib.BatchLayout(
        n, min(n, max_num_seqs) if self._num_stages == 1 else max_num_seqs,
        self.pages_per_seq)
      for n in self.sizes}
    self._model = model
    self._mesh = mesh
    self._dtype = dtype
    self._kv_dtype = kv_dtype
    self._config = config
    self._transposed = transposed
    self._steps: dict[int, Any] = {}

  def array_shapes(self, num_pages: int) -> StepArrays:
    """What steps update, as ShapeDtypeStruct.

    Raises:
      NotImplementedError: attention can't have such pages.
    """
    hidden = None
    if self._num_stages > 1:
      hidden = jax.ShapeDtypeStruct(
        (self._num_stages * self.sizes[-1], self._model.hidden_size),
        self._dtype,
        sharding=mesh_lib.on(self._mesh, mesh_lib.PP, mesh_lib.TP))
    return StepArrays(
      kv=kv_cache.shapes(
        self._model, self._mesh, num_pages, self._config.page_size,
        self._kv_dtype, self._config.attention),
      last_tokens=self._ints(self._config.max_num_seqs), hidden=hidden)

  def lower(self, size: int, num_pages: int) -> Any:
    """The step of one size, lowered."""
    layout = self.layouts[size]
    arrays = self.array_shapes(num_pages)
    leaves, treedef = jax.tree.flatten(
      placement.shapes(
        self._model, self._mesh, self._dtype, self._transposed))
    spec = step.StepSpec(
      self._model, self._mesh, layout, self._config.page_size,
      self._config.attention)

    def run(leaves: Any, *args: Any) -> Any:
      # Flat leaves: walking the tree of weights each step costs milliseconds.
      return step.step(spec, jax.tree.unflatten(treedef, leaves), *args)

    return jax.jit(run, donate_argnums=(1, 2, 3)).lower(
      leaves, arrays.kv, arrays.last_tokens, arrays.hidden,
      self._ints(self._num_stages, layout.size))

  def compile(self, num_pages: int, on_compiled: OnCompiled,
              sizes: Collection[int],
              options: Mapping[str, Any] | None = None) -> None:
    """Compiles some sizes, the largest first, several at a time.

    Args:
      num_pages: of the cache.
      on_compiled: told of the progress.
      sizes: of `self.sizes`.
      options: of XLA, by name, beside those of the environment.
    """
    pool = futures.ThreadPoolExecutor(max_workers=4)
    try:
      jobs = {
        pool.submit(
          self.lower(n, num_pages).compile, dict(options or {})): n
        for n in sorted(sizes, reverse=True)}
      on_compiled(0, len(jobs))
      for done, job in enumerate(futures.as_completed(jobs), 1):
        self._steps[jobs[job]] = job.result()
        on_compiled(done, len(jobs))
    finally:  # After Ctrl-C, which no compilation heeds, wait for none.
      pool.shutdown(wait=False, cancel_futures=True)

  def temp_bytes(self, num_pages: int) -> int:
    """Memory of a device that the largest step needs beside its arguments."""
    return extra_bytes(self.lower(self.sizes[-1], num_pages).compile())

  def size_for(self, num_tokens: int) -> int:
    """The smallest compiled size that holds so many tokens."""
    return self.sizes[bisect.bisect_left(self.sizes, num_tokens)]

  def __getitem__(self, size: int) -> Any:
    return self._steps[size]

  def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=mesh_lib.on(self._mesh))


def extra_bytes(compiled: Any) -> int:
  """Memory of a device that a program needs beside its arguments."""
  analysis = compiled.memory_analysis()
  extra: int = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - (
    analysis.alias_size_in_bytes)
  return extra

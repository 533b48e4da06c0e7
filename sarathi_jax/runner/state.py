# SPDX-License-Identifier: Apache-2.0
"""What steps change on the devices: one tree, donated to each of them.

A feature that keeps something there adds a field, and its line in `shapes`:
it is then made at the start and after a fault, placed on the mesh, donated,
updated in place, and counted in memory plans. `step.stage_step` computes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import config as config_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotState:
  """What is kept of each running request, by its slot.

  Attributes:
    last_tokens: [max_num_seqs] int32, the last sampled token.
  """

  last_tokens: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class DeviceState:
  """What a step takes and returns updated: arrays, or ShapeDtypeStruct.

  Attributes:
    kv: the pages, one pair a layer of a stage.
    slots: see `SlotState`.
    hidden: [pp * tokens, D] what stages hand on; None without stages.
  """

  kv: list[kv_cache.LayerKv]
  slots: SlotState
  hidden: Any


def shapes(
    model: model_config_lib.ModelConfig, mesh: Mesh,
    config: config_lib.EngineConfig, *, num_pages: int, max_tokens: int,
    dtype: Any, kv_dtype: Any) -> DeviceState:
  """The state of a deployment, as ShapeDtypeStruct.

  Args:
    model, mesh, config: the deployment.
    num_pages: of the cache.
    max_tokens: of a step.
    dtype, kv_dtype: of weights and cache.

  Raises:
    NotImplementedError: attention can't have such pages.
  """
  num_stages = mesh.shape[mesh_lib.PP]
  return DeviceState(
    kv=kv_cache.shapes(
      model, mesh, num_pages, config.page_size, kv_dtype, config.attention),
    slots=SlotState(
      last_tokens=jax.ShapeDtypeStruct(
        (config.max_num_seqs,), jnp.int32, sharding=mesh_lib.on(mesh))),
    hidden=None if num_stages == 1 else jax.ShapeDtypeStruct(
      (num_stages * max_tokens, model.hidden_size), dtype,
      sharding=mesh_lib.on(mesh, mesh_lib.PP, mesh_lib.TP)))


def init(shapes: DeviceState) -> DeviceState:
  """Zeros, and not garbage: a kernel may multiply what it masks by 0."""
  state: DeviceState = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
    shapes)
  return state

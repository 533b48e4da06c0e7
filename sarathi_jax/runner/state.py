# SPDX-License-Identifier: Apache-2.0
"""The state that steps update on the devices: one tree, donated to each step.

A feature that keeps something there adds a field, and a line in `shapes`. The
field is then made at the start and after a fault, placed on the mesh, donated,
updated in place, and counted in memory plans. `step.stage_step` computes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib

# How the axes of logits lie on a mesh.
LOGITS = None, (mesh_lib.TP, mesh_lib.PP)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotState:
  """The state of running requests, by their slots.

  Attributes:
    last_tokens: [max_num_seqs] int32, the last sampled token.
    adjustments: of the first slots, what their sequences' logits are adjusted
      by; None where there are no such slots.
  """

  last_tokens: Any
  adjustments: adjusting.Adjustments | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class DeviceState:
  """The state that a step takes, and returns updated.

  Its leaves are arrays, ShapeDtypeStruct or shardings.

  Attributes:
    kv: the pages, one pair for each layer of a group of a stage's.
    slots: see `SlotState`.
    hidden: [pp * tokens, D] the hidden states that stages hand on; None
      without stages.
    logits: [max_num_seqs, V] of the last step's rows that follow a grammar, see
      `masking`; None where none may.
  """

  kv: list[kv_cache.LayerKv]
  slots: SlotState
  hidden: Any
  logits: Any = None


def shapes(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  config: config_lib.EngineConfig,
  *,
  num_pages: int,
  max_tokens: int,
  dtype: Any,
  kv_dtype: Any,
) -> DeviceState:
  """Returns the state of a deployment, as ShapeDtypeStruct.

  Args:
    model, mesh, config: the deployment.
    num_pages: pages of the cache.
    max_tokens: the most tokens of a step.
    dtype: that the model computes in.
    kv_dtype: of the cache.

  Raises:
    NotImplementedError: attention doesn't support such pages.
  """
  num_stages = mesh.shape[mesh_lib.PP]
  return DeviceState(
    kv=kv_cache.shapes(
      model,
      mesh,
      num_pages,
      config.page_size,
      kv_dtype,
      config.attention,
      kv_cache.groups_of(
        model, config, mesh_lib.parallelism_of(mesh)
      ).num_arrays,
    ),
    slots=SlotState(
      last_tokens=jax.ShapeDtypeStruct(
        (config.max_num_seqs,), jnp.int32, sharding=mesh_lib.on(mesh)
      ),
      adjustments=adjusting.shapes(
        config.num_adjusted_seqs(model.vocab_size), model.vocab_size, mesh
      ),
    ),
    hidden=None
    if num_stages == 1
    else jax.ShapeDtypeStruct(
      (num_stages * max_tokens, model.hidden_size),
      dtype,
      sharding=mesh_lib.on(mesh, mesh_lib.PP, mesh_lib.TP),
    ),
    logits=jax.ShapeDtypeStruct(
      (
        config.max_num_seqs,
        mesh_lib.parallelism_of(mesh).vocab_size(model),
      ),
      jnp.float32,
      sharding=mesh_lib.on(mesh, *LOGITS),
    )
    if config.grammars
    else None,
  )


def init(shapes: DeviceState) -> DeviceState:
  """Makes a state of zeros, as a kernel may multiply what it masks by 0.

  Garbage might be NaN.
  """
  state: DeviceState = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes
  )
  return state


def take(shapes: DeviceState, num_pages: int, page_bytes: int) -> DeviceState:
  """Makes a state as `init` does.

  Raises:
    ConfigError: the device has no memory for so many pages, of so many bytes.
  """
  try:
    return jax.block_until_ready(init(shapes))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise errors.ConfigError(
      f'num_pages={num_pages}: {num_pages * page_bytes / kv_cache.GIB:.3g} '
      'GiB of KV cache are more than the device has free; lower num_pages or '
      'kv_cache_gib.'
    ) from error

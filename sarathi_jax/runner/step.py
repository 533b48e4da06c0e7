# SPDX-License-Identifier: Apache-2.0
"""The step: one XLA program over one hybrid batch.

With pipeline stages it is a *tick*: each stage computes a batch of its own, and
hands its hidden states on. A stage's batch entered the pipeline as many steps
ago as there are stages before it. Tokens are sampled for the batch at the last
stage. All devices of the mesh run this one program (`jax.shard_map`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import models
from sarathi_jax.models import adapters as adapters_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import kinds as kinds_lib
from sarathi_jax.models import layer_groups
from sarathi_jax.models import rope as rope_lib
from sarathi_jax.models import rope_config
from sarathi_jax.models import sharding
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import masking
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import paged
from sarathi_jax.runner import prompt_rows
from sarathi_jax.runner import sampling_rows
from sarathi_jax.runner import state as state_lib

Params = Any  # a pytree of arrays, as placement.places says
Outputs = tuple[Int[Array, ' output'], Int[Array, ' told']]


class Layer(NamedTuple):
  """What one layer of each stage has in common with others.

  Attributes:
    kinds: its kind at each stage.
    groups: its group at each stage, see `layer_groups`.
  """

  kinds: tuple[kinds_lib.LayerKind, ...]
  groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """The constants that a step is compiled with.

  Attributes:
    model: the model.
    mesh: the mesh it lies on, see `mesh`.
    layout: of the batches.
    page_size: tokens in a page.
    attention: implementation of ragged_paged_attention; None picks one.
    dtype: that the model computes in.
    deterministic: whether no row's bits depend on the others.
    groups: of the layers.
    slots: the room for adapters, if the step has any.
    weights: the sharding of each array of the weights, and of the adapters.
    state: the sharding of each array of the state.
  """

  model: model_config_lib.ModelConfig
  mesh: Mesh
  layout: batch_lib.BatchLayout
  page_size: int
  attention: str | None
  dtype: Any
  deterministic: bool
  groups: layer_groups.LayerGroups
  slots: adapters_lib.Slots | None
  weights: Any
  state: state_lib.DeviceState

  @property
  def layers(self) -> list[Layer]:
    """The layers of a stage."""
    parallelism = mesh_lib.parallelism_of(self.mesh)
    return [
      Layer(
        tuple(
          self.model.layer_kind(layer or 0)
          for layer in parallelism.layers_of(self.model, i)
        ),
        groups,
      )
      for i, groups in enumerate(self.groups.groups)
    ]


def step(
  spec: StepSpec,
  params: Params,
  state: state_lib.DeviceState,
  buffers: Int[Array, 'stages size'],
) -> tuple[state_lib.DeviceState, Outputs]:
  """Runs `stage_step` on every device of a mesh. `state` is donated.

  Args and Returns are `stage_step`'s, for the whole mesh: layers have an axis
  for their stage, pages lie stage after stage and head after head, and hidden
  states stage after stage and column after column.
  """
  if spec.mesh.size == 1:
    return stage_step(spec, params, state, buffers)
  everywhere = PartitionSpec()
  weights, lies = jax.tree.map(
    lambda sharding: sharding.spec, (spec.weights, spec.state)
  )
  return jax.shard_map(
    functools.partial(stage_step, spec),
    mesh=spec.mesh,
    in_specs=(weights, lies, everywhere),
    out_specs=(lies, (everywhere, everywhere)),
    check_vma=False,
  )(params, state, buffers)


def stage_step(
  spec: StepSpec,
  params: Params,
  state: state_lib.DeviceState,
  buffers: Int[Array, 'stages size'],
) -> tuple[state_lib.DeviceState, Outputs]:
  """Computes one device's part of a step.

  Args:
    spec: what is fixed when the step is compiled.
    params: the device's part of the weights, and in a step with adapters, by
      that name, of these: of each layer, see `models.adapters`.
    state: the device's part: the pages of its stage's layers, and its columns
      of what the stage before handed on; donated.
    buffers: the batch at each stage, see `batch.BatchLayout`; zeros where a
      stage has no batch.

  Returns:
    The state, updated in place, and of the batch at the last stage
    `batch.StepOutput`, and what is told beside it; packed as its layout says.
  """
  model, layout = spec.model, spec.layout
  hidden, last_tokens = state.hidden, state.slots.last_tokens
  shards = mesh_lib.shards_of(spec.mesh)
  stage = 0 if shards.pp is None else lax.axis_index(shards.pp)
  layers, added = params['layers'], params.get('adapters')
  if shards.pp is not None:
    layers, added = jax.tree.map(lambda leaf: leaf[0], (layers, added))
  mine, leaving = (layout.split(buffers[i]) for i in (stage, -1))
  row, positions = _places_of_tokens(layout, mine)
  tokens = jnp.where(
    mine.from_device[row] != 0, last_tokens[mine.slots][row], mine.tokens
  )
  x = models.embed(model, params, tokens, shards).astype(spec.dtype)
  if hidden is not None:
    before = _whole(hidden[: layout.num_tokens], shards)
    x = jnp.where(stage == 0, x, before)
  # Only rows that are sampled from leave the last stage. If it is the only one,
  # its last layer already leaves the other rows out.
  is_early = hidden is None and layout.num_samples < layout.num_tokens
  if added is not None:
    assert spec.slots is not None
    chosen = mine.adapters[row]
    rows = (chosen, chosen[leaving.sample_tokens]) if is_early else (chosen,)
    layers = adapters_lib.applied(layers, added, rows, spec.slots)
  run = functools.partial(
    _run_layers,
    spec,
    layers,
    _contexts(spec, state.kv, mine, row, positions, shards),
  )
  num_whole = len(layers) - is_early
  x, kv = run(slice(num_whole), state.kv, x)
  if is_early:
    last_layer, x_before = slice(num_whole, None), x
    x, kv = run(last_layer, kv, x, leaving=leaving.sample_tokens)
  if hidden is not None:
    hidden = lax.dynamic_update_slice_in_dim(
      hidden, _hand_on(x, shards), 0, axis=0
    )
  last = x if is_early else _from_last_stage(x[leaving.sample_tokens], shards)
  logits = models.unembed(
    model, params, models.final_norm(model, params, last), shards
  )
  output, told, adjustments = sampling_rows.sample(
    model,
    logits,
    leaving,
    state.slots.adjustments,
    shards,
    deterministic=spec.deterministic,
  )

  def rows_of_prompts() -> prompt_rows.RowsOf:
    if is_early:  # All rows, once more, of keys and values that are kept.
      whole, _ = run(last_layer, kv, x_before, writes=False)
      return whole.__getitem__
    return lambda rows: _from_last_stage(x[rows], shards)

  told_of_prompts = prompt_rows.tell(
    model, layout, params, leaving, rows_of_prompts, shards
  )
  kept = state.logits
  if kept is not None:
    is_masked = batch_lib.sampling_of(leaving.sampling)['is_masked']
    kept = masking.keep(
      kept, logits, is_masked, always=mesh_lib.is_of_gpus(spec.mesh)
    )
  slots = state_lib.SlotState(
    sampling_rows.keep_last(last_tokens, leaving, output.tokens), adjustments
  )
  return state_lib.DeviceState(kv, slots, hidden, kept), (
    sampling_rows.packed(output),
    sampling_rows.packed((*told, *told_of_prompts)),
  )


def _run_layers(
  spec: StepSpec,
  params: Params,
  context: Callable[..., models.LayerContext],
  which: slice,
  kv: Sequence[kv_cache.LayerKv],
  x: Float[Array, 'T D'],
  *,
  leaving: Int[Array, ' R'] | None = None,
  writes: bool = True,
) -> tuple[Array, list[kv_cache.LayerKv]]:
  """Runs some layers of a stage, see `models.run_layers`."""
  return models.run_layers(
    spec.model,
    params[which],
    kv,
    x,
    spec.layers[which],
    functools.partial(context, writes=writes),
    leaving,
    spec.groups.arrays[which],
  )


def _places_of_tokens(
  layout: batch_lib.BatchLayout,
  b: batch_lib.BatchArrays,
) -> tuple[Int[Array, ' T'], Int[Array, ' T']]:
  """Returns each token's batch row and its position; padding has position 0."""
  index = jnp.arange(layout.num_tokens, dtype=jnp.int32)
  row = prompt_rows.rows_of_tokens(layout, b)
  is_real = index < b.cu_q_lens[-1]
  # A row's tokens are its sequence's last ones.
  return row, jnp.where(is_real, index + (b.kv_lens - b.cu_q_lens[1:])[row], 0)


def _contexts(
  spec: StepSpec,
  kv: Sequence[kv_cache.LayerKv],
  b: batch_lib.BatchArrays,
  row: Int[Array, ' T'],
  positions: Int[Array, ' T'],
  shards: sharding.Shards,
) -> Callable[..., models.LayerContext]:
  """Returns what makes layers' contexts; see `models.run_layers`.

  Beside a layer and rows, it takes whether keys and values are yet to be kept.
  """
  kinds = dict.fromkeys(
    itertools.chain.from_iterable(layer.kinds for layer in spec.layers)
  )
  ropes = {kind.rope for kind in kinds}
  lens = None
  if any(rope.kind in rope_config.BY_LENGTH for rope in ropes):
    lens = jnp.maximum(b.rope_lens[row], positions + 1)
  rotations = {
    rope: rope_lib.tables(rope, spec.model.head_dim, positions, lens)
    for rope in ropes
  }
  query_factors = rope_lib.query_factors(spec.model, positions)
  attend = paged.attend_to(
    kv,
    b,
    row,
    positions,
    page_size=spec.page_size,
    queries=(
      spec.model.num_heads // spec.mesh.shape[mesh_lib.TP],
      spec.model.head_dim,
      spec.dtype,
    ),
    windows={
      (kind.attention.window, group)
      for layer in spec.layers
      for kind, group in zip(layer.kinds, layer.groups, strict=True)
    },
    tables=spec.layout.tables,
    shards=shards,
    implementation=spec.attention,
    decodes_only=spec.layout.decodes_only,
    batch_invariant=spec.deterministic,
    has_sinks=spec.model.attention_sinks,
  )

  # Where Pallas attends, as on GPUs, it adds and normalizes, too.
  has_kernels = rpa.is_rows(kv[0][0])

  def context(
    layer: Layer, rows: Array | None, writes: bool
  ) -> models.LayerContext:
    if rows is None:
      is_token = jnp.arange(spec.layout.num_tokens) < b.cu_q_lens[-1]
    else:
      is_token = jnp.arange(rows.shape[0]) < b.num_samples
    return models.LayerContext(
      functools.partial(
        attend,
        rotation=shards.by_stage(
          [kind.rope for kind in layer.kinds], rotations.__getitem__
        ),
        options=[kind.attention for kind in layer.kinds],
        groups=layer.groups,
        rows=rows,
        writes=writes,
      ),
      shards,
      rows,
      is_token,
      query_factors,
      adds_late=has_kernels,
    )

  return context


def _whole(
  x: Float[Array, 'T columns'],
  shards: sharding.Shards,
) -> Float[Array, 'T D']:
  """Gathers hidden states from each device's columns of them."""
  if shards.tp is None:
    return x
  return lax.all_gather(x, shards.tp, axis=1, tiled=True)


def _hand_on(
  x: Float[Array, 'T D'],
  shards: sharding.Shards,
) -> Float[Array, 'T columns']:
  """Sends hidden states to the next stage; each device sends its columns.

  All devices of a stage have all columns: sending all of them from each device
  would take tp times the bytes between hosts (Megatron-LM's scatter-gather,
  arXiv 2104.04473).
  """
  assert shards.pp is not None
  if shards.tp is not None:
    columns = x.shape[1] // lax.axis_size(shards.tp)
    x = lax.dynamic_slice_in_dim(
      x, lax.axis_index(shards.tp) * columns, columns, axis=1
    )
  num_stages = lax.axis_size(shards.pp)
  return lax.ppermute(x, shards.pp, [(i, i + 1) for i in range(num_stages - 1)])


def _from_last_stage(
  rows: Float[Array, 'R D'],
  shards: sharding.Shards,
) -> Float[Array, 'R D']:
  """Returns the last stage's rows, on all stages."""
  if shards.pp is None:
    return rows
  is_last = lax.axis_index(shards.pp) == lax.axis_size(shards.pp) - 1
  return lax.psum(jnp.where(is_last, rows, 0), shards.pp)

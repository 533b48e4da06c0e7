# SPDX-License-Identifier: Apache-2.0
"""The step: one XLA program over one hybrid batch.

With pipeline stages it is a *tick*: each stage computes a batch of its own,
the one that entered the pipeline as many steps ago as the stage has others
before it, and hands its hidden states on. The batch at the last stage gets
its tokens. All devices of the mesh run this one program (`jax.shard_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import sharding
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import sampling
from sarathi_jax.runner import state as state_lib

Params = Any  # a pytree of arrays, as placement.places says


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """What is fixed when a step is compiled.

  Attributes:
    model: the model.
    mesh: what it lies on, see `mesh`.
    layout: of the batches.
    page_size: tokens in a page.
    attention: implementation of ragged_paged_attention; None picks one.
    state: how the state lies on the mesh, a sharding for each array.
  """

  model: model_config_lib.ModelConfig
  mesh: Mesh
  layout: batch_lib.BatchLayout
  page_size: int
  attention: str | None
  state: state_lib.DeviceState

  @property
  def windows(self) -> list[tuple[int | None, ...]]:
    """Of a stage's layers, the sliding window at each stage."""
    parallelism = mesh_lib.parallelism_of(self.mesh)
    return [
      tuple(self.model.layer_window(layer or 0)
            for layer in parallelism.layers_of(self.model, i))
      for i in range(parallelism.num_layers(self.model))]


def step(
    spec: StepSpec,
    params: Params,
    state: state_lib.DeviceState,
    buffers: Int[Array, 'stages size'],
) -> tuple[state_lib.DeviceState, Int[Array, ' output']]:
  """`stage_step` on every device of a mesh. `state` is donated.

  Args and Returns are `stage_step`'s, of the whole mesh: layers have an axis
  for their stage, pages lie stage after stage and head after head, and so do
  hidden states.
  """
  if spec.mesh.size == 1:
    return stage_step(spec, params, state, buffers)
  everywhere = PartitionSpec()
  weights = jax.tree.map(
    lambda place: place.sharding.spec, placement.places(
      spec.model, spec.mesh, placement.are_transposed(params)))
  lies = jax.tree.map(lambda sharding: sharding.spec, spec.state)
  return jax.shard_map(
    functools.partial(stage_step, spec), mesh=spec.mesh,
    in_specs=(weights, lies, everywhere), out_specs=(lies, everywhere),
    check_vma=False)(params, state, buffers)


def stage_step(
    spec: StepSpec,
    params: Params,
    state: state_lib.DeviceState,
    buffers: Int[Array, 'stages size'],
) -> tuple[state_lib.DeviceState, Int[Array, ' output']]:
  """One device's part of a step.

  Args:
    spec: fixed when compiled.
    params: the device's part of the weights.
    state: its part: the pages of its stage's layers, and its columns of what
      the stage before handed on; donated.
    buffers: the batch at each stage, see `batch.BatchLayout`; all rows 0 for
      none.

  Returns:
    The state, updated in place, and `batch.StepOutput` of the batch at the
    last stage, packed as its layout says.
  """
  model, layout = spec.model, spec.layout
  hidden, last_tokens = state.hidden, state.slots.last_tokens
  shards = mesh_lib.shards_of(spec.mesh)
  stage = 0 if shards.pp is None else lax.axis_index(shards.pp)
  layers = params['layers']
  if shards.pp is not None:
    layers = jax.tree.map(lambda leaf: leaf[0], layers)
  mine, leaving = (layout.split(buffers[i]) for i in (stage, -1))
  row, is_real, positions = _places_of_tokens(layout, mine)
  tokens = jnp.where(
    mine.from_device[row] != 0, last_tokens[mine.slots][row], mine.tokens)
  x = shards.embed(params['embed'], tokens)
  if hidden is not None:
    before = _whole(hidden[:layout.num_tokens], shards)
    x = jnp.where(stage == 0, x, before)
  rope_lens = None
  if model.rope.kind == 'dynamic':
    rope_lens = jnp.maximum(mine.prompt_lens[row], positions + 1)
  # Only what is sampled from leaves the last stage; where it is the only one,
  # already its last layer leaves the rest out.
  is_early = hidden is None and layout.num_samples < layout.num_tokens
  x, kv = models.run_layers(
    model, layers, state.kv, x, positions, rope_lens,
    _attend_to_pages(
      spec, state.kv, mine, stage, x.dtype, row, is_real, positions),
    windows=spec.windows, shards=shards,
    leaving=leaving.sample_tokens if is_early else None)
  if hidden is not None:
    hidden = lax.dynamic_update_slice_in_dim(
      hidden, _hand_on(x, shards), 0, axis=0)
  last = x if is_early else _from_last_stage(
    x[leaving.sample_tokens], shards)
  logits = models.unembed(
    model, params, models.final_norm(model, params, last), shards)
  output = _sample(model, logits, leaving, shards)
  slots = state_lib.SlotState(
    _keep(last_tokens, leaving, output.tokens))
  return state_lib.DeviceState(kv, slots, hidden), _packed(output)


def _keep(last_tokens: Int[Array, ' slots'], b: batch_lib.BatchArrays,
          sampled: Int[Array, ' R']) -> Int[Array, ' slots']:
  """Each slot's last token, where there is a new one."""
  index = jnp.arange(sampled.shape[0], dtype=jnp.int32)
  is_last = (index + 1 == b.num_samples) | (
    b.sample_slots != jnp.roll(b.sample_slots, -1))
  return last_tokens.at[jnp.where(
    is_last & (index < b.num_samples), b.sample_slots, last_tokens.shape[0])
  ].set(sampled, mode='drop')


def _packed(output: batch_lib.StepOutput) -> Int[Array, ' output']:
  return jnp.concatenate([x.view(jnp.int32).ravel() for x in output])


def _places_of_tokens(
    layout: batch_lib.BatchLayout, b: batch_lib.BatchArrays,
) -> tuple[Int[Array, ' T'], Array, Int[Array, ' T']]:
  """Of each token: its row, whether it is one, its place in its sequence."""
  index = jnp.arange(layout.num_tokens, dtype=jnp.int32)
  row = jnp.minimum(
    jnp.sum(index[:, None] >= b.cu_q_lens[None, 1:], axis=1, dtype=jnp.int32),
    layout.num_rows - 1)
  is_real = index < b.cu_q_lens[-1]
  # A row's tokens are its sequence's last ones.
  return row, is_real, jnp.where(
    is_real, index + (b.kv_lens - b.cu_q_lens[1:])[row], 0)


def _attend_to_pages(
    spec: StepSpec, kv: Sequence[kv_cache.LayerKv],
    b: batch_lib.BatchArrays, stage: Any, dtype: Any, row: Array,
    is_real: Array, positions: Array) -> Any:
  """A `models.Attend`: writes keys and values to pages, and reads those."""
  num_slots = jax.tree.leaves(kv)[0].shape[0] * spec.page_size
  slot_mapping = jnp.where(
    is_real, b.page_indices[row, positions // spec.page_size] * spec.page_size
    + positions % spec.page_size, num_slots)
  # Queries are what is sampled from, or all tokens; layers share their plans.
  asking = {spec.layout.num_samples: _samples_of(b, row), len(row): b}
  heads = spec.model.num_heads // spec.mesh.shape[mesh_lib.TP]
  k_pages, _ = kv[0]
  plans = {
    (n, w): rpa.make_plan(
      jax.ShapeDtypeStruct(
        (n, heads, spec.model.head_dim), rpa.query_dtype(k_pages, dtype)),
      k_pages, of.kv_lens, of.cu_q_lens, of.distribution, sliding_window=w,
      implementation=spec.attention)
    for n, of in asking.items() for w in set(itertools.chain(*spec.windows))}

  def attend(layer_kv: kv_cache.LayerKv, q: Array, k: Array, v: Array, *,
             scale: float, window: tuple[int | None, ...], rows: Array | None,
             ) -> tuple[Array, Any]:
    # The cache may have a dtype of its own, see `kv_cache.choose_dtype`.
    q_kv = q.astype(rpa.query_dtype(layer_kv[0], q.dtype))
    pages = rpa.write_kv(*layer_kv, k, v, slot_mapping)
    of = asking[len(q)]

    def within(window: int | None) -> Array:
      return rpa.ragged_paged_attention(
        q_kv, *pages, of.kv_lens, of.page_indices, of.cu_q_lens,
        of.distribution, scale=scale, sliding_window=window,
        plan=plans[len(q), window], implementation=spec.attention)

    windows = list(dict.fromkeys(window))
    if len(windows) == 1:
      out = within(windows[0])
    else:
      which = jnp.array([windows.index(w) for w in window], jnp.int32)[stage]
      out = lax.switch(which, [functools.partial(within, w) for w in windows])
    return out.astype(q.dtype), pages

  return attend


def _samples_of(b: batch_lib.BatchArrays, row: Int[Array, ' T'],
                ) -> batch_lib.BatchArrays:
  """The batch of what is sampled from only: as if all were decodes."""
  index = jnp.arange(b.sample_tokens.shape[0] + 1, dtype=jnp.int32)
  return b._replace(
    cu_q_lens=jnp.minimum(index, b.num_samples), kv_lens=b.sample_positions,
    page_indices=b.page_indices[row[b.sample_tokens]],
    distribution=jnp.tile(b.num_samples, 2))


def _whole(x: Float[Array, 'T columns'], shards: sharding.Shards,
           ) -> Float[Array, 'T D']:
  """Hidden states from each device's columns of them."""
  if shards.tp is None:
    return x
  return lax.all_gather(x, shards.tp, axis=1, tiled=True)


def _hand_on(x: Float[Array, 'T D'], shards: sharding.Shards,
             ) -> Float[Array, 'T columns']:
  """Hidden states to the next stage, of which each device sends its part.

  All devices of a stage have them all: to send them all would take tp times
  the bytes between hosts (Megatron-LM's scatter-gather, arXiv 2104.04473).
  """
  assert shards.pp is not None
  if shards.tp is not None:
    columns = x.shape[1] // lax.axis_size(shards.tp)
    x = lax.dynamic_slice_in_dim(
      x, lax.axis_index(shards.tp) * columns, columns, axis=1)
  num_stages = lax.axis_size(shards.pp)
  return lax.ppermute(
    x, shards.pp, [(i, i + 1) for i in range(num_stages - 1)])


def _from_last_stage(rows: Float[Array, 'R D'], shards: sharding.Shards,
                     ) -> Float[Array, 'R D']:
  """The last stage's rows, on all."""
  if shards.pp is None:
    return rows
  is_last = lax.axis_index(shards.pp) == lax.axis_size(shards.pp) - 1
  return lax.psum(jnp.where(is_last, rows, 0), shards.pp)


def _sample(
    model: model_config_lib.ModelConfig, logits: Float[Array, 'R columns'],
    b: batch_lib.BatchArrays, shards: sharding.Shards,
) -> batch_lib.StepOutput:
  """Samples from logits of which each device has some columns.

  Columns of all rows become all columns of some rows, so that devices share
  the work and rows are sampled from as they are on one device.
  """
  rows = {**batch_lib.sampling_of(b.sampling), 'seeds': b.seeds,
          'positions': b.sample_positions}
  if not shards.axes:
    return sampling.sample(logits, **rows)
  num_rows, num_devices = logits.shape[0], lax.axis_size(shards.axes)
  share = -(-num_rows // num_devices)

  def padded(row: Array) -> Array:  # It asks for what another asks for.
    last = (share * num_devices - num_rows, *[0] * (row.ndim - 1))
    return jnp.pad(row, [(0, n) for n in last], mode='edge')

  logits = lax.all_to_all(padded(logits), shards.axes, 0, 1, tiled=True)
  start = lax.axis_index(shards.axes) * share
  output = sampling.sample(logits[:, :model.vocab_size], **{
    name: lax.dynamic_slice_in_dim(padded(row), start, share)
    for name, row in rows.items()})
  gathered: batch_lib.StepOutput = jax.tree.map(
    lambda x: lax.all_gather(x, shards.axes, tiled=True)[:num_rows], output)
  return gathered

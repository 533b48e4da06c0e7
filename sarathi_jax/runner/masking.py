# SPDX-License-Identifier: Apache-2.0
"""Samples rows again, once it is known which tokens a grammar allows.

What may come next follows from the token before, which under look-ahead the
host does not know when it launches a step. So the step samples all rows alike,
and keeps the logits of those that follow a grammar (`keep`). While it computes,
the host gets the tokens of the step before, and makes masks; then a program
beside the steps samples the kept rows (`sample`), before the next step reads
what they gave. No row but these waits for a mask, and a step without any does
no more than to look for them.

Masks are bits: token i is bit i % 32 of word i // 32.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import packing
from sarathi_jax.runner import sampling_rows
from sarathi_jax.runner import state as state_lib

_FEW = 8  # sequences that are not worth two sizes; and the ratio of two


class MaskedArrays(NamedTuple):
  """The rows to sample, as in `batch.BatchArrays`, and their masks.

  Attributes:
    num_samples, sample_slots, sample_positions, seeds, sampling: of M rows.
    masks: [M, ceil(V / 32)] which tokens may come.
  """

  num_samples: Any
  sample_slots: Any
  sample_positions: Any
  seeds: Any
  sampling: Any
  masks: Any


def sizes(max_num_seqs: int) -> tuple[int, ...]:
  """Returns the numbers of rows to compile for, ascending.

  Each size takes seconds to compile. Few sequences of many follow a grammar, or
  all do.
  """
  if max_num_seqs <= _FEW:
    return (max_num_seqs,)
  return max_num_seqs // _FEW, max_num_seqs


@functools.cache
def message(num_rows: int, vocab_size: int) -> packing.Packing:
  """Returns how `MaskedArrays` of so many rows are packed."""
  row = (num_rows,)
  arrays = MaskedArrays(
    num_samples=(1,),
    sample_slots=row,
    sample_positions=row,
    seeds=(*row, 2),
    sampling=(batch_lib.NUM_SAMPLING, *row),
    masks=(*row, -(-vocab_size // 32)),
  )
  return packing.Packing(
    {name: (shape, packing.INT) for name, shape in arrays._asdict().items()}
  )


def rows_of(fields: batch_lib.BatchArrays) -> np.ndarray:
  """Returns which samples of a batch follow a grammar; NumPy."""
  is_masked = batch_lib.sampling_of(fields.sampling)['is_masked']
  return np.flatnonzero(is_masked[: int(fields.num_samples[0])])


def packed(
  fields: batch_lib.BatchArrays,
  rows: np.ndarray,
  masks: Mapping[int, np.ndarray],
  num_rows: int,
  vocab_size: int,
) -> np.ndarray:
  """Packs `MaskedArrays` of a batch.

  Args:
    fields: of the batch.
    rows: see `rows_of`.
    masks: of the samples that somebody waits for; all tokens may come of
      others.
    num_rows: M, at least as many.
    vocab_size: V.
  """
  where = message(num_rows, vocab_size)
  ints = np.zeros(where.size, np.int32)
  told = MaskedArrays(**where.split(ints))
  n = len(rows)
  told.num_samples[:] = n
  for name in ('sample_slots', 'sample_positions', 'seeds'):
    getattr(told, name)[:n] = getattr(fields, name)[rows]
  told.sampling[:, :n] = fields.sampling[:, rows]
  told.sampling[:, n:] = batch_lib.NEUTRAL[:, None]
  told.masks[:] = -1
  for i, row in enumerate(rows.tolist()):
    if row in masks:
      told.masks[i] = masks[row]
  return ints


def put(
  arrays: tuple[np.ndarray, ...],
  rows: np.ndarray,
  masked: tuple[np.ndarray, ...],
) -> None:
  """Puts what was sampled anew, or told of it, into a step's.

  Args:
    arrays: of all rows of the step, may be written.
    rows: which were sampled anew.
    masked: the same of these, and of padding.
  """
  for whole, part in zip(arrays, masked, strict=True):
    whole[rows] = part[: len(rows)]


def keep(
  kept: Float[Array, 'most columns'],
  logits: Float[Array, 'R columns'],
  is_masked: Bool[Array, ' R'],
  *,
  always: bool = False,
) -> Float[Array, 'most columns']:
  """Returns `kept`, which begins with the masked rows, if there are any.

  Args:
    kept, logits: a device's columns.
    is_masked: which rows follow a grammar.
    always: whether to copy as many rows, whichever they are, if none does: on
      meshes of GPUs XLA puts this condition into no CUDA graph.
  """
  most, num_rows = len(kept), len(logits)
  counts = sorted({min(size, num_rows) for size in sizes(most)})

  def save(count: int, kept: Array) -> Array:
    (rows,) = jnp.nonzero(is_masked, size=count, fill_value=0)
    return lax.dynamic_update_slice(kept, logits[rows], (0, 0))

  if always:
    return save(counts[-1], kept)
  num = is_masked.sum(dtype=jnp.int32)
  which = sum((num > count).astype(jnp.int32) for count in [0, *counts[:-1]])
  return lax.switch(
    which,
    [lambda kept: kept, *(functools.partial(save, n) for n in counts)],
    kept,
  )


def sample(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  num_rows: int,
  state: state_lib.DeviceState,
  ints: Int[Array, ' message'],
  *,
  deterministic: bool = False,
) -> tuple[state_lib.DeviceState, tuple[Array, Array]]:
  """Samples the kept rows; `state` is donated.

  Args:
    model, mesh: the deployment.
    num_rows: M.
    state: of the step that kept them.
    ints: `MaskedArrays`, see `message`.
    deterministic: see `sampling.sample`.

  Returns:
    The state, as if the step had sampled so, and of M rows `batch.StepOutput`,
    and what is told beside it; packed as `batch.output_packing` says, and
    `told.ToldOfStep`.
  """
  kept = state.logits
  shards = mesh_lib.shards_of(mesh)

  def run(kept: Array, slots: state_lib.SlotState, ints: Array) -> Any:
    rows = MaskedArrays(**message(num_rows, model.vocab_size).split(ints))
    output, told, adjustments = sampling_rows.sample(
      model,
      kept[:num_rows],
      rows,
      slots.adjustments,
      shards,
      rows.masks,
      deterministic=deterministic,
    )
    last_tokens = sampling_rows.keep_last(
      slots.last_tokens, rows, output.tokens
    )
    return state_lib.SlotState(last_tokens, adjustments), (
      sampling_rows.packed(output),
      sampling_rows.packed(told),
    )

  if mesh.size > 1:
    everywhere = PartitionSpec()
    run = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(PartitionSpec(*state_lib.LOGITS), everywhere, everywhere),
      out_specs=everywhere,
      check_vma=False,
    )
  slots, told = run(kept, state.slots, ints)
  return dataclasses.replace(state, slots=slots), told

# SPDX-License-Identifier: Apache-2.0
"""What is known of a batch between its launch and its fetch.

A batch enters the pipeline, goes from stage to stage, and leaves it with an
output; rows of it may be sampled anew once a grammar's masks are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import itertools
from typing import NamedTuple

import jax
import numpy as np

from sarathi_jax import types
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import copying
from sarathi_jax.runner import masking
from sarathi_jax.runner import told as told_lib


class Pending(NamedTuple):
  """A batch being computed.

  Attributes:
    chunks: of the batch, that may sample.
    step: the step in which it leaves the last stage.
    fields: the batch, as it is packed.
  """

  chunks: tuple[types.Chunk, ...]
  step: int
  fields: batch_lib.BatchArrays


class AtStage(NamedTuple):
  """A batch at a stage; an empty one where there was nothing to do.

  Attributes:
    buffer: the batch, packed.
    num_tokens: of the batch.
    decodes_only: whether it has no chunks of prefills.
    is_batch: whether there is one.
    tells: whether it asks for more than tokens and their log-probabilities.
    tells_prompts: whether it asks for those of prompts.
    has_adapters: whether it has sequences with adapters.
    setups: what sets up slots before the batch is sampled from.
    copies: pages that a stage copies before it computes the batch.
  """

  buffer: np.ndarray
  num_tokens: int
  decodes_only: bool
  is_batch: bool
  tells: bool = False
  tells_prompts: bool = False
  has_adapters: bool = False
  setups: tuple[np.ndarray, ...] = ()
  copies: copying.Copies = ()


class Output(NamedTuple):
  """What a step computed.

  Attributes:
    layout: how it is packed.
    output, told: see `step.stage_step`; None if it is not asked for.
  """

  layout: batch_lib.BatchLayout
  output: jax.Array
  told: jax.Array | None


class Asked(NamedTuple):
  """Rows of a batch to sample anew.

  Attributes:
    rows: which samples of the batch.
    num_rows: of the program.
    ints: see `masking.message`.
  """

  rows: np.ndarray
  num_rows: int
  ints: np.ndarray


class Masked(NamedTuple):
  """What was sampled anew.

  Attributes:
    rows, num_rows: see `Asked`.
    output, told: see `masking.sample`.
  """

  rows: np.ndarray
  num_rows: int
  output: jax.Array
  told: jax.Array


def prefills(batch: types.ScheduledBatch) -> tuple[types.Chunk, ...]:
  """Returns the chunks of prefills, which come after all decodes."""
  last = itertools.takewhile(lambda c: c.is_prefill, reversed(batch.chunks))
  return tuple(last)


def tells_prompts(prefills: tuple[types.Chunk, ...]) -> bool:
  """Whether these chunks of prefills ask for log-probabilities of prompts."""
  return any(chunk.next_token is not None for chunk in prefills)


def packed(
  stages: Sequence[AtStage], layout: batch_lib.BatchLayout
) -> np.ndarray:
  """Returns the integers of a step, of the batch at each stage in order."""
  if len(stages) == 1:
    return stages[0].buffer
  buffers = np.zeros((len(stages), layout.size), np.int32)
  for row, stage in zip(buffers, stages, strict=True):
    buffer = stage.buffer
    if layout.has_adapters and not stage.has_adapters:
      buffer = layout.widened(buffer)
    # One that is to tell of a prompt was packed for a step that can, which may
    # be larger than the one that it enters; tokens, which end it, are padded.
    buffer = buffer[: layout.size]
    row[: len(buffer)] = buffer
  return buffers.ravel()


def asked(
  pending: Pending,
  masks: Mapping[int, np.ndarray],
  sizes: Iterable[int],
  vocab_size: int,
) -> Asked:
  """Returns which rows of a batch to sample anew.

  Args:
    pending: the batch.
    masks: see `scheduler.runner.Runner.mask`.
    sizes: the numbers of rows that programs take, ascending.
    vocab_size: of the model.
  """
  ends = list(itertools.accumulate(c.samples for c in pending.chunks))
  rows = masking.rows_of(pending.fields)
  num_rows = next(n for n in sizes if n >= len(rows))
  ints = masking.packed(
    pending.fields,
    rows,
    {ends[i] - 1: mask for i, mask in masks.items()},
    num_rows,
    vocab_size,
  )
  return Asked(rows, num_rows, ints)


def sampled(
  pending: Pending, step: Output, masked: Masked | None
) -> types.Sampled:
  """Waits for what was sampled for a batch, and returns it.

  Args:
    pending: the batch.
    step: what the step computed in which it left the last stage.
    masked: what was sampled anew, if any was.
  """
  layout, buffer, told = step
  read = np.asarray if masked is None else np.array  # which may be written
  with jax.transfer_guard_device_to_host('allow'):
    output = batch_lib.StepOutput(**layout.output.split(read(buffer)))
    if masked is not None:
      where = batch_lib.output_packing(masked.num_rows)
      found = batch_lib.StepOutput(**where.split(np.asarray(masked.output)))
      masking.put(output, masked.rows, found)
    tokens = output.tokens.tolist()
    sampled = types.Sampled.of(pending.chunks, tokens, output.logprobs.tolist())
    if told is None:
      return sampled
    of_samples, of_prompts = layout.told.split(read(told))
    if masked is not None:
      told_anew, _ = told_lib.ToldOfStep(masked.num_rows, 0).split(
        np.asarray(masked.told)
      )
      masking.put(of_samples, masked.rows, told_anew)
  return sampled._replace(
    told=told_lib.of_samples(pending.chunks, tokens, of_samples),
    prompts=told_lib.of_prompts(pending.chunks, of_prompts),
  )

# SPDX-License-Identifier: Apache-2.0
"""A scheduled batch as one int32 array, and back. NumPy; loads no JAX.

All integers of a step travel to the device in one buffer, since each transfer
costs more than its bytes. `BatchLayout` says where each field lies in it.

Example, page_size=4, two decodes and a chunk, T=8, S=3, P=3:

  sequence     computed  tokens now   cu_q_lens  kv_lens  page_indices
  'a' decode   5         [7]          0..1       6        [2, 0, .]
  'b' decode   3         on device    1..2       4        [5, ., .]
  'c' chunk    4         [1, 2, 3]    2..5       7        [1, 3, .]

  tokens = [7, 0, 1, 2, 3, 0, 0, 0]    'b' takes its token from slot 'b'
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple, cast

import numpy as np

from sarathi_jax import types

# Bits of `flags`.
FROM_DEVICE = 1  # the row's one token is in the device's array, by slot
SAMPLES = 2  # a token is sampled from the row's last position


class BatchArrays(NamedTuple):
  """A batch's fields; int32 where not said otherwise. Padded rows are 0.

  Attributes:
    cu_q_lens: [S + 1] where each sequence's tokens begin in the batch.
    kv_lens: [S] tokens in the cache once this batch's were written.
    page_indices: [S, P].
    distribution: [2] number of decodes (first), number of sequences.
    slots: [S] see `types.Chunk`.
    flags: [S] FROM_DEVICE, SAMPLES.
    prompt_lens, top_k: [S].
    seeds: [S, 2] the low and the high half of each, two's complement.
    temperature, top_p, min_p: [S] float32.
    tokens: [T] ids; the last, so that a buffer can be made longer.
  """

  cu_q_lens: Any
  kv_lens: Any
  page_indices: Any
  distribution: Any
  slots: Any
  flags: Any
  prompt_lens: Any
  seeds: Any
  top_k: Any
  temperature: Any
  top_p: Any
  min_p: Any
  tokens: Any


_FLOATS = ('temperature', 'top_p', 'min_p')
_FLOAT32_MAX = np.finfo(np.float32).max
_INT32_MAX = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, slots=True)
class BatchLayout:
  """Where the fields of a batch lie in its buffer.

  Attributes:
    num_tokens: T, the bucket of the ladder.
    num_rows: S, the most sequences such a batch has.
    pages_per_seq: P.
  """

  num_tokens: int
  num_rows: int
  pages_per_seq: int

  @property
  def shapes(self) -> BatchArrays:
    """The shape of each field, in the order they lie in the buffer."""
    row = (self.num_rows,)
    return BatchArrays._make((
      (self.num_rows + 1,), row, (self.num_rows, self.pages_per_seq), (2,),
      *[row] * 3, (self.num_rows, 2), *[row] * 4, (self.num_tokens,)))

  @property
  def size(self) -> int:
    """int32 values in a buffer."""
    return _spans(self)[-1][1].stop

  def split(self, buffer: Any, to_float: Callable[[Any], Any]) -> BatchArrays:
    """Views of a buffer's fields, NumPy's or JAX's.

    Args:
      buffer: [size] int32.
      to_float: reinterprets int32 bits as float32.
    """
    fields = {name: buffer[span].reshape(shape)
              for name, span, shape in _spans(self)}
    return BatchArrays(**fields | {
      name: to_float(fields[name]) for name in _FLOATS})


@functools.cache  # Each step asks.
def _spans(layout: BatchLayout) -> list[tuple[str, slice, tuple[int, ...]]]:
  """Name, place and shape of each field."""
  shapes = layout.shapes._asdict()
  stops = list(itertools.accumulate(map(math.prod, shapes.values())))
  return [(name, slice(stop - math.prod(shape), stop), shape)
          for (name, shape), stop in zip(shapes.items(), stops, strict=True)]


class BatchBuilder:
  """Packs batches. The result depends on the batch alone.

  It remembers each slot's page table and sampling parameters as arrays: a
  chunk passes on the same objects until a page is added, and converting 256
  of them anew would cost more than the rest of the step's host work.
  """

  def __init__(self, max_num_seqs: int, pages_per_seq: int) -> None:
    self._tables: list[tuple[int, ...] | None] = [None] * max_num_seqs
    self._sampling: list[types.SamplingParams | None] = [None] * max_num_seqs
    self._pages = np.zeros((max_num_seqs, pages_per_seq), np.int32)
    self._floats = np.zeros((3, max_num_seqs), np.float32)
    self._top_k = np.zeros(max_num_seqs, np.int32)

  def build(self, batch: types.ScheduledBatch,
            layout: BatchLayout) -> np.ndarray:
    """Packs a batch into a fresh [layout.size] int32 buffer."""
    n = len(batch.chunks)
    columns: Any = types.Chunk(  # A tuple of each field.
      *cast(Any, zip(*batch.chunks, strict=True)))
    buffer = np.zeros(layout.size, np.int32)
    fields = layout.split(buffer, lambda bits: bits.view(np.float32))
    for slot, table, sampling in zip(
        columns.slot, columns.page_table, columns.sampling, strict=True):
      if self._tables[slot] is not table:
        self._remember_table(slot, table)
      if self._sampling[slot] is not sampling:
        self._remember_sampling(slot, sampling)
    slots = np.array(columns.slot, np.int32)
    fields.slots[:n] = slots
    np.take(self._pages, slots, axis=0, out=fields.page_indices[:n])
    fields.temperature[:n], fields.top_p[:n], fields.min_p[:n] = (
      self._floats[:, slots])
    fields.top_k[:n] = self._top_k[slots]
    q_lens = np.array(columns.num_tokens, np.int32)
    np.cumsum(q_lens, out=fields.cu_q_lens[1:n + 1])
    fields.cu_q_lens[n + 1:] = batch.num_tokens
    fields.kv_lens[:n] = q_lens + np.array(columns.start, np.int32)
    fields.prompt_lens[:n] = columns.prompt_len
    fields.seeds[:n] = np.array(columns.seed, '<i8').view('<i4').reshape(n, 2)
    fields.flags[:n] = [
      (FROM_DEVICE if not tokens else 0) | (SAMPLES if samples else 0)
      for tokens, samples in zip(
        columns.tokens, columns.samples, strict=True)]
    fields.tokens[:batch.num_tokens] = np.fromiter(
      itertools.chain.from_iterable(t or (0,) for t in columns.tokens),
      np.int32, batch.num_tokens)
    fields.distribution[:] = n - sum(columns.is_prefill), n
    return buffer

  def _remember_table(self, slot: int, table: tuple[int, ...]) -> None:
    self._pages[slot, :len(table)] = table
    self._pages[slot, len(table):] = 0  # of the request here before
    self._tables[slot] = table

  def _remember_sampling(self, slot: int,
                         sampling: types.SamplingParams) -> None:
    self._floats[:, slot] = np.minimum(
      (sampling.temperature, sampling.top_p, sampling.min_p), _FLOAT32_MAX)
    self._top_k[slot] = min(max(sampling.top_k, 0), _INT32_MAX)
    self._sampling[slot] = sampling


def ladder(max_tokens: int, max_num_seqs: int, *,
           fine: bool = False) -> tuple[int, ...]:
  """Token counts to compile the step for, ascending.

  Powers of two up to a half of the largest, then eighths of it in multiples
  of 128: hybrid batches are near the budget nearly always, and padding there
  is paid in full. The number of decodes at full load is one of them, too.

    ladder(512, 128) -> (8, 16, 32, 64, 128, 256, 384, 512)

  Args:
    max_tokens: of a step.
    max_num_seqs: running at once.
    fine: of decodes alone, one more between each two from 16 on: for devices
      on which a step of few tokens takes longer with each, as it does not
      where weights are read for as long as a hundred tokens are computed.
      Processors compute eight or sixteen at a time.
  """
  most_decodes = min(max_num_seqs, max_tokens)
  sizes = {max_tokens, most_decodes}
  size = 8
  while size < max_tokens:
    sizes.add(size)
    if fine and size >= 16 and size // 2 * 3 < most_decodes:
      sizes.add(size // 2 * 3)
    size *= 2
  step = max(128, -(-max_tokens // 8 // 128) * 128)
  sizes.update(range(step, max_tokens, step)[max_tokens // 2 // step:])
  return tuple(sorted(sizes))

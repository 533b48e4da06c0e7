# SPDX-License-Identifier: Apache-2.0
"""Packs a scheduled batch into one int32 array, and back.

The outputs of a step are packed likewise. Needs NumPy; loads no JAX.
`BatchLayout` says where each field lies.

Example, page_size=4, two decodes and a chunk, T=8, S=R=3, P=3:

  sequence     computed  tokens now   cu_q_lens  kv_lens  page_indices
  'a' decode   5         [7]          0..1       6        [2, 0, .]
  'b' decode   3         on device    1..2       4        [5, ., .]
  'c' chunk    4         [1, 2, 3]    2..5       7        [1, 3, .]

  tokens = [7, 0, 1, 2, 3, 0, 0, 0]    'b' takes its token from slot 'b'

  sample       sample_tokens  sample_slots  sample_positions
  of 'a'       0              slot of 'a'   6
  of 'b'       1              slot of 'b'   4
  ('c' ends here if its prompt does; else nothing is sampled for it)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any, NamedTuple, cast

import numpy as np

from sarathi_jax import sampling_fields
from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.runner import packing
from sarathi_jax.runner import page_tables
from sarathi_jax.runner import told as told_lib


class BatchArrays(NamedTuple):
  """A batch's fields, int32. Padded rows are 0, those of `sampling` neutral.

  Attributes:
    cu_q_lens: [S + 1] where each sequence's tokens begin in the batch.
    kv_lens: [S] tokens in the cache once this batch's were written.
    page_indices: [S, P] pages of each sequence, in order; of several groups of
      layers, or of one with a window, see `page_tables`.
    distribution: [2] number of decodes, which come first, and of sequences.
    slots: [S] see `types.Chunk`.
    from_device: [S] 1 where the one token is in the device's array, by slot.
    rope_lens: [S] of each sequence, see `types.Chunk`.
    next_tokens: [S] one more than `types.Chunk.next_token`, or -1 where that is
      -1; 0 where nothing is told of the prompt.
    next_temperatures: [S] bits of what the prompt's logits are divided by
      first; as all stages read one another's, it is there whatever is told.
    num_samples: [1] the number of real rows of the following fields.
    sample_tokens: [R] index in the batch of the token to sample after.
    sample_slots: [R] the slot of its sequence, which keeps the last sample.
    sample_positions: [R] the sampled token's position in its sequence.
    seeds: [R, 2] the low and the high half of each seed, two's complement.
    sampling: [F, R] bits of the sampling parameters, see `sampling_of`.
    adapters: [S] see `types.Chunk.adapter`; None in steps without any.
    tokens: [T] ids; the last field, so that a buffer can be made longer.
  """

  cu_q_lens: Any
  kv_lens: Any
  page_indices: Any
  distribution: Any
  slots: Any
  from_device: Any
  rope_lens: Any
  next_tokens: Any
  next_temperatures: Any
  num_samples: Any
  sample_tokens: Any
  sample_slots: Any
  sample_positions: Any
  seeds: Any
  sampling: Any
  adapters: Any
  tokens: Any


class StepOutput(NamedTuple):
  """The outputs of a step, one for each sample of its batch.

  Attributes:
    tokens: [R] int32 ids.
    logprobs: [R] float32, see `sampling.sample`.
  """

  tokens: Any
  logprobs: Any


_BOOL, _FLOAT = sampling_params.Kind.BOOL, sampling_params.Kind.FLOAT
# What the device gets of `SamplingParams`: the rows of `sampling`.
_SAMPLING = {
  **{
    name: (field.kind, field.on_device)
    for name, field in sampling_params.FIELDS.items()
    if field.on_device is not None
  },
  'is_adjusted': (_BOOL, sampling_fields.OnDevice(False)),
  'is_masked': (_BOOL, sampling_fields.OnDevice(False)),
  'telling': (sampling_params.Kind.INT, sampling_fields.OnDevice(0)),
}
NUM_SAMPLING = len(_SAMPLING)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchLayout:
  """The places of a batch's fields, and of its outputs, in buffers.

  Attributes:
    num_tokens: T, the bucket of the ladder.
    num_rows: S, the most sequences that such a batch has.
    num_samples: R, the most tokens that are sampled for it.
    pages_per_seq: P.
    tells_prompts: whether the step tells of prompts, see `Chunk.next_token`.
    decodes_only: whether no sequence is a chunk of a prefill.
    has_adapters: whether sequences may have adapters.
    tables: how a sequence's P pages lie; None: its one table is whole.
  """

  num_tokens: int
  num_rows: int
  num_samples: int
  pages_per_seq: int
  tells_prompts: bool = False
  decodes_only: bool = False
  has_adapters: bool = False
  tables: page_tables.PageTables | None = None

  @property
  def input(self) -> packing.Packing:
    """The packing of `BatchArrays`."""
    return _packings(self)[0]

  @property
  def output(self) -> packing.Packing:
    """The packing of `StepOutput`."""
    return _packings(self)[1]

  @property
  def told(self) -> told_lib.ToldOfStep:
    """The packing of what is told beside `StepOutput`."""
    return told_lib.ToldOfStep(
      self.num_samples, self.num_tokens if self.tells_prompts else 0
    )

  @property
  def size(self) -> int:
    """The number of int32 values in a batch's buffer."""
    return self.input.size

  def split(self, buffer: Any) -> BatchArrays:
    """Returns the fields of a batch's buffer, an array of NumPy or JAX."""
    return BatchArrays(**{'adapters': None, **self.input.split(buffer)})

  def widened(self, buffer: np.ndarray) -> np.ndarray:
    """Returns a batch's buffer that lacks adapters, with none for each row."""
    span = self.input.span('adapters')
    nothing = np.zeros(span.stop - span.start, np.int32)
    return np.concatenate((buffer[: span.start], nothing, buffer[span.start :]))

  def tells(self, buffer: np.ndarray) -> bool:
    """Whether a batch asks for what `told` packs."""
    rows = self.input.span('sampling')
    telling = buffer[rows.stop - self.num_samples : rows.stop]
    return bool(telling.any() or buffer[self.input.span('next_tokens')].any())


@functools.cache  # Each step asks.
def _packings(layout: BatchLayout) -> tuple[packing.Packing, packing.Packing]:
  row, sample = (layout.num_rows,), (layout.num_samples,)
  batch = BatchArrays(
    cu_q_lens=(layout.num_rows + 1,),
    kv_lens=row,
    page_indices=(layout.num_rows, layout.pages_per_seq),
    distribution=(2,),
    slots=row,
    from_device=row,
    rope_lens=row,
    next_tokens=row,
    next_temperatures=row,
    num_samples=(1,),
    sample_tokens=sample,
    sample_slots=sample,
    sample_positions=sample,
    seeds=(*sample, 2),
    sampling=(NUM_SAMPLING, *sample),
    adapters=row if layout.has_adapters else None,
    tokens=(layout.num_tokens,),
  )
  return (
    packing.Packing(
      {
        name: (shape, packing.INT)
        for name, shape in batch._asdict().items()
        if shape is not None
      }
    ),
    output_packing(layout.num_samples),
  )


@functools.cache
def output_packing(num_samples: int) -> packing.Packing:
  """Returns how the `StepOutput` of so many samples is packed."""
  sample = (num_samples,)
  return packing.Packing(
    StepOutput(
      tokens=(sample, packing.INT),
      logprobs=(sample, packing.FLOAT),
    )._asdict()
  )


class BatchBuilder:
  """Packs batches. The result depends on the batch alone.

  Keeps each slot's page table and sampling parameters as arrays: a chunk
  passes on the same objects until a page is added, and converting 256 of them
  anew would cost more than the rest of the step's host work.
  """

  def __init__(
    self, max_num_seqs: int, places: int, num_groups: int = 1
  ) -> None:
    self._tables: list[tuple[int, ...] | None] = [None] * max_num_seqs
    self._params: list[types.SamplingParams | None] = [None] * max_num_seqs
    self._pages = np.zeros((max_num_seqs, num_groups, places), np.int32)
    self._sampling = np.zeros((NUM_SAMPLING, max_num_seqs), np.int32)

  def build(
    self, batch: types.ScheduledBatch, layout: BatchLayout
  ) -> np.ndarray:
    """Packs a batch into a fresh [layout.size] int32 buffer."""
    n = len(batch.chunks)
    columns: Any = types.Chunk(  # A tuple of each field.
      *cast(Any, zip(*batch.chunks, strict=True))
    )
    buffer = np.zeros(layout.size, np.int32)
    fields = layout.split(buffer)
    for slot, table, params in zip(
      columns.slot, columns.page_table, columns.sampling, strict=True
    ):
      if self._tables[slot] is not table:
        self._remember_table(slot, table)
      if self._params[slot] is not params:
        self._remember_sampling(slot, params)
    for fork in batch.forks:
      self._remember_sampling(fork.chunk.slot, fork.chunk.sampling)
    slots = np.array(columns.slot, np.int32)
    fields.slots[:n] = slots
    starts = np.array(columns.start, np.int32)
    if (tables := layout.tables) is None:
      np.take(self._pages[:, 0], slots, axis=0, out=fields.page_indices[:n])
    else:
      tables.write(self._pages, slots, starts, fields.page_indices[:n])
    q_lens = np.array(columns.num_tokens, np.int32)
    np.cumsum(q_lens, out=fields.cu_q_lens[1 : n + 1])
    fields.cu_q_lens[n + 1 :] = batch.num_tokens
    fields.kv_lens[:n] = q_lens + starts
    fields.rope_lens[:n] = columns.rope_len
    if layout.has_adapters:
      fields.adapters[:n] = columns.adapter
    if columns.next_token.count(None) != n:
      fields.next_tokens[:n] = [
        0 if token is None else token + 1 or -1 for token in columns.next_token
      ]
      packing.as_float(fields.next_temperatures)[:n] = [
        params.prompt_temperature for params in columns.sampling
      ]
    fields.from_device[:n] = np.fromiter(
      map(operator.not_, columns.tokens), np.int32, n
    )
    fields.tokens[: batch.num_tokens] = np.fromiter(
      itertools.chain.from_iterable(t or (0,) for t in columns.tokens),
      np.int32,
      batch.num_tokens,
    )
    # What computes one token attends as decodes do.
    several = (q_lens > 1).nonzero()[0]
    fields.distribution[:] = several[0] if len(several) else n, n
    self._add_samples(
      fields,
      np.fromiter(columns.samples, np.int32, n),
      columns.seed,
      batch.forks,
    )
    return buffer

  def _add_samples(
    self,
    fields: BatchArrays,
    counts: np.ndarray,
    seeds: tuple[int, ...],
    forks: tuple[types.Fork, ...],
  ) -> None:
    """Fills the fields of samples: `counts` of them at each row's end.

    Those of `forks` come after them, each at the end of its row.
    """
    rows = counts.nonzero()[0]
    before_end: Any = 0  # of its row's
    if counts.max() > 1:
      rows = rows.repeat(counts[rows])
      before_end = counts.cumsum()[rows] - np.arange(1, len(rows) + 1)
    slots = fields.slots[rows]
    seeds_of = np.array(seeds, '<i8')[rows]
    if forks:
      rows = np.append(rows, [fork.row for fork in forks])
      slots = np.append(slots, [fork.chunk.slot for fork in forks])
      seeds_of = np.append(seeds_of, [fork.chunk.seed for fork in forks])
      before_end = np.append(
        np.broadcast_to(before_end, len(rows) - len(forks)), [0] * len(forks)
      )
    m = len(rows)
    fields.num_samples[:] = m
    fields.sample_tokens[:m] = fields.cu_q_lens[1:][rows] - 1 - before_end
    fields.sample_slots[:m] = slots
    fields.sample_positions[:m] = fields.kv_lens[rows] - before_end
    fields.seeds[:m] = seeds_of.view('<i4').reshape(-1, 2)
    fields.sampling[:, :m] = self._sampling[:, slots]
    fields.sampling[:, m:] = NEUTRAL[:, None]

  def _remember_sampling(self, slot: int, params: types.SamplingParams) -> None:
    self._params[slot] = params
    self._sampling[:, slot] = _bits(
      [
        on_device.read(getattr(params, name))
        for name, (_, on_device) in _SAMPLING.items()
      ]
    )

  def _remember_table(self, slot: int, table: tuple[int, ...]) -> None:
    # Place by place, a page of each group.
    groups = self._pages.shape[1]
    num = len(table) // groups
    pages = np.array(table, np.int32).reshape(num, groups)
    self._pages[slot, :, :num] = pages.T
    self._pages[slot, :, num:] = 0  # of the request here before
    self._tables[slot] = table


def _bits(values: list[float]) -> np.ndarray:
  """Returns [F] values in 32 bits each; too large ones become the largest."""
  bits = np.zeros(NUM_SAMPLING, np.int32)
  for i, (value, (kind, _)) in enumerate(
    zip(values, _SAMPLING.values(), strict=True)
  ):
    most = _FLOAT32_MAX if kind is _FLOAT else _INT32_MAX
    held = max(min(value, most), -most)
    bits[i] = np.float32(held).view(np.int32) if kind is _FLOAT else held
  return bits


NEUTRAL = _bits([on_device.neutral for _, on_device in _SAMPLING.values()])


def sampling_of(rows: Any) -> dict[str, Any]:
  """Returns the rows of `BatchArrays.sampling` by name, each in its dtype."""
  return {
    name: packing.as_float(row)
    if kind is _FLOAT
    else row != 0
    if kind is _BOOL
    else row
    for (name, (kind, _)), row in zip(_SAMPLING.items(), rows, strict=True)
  }


# Sizes below eight tokens. Two tokens take as long as four.
_SMALL = (1, 4)


def ladder(
  max_tokens: int, max_num_seqs: int, *, fine: bool = False, small: bool = False
) -> tuple[int, ...]:
  """Returns the token counts to compile the step for, ascending.

  They are powers of two up to half of the largest, then eighths of it: hybrid
  batches are nearly always near the budget, where padding is paid in full. The
  number of decodes at full load is among them, too.

    ladder(512, 128) -> (8, 16, 32, 64, 128, 256, 384, 512)
    ladder(512, 64, fine=True) -> (
      8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)

  Args:
    max_tokens: the most tokens of a step.
    max_num_seqs: the most sequences running at once.
    fine: whether to add a size between each two from 16 on, and to round
      eighths to multiples of 32, not of 128. It is for devices on which every
      few tokens make a step longer. (On others, reading the weights takes as
      long as computing a hundred tokens.)
    small: whether to add one token, and four. It is for devices on which eight
      tokens take longer, and models large enough to be worth two more programs.
  """
  sizes = {max_tokens, min(max_num_seqs, max_tokens)}
  if small:
    sizes.update(n for n in _SMALL if n < max_tokens)
  size = 8
  while size < max_tokens:
    sizes.add(size)
    if fine and size >= 16 and size // 2 * 3 < max_tokens:
      sizes.add(size // 2 * 3)
    size *= 2
  tile = 32 if fine else 128
  step = -(-max_tokens // 8 // tile) * tile or tile
  sizes.update(range(step, max_tokens, step)[max_tokens // 2 // step :])
  return tuple(sorted(sizes))

# SPDX-License-Identifier: Apache-2.0
"""Batches packed by hand: this is the documentation of the buffer."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from sarathi_jax import types
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import in_flight

PAGE_SIZE = 4
LAYOUT = batch_lib.BatchLayout(
  num_tokens=8,
  num_rows=4,
  num_samples=4,
  pages_per_seq=3,
  tells_prompts=True,
)
GREEDY = types.SamplingParams(temperature=0)


def chunk(
  request_id: str,
  *,
  slot: int,
  start: int,
  tokens: tuple[int, ...],
  pages: tuple[int, ...],
  **fields,
) -> types.Chunk:
  """A decode if `tokens` is empty or `is_prefill` is not given."""
  fields = (
    dict(
      num_tokens=len(tokens) or 1,
      is_prefill=False,
      samples=1,
      prompt_len=0,
      seed=0,
      sampling=GREEDY,
    )
    | fields
  )
  return types.Chunk(
    request_id=request_id,
    slot=slot,
    start=start,
    tokens=tokens,
    page_table=pages,
    **fields,
  )


def batch(*chunks: types.Chunk) -> types.ScheduledBatch:
  return types.ScheduledBatch(0, chunks, sum(c.num_tokens for c in chunks))


def build(
  builder: batch_lib.BatchBuilder,
  *chunks: types.Chunk,
  layout: batch_lib.BatchLayout = LAYOUT,
) -> batch_lib.BatchArrays:
  buffer = builder.build(batch(*chunks), layout)
  assert buffer.dtype == np.int32 and buffer.shape == (layout.size,)
  return layout.split(buffer)


def params(got: batch_lib.BatchArrays) -> dict[str, list[float]]:
  return {
    name: row.tolist()
    for name, row in batch_lib.sampling_of(got.sampling).items()
  }


@pytest.fixture
def builder() -> batch_lib.BatchBuilder:
  return batch_lib.BatchBuilder(max_num_seqs=6, places=3)


# The example of the module's docstring.
A = chunk(
  'a',
  slot=5,
  start=5,
  tokens=(7,),
  pages=(2, 0),
  rope_len=4,
  seed=2**62 + 11,
  sampling=types.SamplingParams(temperature=0.5, top_k=3),
)
B = chunk(
  'b',
  slot=0,
  start=3,
  tokens=(),
  pages=(5,),
  rope_len=2,
  seed=-2,
  sampling=types.SamplingParams(top_p=0.25, top_k=-1),
)
C = chunk(
  'c',
  slot=2,
  start=4,
  tokens=(1, 2, 3),
  pages=(1, 3),
  rope_len=9,
  seed=13,
  is_prefill=True,
  samples=0,
  sampling=types.SamplingParams(min_p=0.125, temperature=2),
)

EXPECTED = batch_lib.BatchArrays(
  tokens=[7, 0, 1, 2, 3, 0, 0, 0],  # b's is on the device
  cu_q_lens=[0, 1, 2, 5, 5],
  kv_lens=[6, 4, 7, 0],
  page_indices=[[2, 0, 0], [5, 0, 0], [1, 3, 0], [0, 0, 0]],
  distribution=[2, 3],
  slots=[5, 0, 2, 0],
  from_device=[0, 1, 0, 0],
  rope_lens=[4, 2, 9, 0],
  next_tokens=[0, 0, 0, 0],
  next_temperatures=[0, 0, 0, 0],
  num_samples=[2],
  sample_tokens=[0, 1, 0, 0],
  sample_slots=[5, 0, 0, 0],
  sample_positions=[6, 4, 0, 0],
  seeds=[[11, 2**30], [-2, -1], [0, 0], [0, 0]],
  sampling=dict(
    top_k=[3, 0, 0, 0],
    temperature=[0.5, 1, 0, 0],
    top_p=[1, 0.25, 1, 1],
    min_p=[0, 0, 0, 0],
  ),
  adapters=None,
)


def assert_equal(
  got: batch_lib.BatchArrays, expected: batch_lib.BatchArrays
) -> None:
  assert params(got) | expected.sampling == params(got)
  for name, array in got._replace(sampling=0)._asdict().items():
    np.testing.assert_array_equal(
      array, getattr(expected._replace(sampling=0), name), name
    )


def test_a_hybrid_batch_by_hand(builder):
  assert_equal(build(builder, A, B, C), EXPECTED)


def test_adapters_are_a_row_where_steps_have_any(builder):
  """And a batch without any is the same but for that row."""
  wide = dataclasses.replace(LAYOUT, has_adapters=True)
  chunks = A._replace(adapter=2), B, C._replace(adapter=1)
  got = build(builder, *chunks, layout=wide)
  np.testing.assert_array_equal(got.adapters, [2, 0, 1, 0])
  assert_equal(got._replace(adapters=None), EXPECTED)
  np.testing.assert_array_equal(
    wide.widened(builder.build(batch(A, B, C), LAYOUT)),
    builder.build(batch(A, B, C), wide),
  )


def test_several_tokens_of_a_sequence_are_sampled(builder):
  """After the last two of b's, and c's prompt ends; nothing after a's."""
  got = build(
    builder,
    A._replace(samples=0),
    B._replace(tokens=(8, 9), num_tokens=2, samples=2),
    C._replace(samples=1),
  )
  assert got.num_samples == 3
  np.testing.assert_array_equal(got.sample_tokens, [1, 2, 5, 0])
  np.testing.assert_array_equal(got.sample_slots, [0, 0, 2, 0])
  np.testing.assert_array_equal(got.sample_positions, [4, 5, 7, 0])
  np.testing.assert_array_equal(got.seeds, [[-2, -1]] * 2 + [[13, 0], [0, 0]])
  assert params(got)['temperature'] == [1, 1, 2, 0]
  assert params(got)['top_p'] == [0.25, 0.25, 1, 1]


@pytest.mark.parametrize(
  'next_token,expected', [(0, 1), (41, 42), (-1, -1), (None, 0)]
)
def test_what_follows_a_chunk_whose_prompt_is_told(
  builder, next_token, expected
):
  c = C._replace(
    next_token=next_token,
    sampling=dataclasses.replace(C.sampling, logprobs_mode='temperature'),
  )
  buffer = builder.build(batch(A, B, c), LAYOUT)
  scales = np.float32([1, 1, 2, 0]) * (next_token is not None)
  assert_equal(
    LAYOUT.split(buffer),
    EXPECTED._replace(
      next_tokens=[0, 0, expected, 0],
      next_temperatures=scales.view(np.int32),
    ),
  )
  assert LAYOUT.tells(buffer) == (next_token is not None)


@pytest.mark.parametrize(
  'fields,expected',
  [
    (dict(logprobs=0), 1),
    (dict(logprobs_mode='temperature'), 2),
    (dict(logprobs_mode='processed', logprobs=3), 3),
    (dict(logprob_token_ids=(4,)), 1),
    (dict(temperature=0.5), 0),
  ],
)
def test_what_asks_for_more_than_a_log_probability(builder, fields, expected):
  sampling = types.SamplingParams(**fields)
  buffer = builder.build(batch(A, B._replace(sampling=sampling)), LAYOUT)
  assert params(LAYOUT.split(buffer))['telling'] == [0, expected, 0, 0]
  assert LAYOUT.tells(buffer) == (expected > 0)


def test_forks_are_sampled_after_the_chunk_that_they_begin_at(builder):
  """After all others, each with its own slot, seed and parameters."""
  warm = types.SamplingParams(temperature=2, top_p=0.75)
  forks = tuple(
    types.Fork(
      2,
      chunk(
        f'c/{i}',
        slot=slot,
        start=7,
        tokens=(),
        pages=(1,),
        num_tokens=0,
        seed=seed,
        sampling=warm,
      ),
    )
    for i, (slot, seed) in enumerate([(3, 14), (1, -(2**40))], 1)
  )
  ends = C._replace(samples=1, sampling=warm)
  several = batch(A, B, ends)._replace(forks=forks)
  assert (several.size, several.num_tokens) == (5, 5)
  names = [c.request_id for c in several.samplers]
  assert names == ['a', 'b', 'c', 'c/1', 'c/2']
  layout = dataclasses.replace(LAYOUT, num_rows=6, num_samples=6)
  got = layout.split(builder.build(several, layout))
  assert got.num_samples == 5
  np.testing.assert_array_equal(got.distribution, [2, 3])
  np.testing.assert_array_equal(got.sample_tokens, [0, 1, 4, 4, 4, 0])
  slots = [c.slot for c in several.samplers]
  np.testing.assert_array_equal(got.sample_slots, [*slots, 0])
  assert got.sample_positions[2:5].tolist() == [7, 7, 7]
  seeds = np.array(got.seeds).view('<i8').ravel()
  assert seeds[2:].tolist() == [C.seed, 14, -(2**40), 0]
  assert params(got)['temperature'][2:] == [2, 2, 2, 0]
  assert params(got)['top_p'][2:] == [0.75, 0.75, 0.75, 1]


def test_a_batch_of_more_samples_than_tokens_has_a_step_of_these(builder):
  forks = tuple(
    types.Fork(
      0,
      chunk(f'a/{i}', slot=i, start=1, tokens=(), pages=(), num_tokens=0),
    )
    for i in range(1, 4)
  )
  first = chunk('a', slot=0, start=0, tokens=(5,), pages=(1,), is_prefill=True)
  one = batch(first)._replace(forks=forks)
  assert (one.num_tokens, one.size) == (1, 4)
  got = LAYOUT.split(builder.build(one, LAYOUT))
  assert got.num_samples == 4
  assert got.sample_tokens.tolist() == [0] * 4
  assert got.sample_slots.tolist() == [0, 1, 2, 3]
  assert got.cu_q_lens.tolist() == [0, 1, 1, 1, 1]


def test_the_buffer_is_fresh(builder):
  """A device may still be reading the one before."""
  first = builder.build(batch(A, B, C), LAYOUT)
  before = first.copy()
  second = builder.build(batch(B), LAYOUT)
  assert not np.shares_memory(first, second)
  np.testing.assert_array_equal(first, before)


def test_a_result_depends_on_the_batch_alone(builder):
  """Not on those who had the slots before, with more pages and filters."""
  for slot in (5, 0, 2):
    build(
      builder,
      chunk(
        'z',
        slot=slot,
        start=9,
        tokens=(1,),
        pages=(3, 4, 5),
        seed=99,
        prompt_len=7,
        sampling=types.SamplingParams(
          temperature=3, top_k=9, top_p=0.5, min_p=0.5
        ),
      ),
    )
  assert_equal(build(builder, A, B, C), EXPECTED)


def test_a_slot_is_reused_by_a_request_with_an_equal_table(builder):
  pages = (4,)
  old = chunk(
    'old',
    slot=1,
    start=0,
    tokens=(1,),
    pages=pages,
    sampling=types.SamplingParams(temperature=1, top_k=7),
  )
  new = old._replace(request_id='new', sampling=GREEDY)
  assert params(build(builder, old))['top_k'][0] == 7
  got = params(build(builder, new))
  assert (got['top_k'][0], got['temperature'][0]) == (0, 0)


def test_a_page_table_grows(builder):
  grown = B._replace(start=4, page_table=(5, 9))
  build(builder, B)
  got = build(builder, grown)
  np.testing.assert_array_equal(got.page_indices[0], [5, 9, 0])
  assert got.kv_lens[0] == 5


def test_all_rows_pending_and_none_padded(builder):
  layout = batch_lib.BatchLayout(
    num_tokens=2, num_rows=2, num_samples=2, pages_per_seq=3
  )
  got = build(builder, B, A._replace(tokens=()), layout=layout)
  np.testing.assert_array_equal(got.tokens, [0, 0])
  np.testing.assert_array_equal(got.cu_q_lens, [0, 1, 2])
  np.testing.assert_array_equal(got.distribution, [2, 2])
  np.testing.assert_array_equal(got.from_device, [1, 1])


def test_parameters_beyond_32_bits_are_as_good_as_the_largest(builder):
  wild = types.SamplingParams(temperature=1e300, top_k=2**40, top_p=1e-300)
  got = params(build(builder, A._replace(sampling=wild)))
  assert got['top_k'][0] == 2**31 - 1
  assert got['temperature'][0] == np.finfo(np.float32).max
  assert got['top_p'][0] == 0


@given(
  num_tokens=st.integers(1, 40),
  num_rows=st.integers(1, 9),
  num_samples=st.integers(1, 9),
  pages_per_seq=st.integers(1, 9),
  has_adapters=st.booleans(),
)
def test_fields_tile_the_buffer(
  num_tokens, num_rows, num_samples, pages_per_seq, has_adapters
):
  layout = batch_lib.BatchLayout(
    num_tokens,
    num_rows,
    num_samples,
    pages_per_seq,
    has_adapters=has_adapters,
  )
  buffer = np.arange(layout.size, dtype=np.int32)
  fields = layout.split(buffer)
  np.testing.assert_array_equal(
    np.concatenate([np.ravel(f) for f in fields if f is not None]), buffer
  )
  assert fields.tokens.shape == (num_tokens,)
  assert fields.page_indices.shape == (num_rows, pages_per_seq)


def test_ladder_by_hand():
  assert batch_lib.ladder(512, 128) == (8, 16, 32, 64, 128, 256, 384, 512)
  assert batch_lib.ladder(512, 64, fine=True) == (
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    320,
    384,
    448,
    512,
  )
  assert batch_lib.ladder(128, 64, fine=True) == (
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
  )
  assert batch_lib.ladder(4, 4, fine=True) == batch_lib.ladder(4, 4) == (4,)
  assert batch_lib.ladder(512, 32, small=True) == (
    1,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    384,
    512,
  )
  assert batch_lib.ladder(4, 2, small=True) == (1, 2, 4)
  assert batch_lib.ladder(1, 1, small=True) == (1,)
  assert batch_lib.ladder(2048, 100) == (
    8,
    16,
    32,
    64,
    100,
    128,
    256,
    512,
    1024,
    1280,
    1536,
    1792,
    2048,
  )


@given(
  max_tokens=st.integers(1, 20_000),
  max_num_seqs=st.integers(1, 2_000),
  fine=st.booleans(),
  small=st.booleans(),
)
def test_ladder(max_tokens, max_num_seqs, fine, small):
  sizes = batch_lib.ladder(max_tokens, max_num_seqs, fine=fine, small=small)
  assert list(sizes) == sorted(set(sizes))
  assert sizes[0] >= 1 and sizes[-1] == max_tokens
  assert min(max_num_seqs, max_tokens) in sizes
  tile = 32 if fine else 128
  eighth = -(-max_tokens // 8 // tile) * tile or tile
  for below, above in zip((0, *sizes), sizes, strict=False):
    if above > max_tokens / 2 + eighth:
      assert above - below <= eighth  # Near the budget, where batches are.
    assert above <= max(2 * below, 8)  # At most half of a step is padding.
    if fine and above > 16:  # A third.
      assert above <= 1.5 * below
  assert len(sizes) <= 12 + max_tokens.bit_length() * (1 + fine) + 2 * small
  assert not small or sizes[0] == 1


def test_stages_can_read_the_buffers_of_one_another():
  """Each stage has another batch; all are read by one of their layouts."""
  others = [
    dataclasses.replace(LAYOUT, **changed)
    for changed in ({'tells_prompts': False}, {'num_tokens': 16})
  ]
  for name in batch_lib.BatchArrays._fields:
    if name not in ('adapters', 'tokens'):
      (span,) = {
        (found.start, found.stop)
        for layout in (LAYOUT, *others)
        if (found := layout.input.span(name))
      }
      assert span[0] < span[1]


@pytest.mark.parametrize('num_tokens', (4, 8, 16))
def test_a_step_takes_what_was_packed_for_another(builder, num_tokens):
  """A short prompt is told of by a large step, but enters in a small one."""
  prompt = chunk('a', slot=0, start=0, tokens=(5, 6, 7), pages=(2,))
  layouts = [dataclasses.replace(LAYOUT, num_tokens=n) for n in (4, 8, 16)]
  stages = [
    in_flight.AtStage(builder.build(batch(prompt), layout), 3, False, True)
    for layout in layouts
  ]
  step = dataclasses.replace(LAYOUT, num_tokens=num_tokens)
  rows = in_flight.packed(stages, step).reshape(len(stages), step.size)
  expected = builder.build(batch(prompt), step)
  np.testing.assert_array_equal(rows, [expected] * len(stages))

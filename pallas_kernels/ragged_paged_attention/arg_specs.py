# SPDX-License-Identifier: Apache-2.0
"""The cases that tests compare and benchmarks time, as data."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import quantization

_Sizes = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArgSpec:
  """One batch, from which `make` draws the arguments of the operation.

  Attributes:
    name: for tables and test ids.
    contexts: tokens in the cache of every sequence, its new ones included.
    q_lens: new tokens of the sequences from `num_decodes` on; the decodes
      before them have one each.
    num_decodes: how many sequences decode.
    num_heads: H.
    num_kv_heads: K.
    head_dim: h.
    page_size: tokens a page.
    max_tokens: T, the tokens with padding; 0 for no padding.
    max_seqs: S, the sequences with padding; 0 for no padding.
    max_pages: P; 0 for what the longest context needs.
    num_pages: N; 0 for what the contexts need and one to spare.
    dtype: of queries, keys and values.
    kv_dtype: what keys and values are quantized to; None: not.
    sliding_window: see `api.ragged_paged_attention`.
    soft_cap: see `api.ragged_paged_attention`.
  """

  name: str
  contexts: tuple[int, ...]
  q_lens: tuple[int, ...] = ()
  num_decodes: int = 0
  num_heads: int = 8
  num_kv_heads: int = 4
  head_dim: int = 64
  page_size: int = 64
  max_tokens: int = 0
  max_seqs: int = 0
  max_pages: int = 0
  num_pages: int = 0
  dtype: str = 'float32'
  kv_dtype: str | None = None
  sliding_window: int | None = None
  soft_cap: float | None = None

  @property
  def all_q_lens(self) -> tuple[int, ...]:
    """New tokens of every sequence."""
    return (1,) * self.num_decodes + self.q_lens

  @property
  def options(self) -> dict[str, Any]:
    """The keyword arguments of the operation: scale, soft_cap, window."""
    return dict(
      scale=self.head_dim**-0.5,
      soft_cap=self.soft_cap,
      sliding_window=self.sliding_window,
    )


def make(
  spec: ArgSpec,
  seed: int = 0,
  unused: float = 0.0,
) -> dict[str, Any]:
  """Draws the arrays of a spec.

  Pages are dealt in random order from a pool with a page to spare, which the
  padding of `page_indices` points to.

  Args:
    spec: the batch.
    seed: of the random numbers.
    unused: what fills every slot that must not be read.

  Returns:
    The arguments of `api.ragged_paged_attention`, by name, but for options;
    the pages as rows, for `api.pages_from_rows`.
  """
  rng = np.random.default_rng(seed)
  q_lens = np.array(spec.all_q_lens, np.int32)
  contexts = np.array(spec.contexts, np.int32)
  num_seqs = len(contexts)
  if len(q_lens) != num_seqs:
    raise ValueError(f'{spec.name}: {len(q_lens)} q_lens, {num_seqs} contexts')
  seqs = spec.max_seqs or max(num_seqs, 1)
  tokens = spec.max_tokens or max(int(q_lens.sum()), 1)
  counts = -(-contexts // spec.page_size)
  pages = spec.max_pages or max(int(counts.max(initial=0)), 1)
  pool = spec.num_pages or int(counts.sum()) + 1
  if pool <= counts.sum():
    raise ValueError(f'{spec.name}: {counts.sum()} pages of {pool}, none spare')
  deck = rng.permutation(pool)
  page_indices = np.full((seqs, pages), deck[-1], np.int32)
  shape = (pool, spec.num_kv_heads, spec.page_size, spec.head_dim)
  k, v = np.full((2, *shape), unused, np.float32)
  for s, count in enumerate(counts):
    dealt, deck = deck[:count], deck[count:]
    page_indices[s, :count] = dealt
    for i, page in enumerate(dealt):
      rows = min(spec.page_size, int(contexts[s]) - i * spec.page_size)
      size = (spec.num_kv_heads, rows, spec.head_dim)
      k[page, :, :rows], v[page, :, :rows] = rng.standard_normal((2, *size))
  kv_lens = np.zeros(seqs, np.int32)
  kv_lens[:num_seqs] = contexts
  starts = np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32)
  cu_q_lens = np.full(seqs + 1, starts[-1], np.int32)
  cu_q_lens[: num_seqs + 1] = starts
  q = rng.standard_normal((tokens, spec.num_heads, spec.head_dim))
  floats = {'q': q, 'k_pages': k, 'v_pages': v}
  ints = {
    'kv_lens': kv_lens,
    'page_indices': page_indices,
    'cu_q_lens': cu_q_lens,
    'distribution': np.array([spec.num_decodes, num_seqs], np.int32),
  }
  arrays: dict[str, Any] = {
    name: jnp.asarray(x, spec.dtype) for name, x in floats.items()
  }
  if spec.kv_dtype is not None:
    arrays |= {
      name: quantization.quantize(arrays[name], spec.kv_dtype)
      for name in ('k_pages', 'v_pages')
    }
  return arrays | {name: jnp.asarray(x) for name, x in ints.items()}


def _spread(low: int, high: int, count: int) -> tuple[int, ...]:
  """Returns `count` lengths, evenly from low to high, in a shuffled order."""
  lens = np.linspace(low, high, count).round().astype(int)
  return tuple(int(n) for n in np.random.default_rng(0).permutation(lens))


# Real model, or part of one -> its query heads, KV heads, head dim.
HEADS: Mapping[str, tuple[int, int, int]] = {
  'mistral-7b': (32, 8, 128),
  'yi-34b-tp2': (28, 4, 128),
  'llama2-70b-tp4': (16, 2, 128),
  'falcon-180b-tp4': (58, 2, 64),
  'falcon-7b': (71, 1, 64),
  'llama2-7b': (32, 32, 128),
  'llama3.2-1b': (32, 8, 64),
  'phi-2': (32, 32, 80),
  'h96': (32, 8, 96),
  'gemma-7b': (16, 16, 256),
}

_43M: _Sizes = dict(num_heads=8, num_kv_heads=4, head_dim=64, max_seqs=32)
_150M: _Sizes = dict(num_heads=16, num_kv_heads=4, head_dim=64, max_seqs=32)
_DECODES: _Sizes = dict(
  contexts=_spread(100, 384, 32), num_decodes=32, max_pages=16
)
_CHUNKS: _Sizes = dict(
  contexts=(128, 213, 299, 384), q_lens=(128,) * 4, max_pages=16
)
_HYBRID: _Sizes = dict(
  contexts=(*_spread(100, 384, 28), 484),
  q_lens=(484,),
  num_decodes=28,
  max_pages=16,
)

BENCHMARKS: tuple[ArgSpec, ...] = (
  ArgSpec(name='decode_43m', **_DECODES, **_43M),
  ArgSpec(name='decode_150m', **_DECODES, **_150M),
  ArgSpec(name='decode_150m_bf16', dtype='bfloat16', **_DECODES, **_150M),
  ArgSpec(name='decode_one_2k', contexts=(2048,), num_decodes=1, **_150M),
  ArgSpec(name='decode_window', sliding_window=128, **_DECODES, **_150M),
  ArgSpec(name='prefill_43m', max_tokens=512, **_CHUNKS, **_43M),
  ArgSpec(name='prefill_150m', max_tokens=512, **_CHUNKS, **_150M),
  ArgSpec(name='hybrid_43m', max_tokens=512, **_HYBRID, **_43M),
  ArgSpec(name='hybrid_150m', max_tokens=512, **_HYBRID, **_150M),
)

# Small shapes for tests; those that share all sizes share a compilation.
_SMALL: _Sizes = dict(
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  page_size=8,
  max_tokens=64,
  max_seqs=8,
  max_pages=8,
  num_pages=65,
)
_ALONE: _Sizes = _SMALL | dict(max_tokens=1, max_seqs=1, max_pages=40)
_MIXED: _Sizes = dict(
  contexts=(9, 1, 64, 23, 40), q_lens=(23, 17), num_decodes=3, **_SMALL
)


def _phases(page_size: int) -> tuple[ArgSpec, ...]:
  """Returns a spec for each offset in a page that a chunk can start at.

  Two decodes come before the chunk.
  """
  return tuple(
    ArgSpec(
      name=f'phase_{start}',
      contexts=(5, 30, start + 19),
      q_lens=(19,),
      num_decodes=2,
      **_SMALL,
    )
    for start in range(page_size)
  )


TESTS: tuple[ArgSpec, ...] = (
  # Sizes of real models, for the tiles that a GPU computes with.
  *(
    ArgSpec(
      name=f'head_dim_{head_dim}_{dtype}',
      contexts=(70, 129, 200, 66),
      q_lens=(65, 30),
      num_decodes=2,
      num_heads=heads,
      num_kv_heads=2,
      head_dim=head_dim,
      page_size=64,
      max_tokens=128,
      max_seqs=8,
      dtype=dtype,
    )
    for head_dim, heads, dtype in (
      (64, 8, 'bfloat16'),
      (96, 2, 'float16'),
      (128, 8, 'bfloat16'),
      (128, 2, 'float32'),
    )
  ),
  ArgSpec(name='empty', contexts=(), **_SMALL),
  ArgSpec(name='one_token', contexts=(1,), num_decodes=1, **_SMALL),
  *(
    ArgSpec(name=f'alone_{n}', contexts=(n,), num_decodes=1, **_ALONE)
    for n in (1, 33, 128, 135, 293)
  ),  # up to 2 blocks of 16, 2 of 4 pages
  ArgSpec(
    name='alone_window',
    contexts=(293,),
    num_decodes=1,
    sliding_window=150,
    **_ALONE,
  ),
  ArgSpec(name='one_token_prefill', contexts=(1,), q_lens=(1,), **_SMALL),
  ArgSpec(
    name='q_len_around_a_page',
    contexts=(1, 7, 8, 9),
    q_lens=(1, 7, 8, 9),
    **_SMALL,
  ),
  ArgSpec(
    name='late_chunks', contexts=(17, 23, 32, 33), q_lens=(1, 7, 8, 9), **_SMALL
  ),
  ArgSpec(
    name='context_around_a_page',
    contexts=(7, 8, 9, 15, 16, 17),
    num_decodes=6,
    **_SMALL,
  ),
  ArgSpec(
    name='all_decodes_all_pages', contexts=(64,) * 8, num_decodes=8, **_SMALL
  ),
  ArgSpec(name='whole_bucket_prefill', contexts=(64,), q_lens=(64,), **_SMALL),
  *_phases(8),
  ArgSpec(
    name='all_phases',
    contexts=tuple(range(19, 35)),
    q_lens=(19,) * 16,
    **(_SMALL | dict(page_size=16, max_tokens=320, max_seqs=16, max_pages=4)),
  ),
  *(
    ArgSpec(
      name=f'{n}_decodes',
      contexts=(20, 1, 64, 8, 33, 2, 17, 9),
      q_lens=(1,) * (8 - n),
      num_decodes=n,
      **_SMALL,
    )
    for n in range(0, 9, 2)
  ),
  ArgSpec(name='mixed', **_MIXED),
  ArgSpec(name='window_1', sliding_window=1, **_MIXED),
  ArgSpec(name='window_9', sliding_window=9, **_MIXED),
  ArgSpec(name='window_16', sliding_window=16, **_MIXED),
  ArgSpec(name='soft_cap', soft_cap=2.0, **_MIXED),
  ArgSpec(name='window_soft_cap', sliding_window=9, soft_cap=2.0, **_MIXED),
  ArgSpec(name='bfloat16', dtype='bfloat16', **_MIXED),
  ArgSpec(name='float16', dtype='float16', **_MIXED),
  *(
    ArgSpec(
      name=f'{kv_dtype}_{dtype}', dtype=dtype, kv_dtype=kv_dtype, **_MIXED
    )
    for kv_dtype in ('int8', 'float8_e4m3fn')
    for dtype in ('float32', 'bfloat16', 'float16')
  ),
  ArgSpec(
    name='int8_window_soft_cap',
    kv_dtype='int8',
    sliding_window=9,
    soft_cap=2.0,
    **_MIXED,
  ),
  ArgSpec(
    name='fp8_window_80',
    kv_dtype='float8_e4m3fn',
    sliding_window=9,
    **(_MIXED | dict(head_dim=80)),
  ),
  ArgSpec(name='multi_query', **(_MIXED | dict(num_kv_heads=1))),
  ArgSpec(name='head_dim_24', **(_MIXED | dict(head_dim=24))),
  ArgSpec(name='head_dim_80', **(_MIXED | dict(head_dim=80))),
  ArgSpec(
    name='head_dim_256',
    dtype='bfloat16',
    **(_MIXED | dict(head_dim=256, page_size=64)),
  ),
  ArgSpec(name='groups_of_7', **(_MIXED | dict(num_heads=14))),
  ArgSpec(
    name='multi_query_71', **(_MIXED | dict(num_heads=71, num_kv_heads=1))
  ),
  ArgSpec(
    name='long_decodes',
    contexts=(700, 33, 1, 256, 511),
    num_decodes=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_seqs=8,
  ),
  ArgSpec(
    name='long_decodes_window',
    contexts=(700, 33, 1, 256, 511),
    num_decodes=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_seqs=8,
    sliding_window=200,
  ),
  ArgSpec(
    name='long_hybrid',
    contexts=(700, 512, 300, 90),
    q_lens=(3, 70),
    num_decodes=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_seqs=8,
    max_tokens=128,
  ),
  ArgSpec(
    name='long_hybrid_int8',
    contexts=(700, 512, 300, 90),
    q_lens=(3, 70),
    num_decodes=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_seqs=8,
    max_tokens=128,
    kv_dtype='int8',
  ),
  ArgSpec(
    name='pages_of_256',
    contexts=(300, 513),
    q_lens=(30,),
    num_decodes=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    page_size=256,
    max_tokens=32,
    max_seqs=8,
    dtype='bfloat16',
  ),
  ArgSpec(
    name='around_a_page_of_16',
    contexts=(1, 15, 16, 17),
    q_lens=(1, 15, 16, 17),
    **(_SMALL | dict(page_size=16)),
  ),
  ArgSpec(
    name='late_around_a_page_of_16',
    contexts=(33, 47, 48, 50),
    q_lens=(1, 15, 16, 17),
    **(_SMALL | dict(page_size=16)),
  ),
  ArgSpec(
    name='nothing_new',
    contexts=(9, 20, 0, 33),
    q_lens=(0, 0, 7),
    num_decodes=1,
    **_SMALL,
  ),
  ArgSpec(
    name='128_sequences',
    contexts=(*_spread(1, 64, 120), 40, 9, 1, 30, 2, 64, 17, 16),
    q_lens=(33, 9, 1, 5, 2, 64, 1, 16),
    num_decodes=120,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_tokens=256,
    max_seqs=128,
  ),
  ArgSpec(name='page_5', **(_MIXED | dict(page_size=5, max_pages=13))),
  ArgSpec(
    name='page_1',
    contexts=(3, 6),
    q_lens=(2,),
    num_decodes=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    page_size=1,
  ),
  ArgSpec(
    name='tokens_below_seqs',
    contexts=(9, 17),
    num_decodes=2,
    **(_SMALL | dict(max_tokens=2)),
  ),
  ArgSpec(
    name='many',
    contexts=(*_spread(1, 64, 60), 40, 9, 1, 30),
    q_lens=(33, 9, 1, 5),
    num_decodes=60,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_tokens=128,
    max_seqs=64,
  ),
  ArgSpec(
    name='many_tiles',
    contexts=(100, 330, 150),
    q_lens=(290, 150),
    num_decodes=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_tokens=512,
  ),
)

# Steps of Mistral-7B, for tests on GPUs: an interpreter takes minutes.
_7B: _Sizes = dict(
  zip(
    ('num_heads', 'num_kv_heads', 'head_dim'), HEADS['mistral-7b'], strict=True
  ),
  max_seqs=64,
  max_pages=64,
  dtype='bfloat16',
)
PRODUCTION: tuple[ArgSpec, ...] = (
  ArgSpec(
    name='hybrid_7b',
    contexts=(*_spread(60, 4096, 40), 2100),
    q_lens=(472,),
    num_decodes=40,
    max_tokens=512,
    **_7B,
  ),
  ArgSpec(
    name='decode_7b', contexts=_spread(60, 4096, 64), num_decodes=64, **_7B
  ),
  ArgSpec(name='prefill_7b', contexts=(2048,), q_lens=(2048,), **_7B),
  ArgSpec(
    name='window_7b',
    contexts=(*_spread(60, 4096, 40), 2100),
    q_lens=(472,),
    num_decodes=40,
    max_tokens=512,
    sliding_window=1000,
    **_7B,
  ),
  *(
    ArgSpec(
      name=f'hybrid_7b_{kv_dtype}',
      contexts=(*_spread(60, 4096, 40), 2100),
      q_lens=(472,),
      num_decodes=40,
      max_tokens=512,
      kv_dtype=kv_dtype,
      **_7B,
    )
    for kv_dtype in ('int8', 'float8_e4m3fn')
  ),
)

BY_NAME: Mapping[str, ArgSpec] = {
  spec.name: spec for spec in BENCHMARKS + TESTS + PRODUCTION
}

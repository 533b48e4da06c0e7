# SPDX-License-Identifier: Apache-2.0
"""Small batches for tests; those that share all sizes share a compilation."""

from __future__ import annotations

from typing import Any

from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention.arg_spec import ArgSpec

_SMALL: dict[str, Any] = dict(
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  page_size=8,
  max_tokens=64,
  max_seqs=8,
  max_pages=8,
  num_pages=65,
)

_ALONE: dict[str, Any] = _SMALL | dict(max_tokens=1, max_seqs=1, max_pages=40)

_MIXED: dict[str, Any] = dict(
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
  ArgSpec(name='sinks', sinks=True, **_MIXED),
  ArgSpec(name='window_sinks', sliding_window=9, sinks=True, **_MIXED),
  ArgSpec(name='soft_cap_sinks', soft_cap=2.0, sinks=True, **_MIXED),
  ArgSpec(name='int8_sinks', kv_dtype='int8', sinks=True, **_MIXED),
  ArgSpec(
    name='groups_of_7_sinks', sinks=True, **(_MIXED | dict(num_heads=14))
  ),
  ArgSpec(
    name='alone_sinks', contexts=(293,), num_decodes=1, sinks=True, **_ALONE
  ),
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
  ArgSpec(  # Sinks count once, where decodes are split, too.
    name='long_sinks',
    contexts=(700, 512, 300, 90),
    q_lens=(3, 70),
    num_decodes=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    max_seqs=8,
    max_tokens=128,
    sinks=True,
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
    contexts=(*arg_spec.spread(1, 64, 120), 40, 9, 1, 30, 2, 64, 17, 16),
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
    contexts=(*arg_spec.spread(1, 64, 60), 40, 9, 1, 30),
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
  ArgSpec(
    name='rests_of_tiles',  # CPUs take 64 rows, or 16
    contexts=(90, 4, 90, 100, 150, 65, 80, 200),
    q_lens=(4, 16, 17, 64, 65, 80, 81),
    num_decodes=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    sliding_window=50,
    max_tokens=512,
  ),
)

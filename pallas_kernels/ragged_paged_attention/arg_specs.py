# SPDX-License-Identifier: Apache-2.0
"""The cases that tests compare and benchmarks time, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import small_specs
from pallas_kernels.ragged_paged_attention.arg_spec import ArgSpec

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
  'gemma-2-9b': (16, 8, 256),
  'gpt-oss-20b': (64, 8, 64),
}

_43M: dict[str, Any] = dict(
  num_heads=8, num_kv_heads=4, head_dim=64, max_seqs=32
)
_150M: dict[str, Any] = dict(
  num_heads=16, num_kv_heads=4, head_dim=64, max_seqs=32
)
_DECODES: dict[str, Any] = dict(
  contexts=arg_spec.spread(100, 384, 32), num_decodes=32, max_pages=16
)
_CHUNKS: dict[str, Any] = dict(
  contexts=(128, 213, 299, 384), q_lens=(128,) * 4, max_pages=16
)
_HYBRID: dict[str, Any] = dict(
  contexts=(*arg_spec.spread(100, 384, 28), 484),
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


# Steps of Mistral-7B, for tests on GPUs: an interpreter takes minutes.
_7B: dict[str, Any] = dict(
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
    contexts=(*arg_spec.spread(60, 4096, 40), 2100),
    q_lens=(472,),
    num_decodes=40,
    max_tokens=512,
    **_7B,
  ),
  ArgSpec(
    name='decode_7b',
    contexts=arg_spec.spread(60, 4096, 64),
    num_decodes=64,
    **_7B,
  ),
  ArgSpec(name='prefill_7b', contexts=(2048,), q_lens=(2048,), **_7B),
  ArgSpec(
    name='window_7b',
    contexts=(*arg_spec.spread(60, 4096, 40), 2100),
    q_lens=(472,),
    num_decodes=40,
    max_tokens=512,
    sliding_window=1000,
    **_7B,
  ),
  *(
    ArgSpec(
      name=f'hybrid_7b_{kv_dtype}',
      contexts=(*arg_spec.spread(60, 4096, 40), 2100),
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
  spec.name: spec for spec in BENCHMARKS + small_specs.TESTS + PRODUCTION
}

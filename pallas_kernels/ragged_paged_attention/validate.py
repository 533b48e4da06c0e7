# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments of a call: while tracing and, in tests, by value."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization

Pages = quantization.Pages
DTYPES = tuple(jnp.dtype(d) for d in ('float32', 'bfloat16', 'float16'))
_NAMES = ', '.join(d.name for d in DTYPES)
_RANKS = {
  'q': (3,),
  'k_pages': (4, 5),
  'v_pages': (4, 5),
  'kv_lens': (1,),
  'page_indices': (2,),
  'cu_q_lens': (1,),
  'distribution': (1,),
}


def validate_written(
  k_pages: Pages,
  v_pages: Pages,
  k: jax.Array,
  v: jax.Array,
  slot_mapping: jax.Array,
) -> None:
  """Checks the arguments of `api.write_kv`.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  _check_cache(k_pages, v_pages)
  _, num_kv_heads, _, head_dim = layout.sizes(k_pages)
  check(
    slot_mapping.ndim == 1 and slot_mapping.dtype == jnp.int32,
    'slot_mapping',
    f'{slot_mapping.dtype}{slot_mapping.shape}',
    'must be int32, with one axis',
  )
  wanted = slot_mapping.shape[0], num_kv_heads, head_dim
  for name, x in (('k', k), ('v', v)):
    check(x.shape == wanted, name, x.shape, f'must be {wanted}')
    check(
      jnp.issubdtype(x.dtype, jnp.floating), name, x.dtype, 'must be a float'
    )


def static_validate(
  q: jax.Array,
  k_pages: Pages,
  v_pages: Pages,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  sinks: jax.Array | None = None,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
) -> None:
  """Checks what is known while tracing: ranks, shapes, dtypes, options.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  validate_batch(q, k_pages, kv_lens, cu_q_lens, distribution)
  _check_table(page_indices, kv_lens)
  _check_cache(k_pages, v_pages)
  if sinks is not None:
    check(
      sinks.shape == q.shape[1:2] and jnp.issubdtype(sinks.dtype, jnp.floating),
      'sinks',
      f'{sinks.dtype}{sinks.shape}',
      f'must be floats, {q.shape[1:2]}, one a head of q',
    )
  validate_options(sliding_window, soft_cap)


def validate_options(
  sliding_window: int | None, soft_cap: float | None
) -> None:
  """Checks the arguments that are not arrays.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  check(
    sliding_window is None or sliding_window >= 1,
    'sliding_window',
    sliding_window,
    'must be None or at least 1',
  )
  check(
    soft_cap is None or 0 < soft_cap < math.inf,
    'soft_cap',
    soft_cap,
    'must be None or above 0, and finite',
  )


def validate_batch(
  q: jax.Array | jax.ShapeDtypeStruct,
  k_pages: Pages,
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
) -> None:
  """Checks queries and lengths, as far as `api.make_plan` knows them.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  kept = quantization.values_of(k_pages)
  _check_ranks(
    q=q,
    k_pages=kept,
    kv_lens=kv_lens,
    cu_q_lens=cu_q_lens,
    distribution=distribution,
  )
  _check_int32(kv_lens=kv_lens, cu_q_lens=cu_q_lens, distribution=distribution)
  check(q.dtype in DTYPES, 'q', q.dtype, f'must be one of {_NAMES}')
  check(
    isinstance(k_pages, quantization.Quantized) or kept.dtype == q.dtype,
    'k_pages',
    kept.dtype,
    f'must be the dtype of q, {q.dtype}, or quantized',
  )
  _, num_kv_heads, _, kv_head_dim = layout.sizes(k_pages)
  num_heads, head_dim = q.shape[1:]
  check(
    kv_head_dim == head_dim,
    'k_pages',
    kept.shape,
    f'its head dim must be that of q, {head_dim}',
  )
  check(min(kept.shape) > 0, 'k_pages', kept.shape, 'must have no empty axis')
  check(
    num_heads > 0 and num_heads % num_kv_heads == 0,
    'q',
    q.shape,
    f'heads must be a multiple of the {num_kv_heads} of k_pages',
  )
  num_seqs = kv_lens.shape[0]
  check(
    cu_q_lens.shape[0] == num_seqs + 1,
    'cu_q_lens',
    cu_q_lens.shape,
    f'must have one entry more than kv_lens, {num_seqs + 1}',
  )
  check(
    distribution.shape == (2,),
    'distribution',
    distribution.shape,
    'must be (2,)',
  )


def dynamic_validate(
  q: jax.Array,
  k_pages: Pages,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
) -> None:
  """Checks values, which jitted code can't: for tests and debugging.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  validate_batch(q, k_pages, kv_lens, cu_q_lens, distribution)
  _check_table(page_indices, kv_lens)
  num_decodes, num_seqs = (int(n) for n in np.asarray(distribution))
  lens, starts = np.asarray(kv_lens), np.asarray(cu_q_lens)
  q_lens = np.diff(starts)
  num_pages, _, page_size, _ = layout.sizes(k_pages)
  most = page_indices.shape[1] * page_size
  check(
    0 <= num_decodes <= num_seqs <= len(lens),
    'distribution',
    (num_decodes, num_seqs),
    f'must ascend within [0, {len(lens)}], the rows of kv_lens',
  )
  check(
    starts[0] == 0 and (q_lens >= 0).all(),
    'cu_q_lens',
    starts,
    'must start at 0 and not descend',
  )
  check(
    starts[-1] <= q.shape[0],
    'cu_q_lens',
    starts,
    f'must end within the {q.shape[0]} tokens of q',
  )
  check(
    (q_lens[:num_decodes] == 1).all(),
    'cu_q_lens',
    starts,
    f'the first {num_decodes} sequences are decodes, of one token each',
  )
  check(
    (q_lens[num_seqs:] == 0).all(),
    'cu_q_lens',
    starts,
    f'must not grow after the {num_seqs} sequences',
  )
  check(
    (lens[num_seqs:] == 0).all(),
    'kv_lens',
    lens,
    f'must be 0 after the {num_seqs} sequences',
  )
  check(
    (lens >= q_lens).all(),
    'kv_lens',
    lens,
    f'must count the new tokens too, {q_lens}',
  )
  check(
    (lens <= most).all(),
    'kv_lens',
    lens,
    f'must fit the page_indices, {most} tokens',
  )
  for s in range(num_seqs):
    used = np.asarray(page_indices)[s, : -(-int(lens[s]) // page_size)]
    check(
      ((used >= 0) & (used < num_pages)).all(),
      f'page_indices[{s}]',
      used,
      f'must be in [0, {num_pages})',
    )


def check(ok: object, name: str, value: object, rule: str) -> None:
  """Raises ValueError unless `ok`."""
  if not ok:
    raise ValueError(f'{name}={value}: {rule}.')


def _check_ranks(**arrays: jax.Array | jax.ShapeDtypeStruct) -> None:
  for name, x in arrays.items():
    ranks = _RANKS[name]
    check(
      x.ndim in ranks,
      name,
      x.shape,
      f'must have {" or ".join(map(str, ranks))} axes',
    )


def _check_int32(**arrays: jax.Array) -> None:
  for name, x in arrays.items():
    check(x.dtype == jnp.int32, name, x.dtype, 'must be int32')


def _check_table(page_indices: jax.Array, kv_lens: jax.Array) -> None:
  _check_ranks(page_indices=page_indices)
  _check_int32(page_indices=page_indices)
  check(
    page_indices.shape[0] == kv_lens.shape[0],
    'page_indices',
    page_indices.shape,
    f'must have {kv_lens.shape[0]} rows, as kv_lens',
  )


def _check_cache(k_pages: Pages, v_pages: Pages) -> None:
  """Checks that both are as `api.init_pages` makes them."""
  both = {'k_pages': k_pages, 'v_pages': v_pages}
  for name, pages in both.items():
    _check_ranks(**{name: quantization.values_of(pages)})
    _check_dtypes(name, pages)
  check(
    [x.dtype for x in jax.tree.leaves(v_pages)]
    == [x.dtype for x in jax.tree.leaves(k_pages)],
    'v_pages',
    quantization.values_of(v_pages).dtype,
    'must be of the dtype of k_pages',
  )
  num_pages, num_kv_heads, page_size, head_dim = layout.sizes(k_pages)
  like: Any = jax.eval_shape(
    lambda: layout.init(
      layout.of(k_pages),
      num_pages,
      page_size,
      num_kv_heads,
      head_dim,
      jnp.float32,
    )
  )
  for (name, pages), wanted in zip(both.items(), like, strict=True):
    shape = quantization.values_of(pages).shape
    check(
      shape == wanted.shape,
      name,
      shape,
      f'must be {wanted.shape}, as from init_pages',
    )
    if isinstance(pages, quantization.Quantized):
      expected = num_pages, num_kv_heads, page_size
      check(
        pages.scales.shape == expected,
        f'{name}.scales',
        pages.scales.shape,
        f'must be {expected}, as from init_pages',
      )


def _check_dtypes(name: str, pages: Pages) -> None:
  if not isinstance(pages, quantization.Quantized):
    check(
      pages.dtype in DTYPES,
      name,
      pages.dtype,
      f'must be one of {_NAMES}, or quantized',
    )
    return
  check(
    pages.values.dtype in quantization.KEPT_DTYPES,
    f'{name}.values',
    pages.values.dtype,
    'must be int8, or uint8 for the bits of float8_e4m3fn',
  )
  check(
    pages.scales.dtype == quantization.SCALE_DTYPE,
    f'{name}.scales',
    pages.scales.dtype,
    f'must be {quantization.SCALE_DTYPE}',
  )

# SPDX-License-Identifier: Apache-2.0
"""The functions to call: attention over paged keys and values, their cache.

Shape letters: T tokens of the batch, S sequences, P pages a sequence, N pages
in the pool, H query heads, K key-value heads, h head dim. T, S, P and N are
static; how many tokens, sequences and pages are real is in the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import llvm
from pallas_kernels.ragged_paged_attention import pallas_triton
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import validate
from pallas_kernels.ragged_paged_attention import xla

_log = logging.getLogger(__name__)
Pages = quantization.Pages


def _pallas_mosaic() -> Any:
  """Imports the module, which few need and takes a third of a second."""
  from pallas_kernels.ragged_paged_attention import pallas_mosaic

  return pallas_mosaic


def _attend_by_mosaic(
  q: jax.Array, k_pages: Pages, *args: Any, **kwargs: Any
) -> Any:
  # Checked before the module is loaded, which needs a recent JAX.
  tuning.choose_mosaic(tuning.Shape.of(q, k_pages))
  return _pallas_mosaic().ragged_paged_attention(q, k_pages, *args, **kwargs)


IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
  'reference': reference.ragged_paged_attention,
  'xla': xla.ragged_paged_attention,
  'llvm': llvm.ragged_paged_attention,
  'pallas_triton': pallas_triton.ragged_paged_attention,
  'pallas_mosaic': _attend_by_mosaic,
}
_LAYOUTS = {
  'reference': layout.TILES,
  'xla': layout.TILES,
  'llvm': layout.LINES,
  'pallas_triton': layout.ROWS,
  'pallas_mosaic': layout.ROWS,
}


def ragged_paged_attention(
  q: jax.Array,
  k_pages: Pages,
  v_pages: Pages,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  scale: float,
  sinks: jax.Array | None = None,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  plan: tuple[jax.Array, ...] | None = None,
  batch_invariant: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Computes causal attention of a hybrid batch over its paged cache.

  Sequences [0, num_decodes) are decodes with exactly one query each, so that
  token i belongs to sequence i. Sequences [num_decodes, num_seqs) are chunks
  of prefills, of any length. The rest is padding. Query j of sequence s is at
  position kv_lens[s] - q_len + j and attends to the positions up to its own.

  Worked example: two decodes, then a chunk of 3 tokens that ends a prompt of
  5; page_size=4. kv_lens = [6, 3, 5, 0], cu_q_lens = [0, 1, 2, 5, 5],
  distribution = [2, 3], page_indices = [[7, 2], [4, 0], [1, 3], [0, 0]];
  tokens 2 to 4 are at positions 2 to 4 of pages 1 and 3.

  Args:
    q: [T, H, h], float32, bfloat16 or float16.
    k_pages: from `init_pages` for this implementation, of the dtype of q, or
      quantized. Holds the keys of this batch's own tokens already
      (`write_kv`).
    v_pages: like k_pages.
    kv_lens: int32 [S], tokens in the cache, the new ones included; 0 for
      padding.
    page_indices: int32 [S, P], the pages of a sequence in order; only those
      that hold its tokens are read.
    cu_q_lens: int32 [S + 1], where in [0, T] a sequence's tokens start; the
      end is repeated for padding.
    distribution: int32 [2], (num_decodes, num_seqs).
    scale: multiplies q . k; above 0.
    sinks: [H] float, for each query head a score of no key, which weighs among
      the others: it takes their part of the attention (gpt-oss); neither scaled
      nor capped. None: there are none.
    sliding_window: a query at p attends to (p - sliding_window, p]; None:
      to [0, p].
    soft_cap: scores become soft_cap * tanh(score / soft_cap).
    plan: of `make_plan` for these arguments, to share it among layers; None:
      it is made here.
    batch_invariant: whether each query's output has the same bits in every
      batch of these shapes, as a decode or in any chunk. That takes longer:
      decodes are computed as chunks are.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here of
      those that read such pages.

  Returns:
    [T, H, h] of q's dtype. Rows of padding are finite and mean nothing.

  Raises:
    ValueError: shapes, dtypes or options don't fit; says which and why.
    NotImplementedError: they do, but this implementation can't do it.
  """
  has_sinks = sinks is not None
  name = _chosen(k_pages, implementation, batch_invariant, has_sinks)
  validate.static_validate(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    sinks=sinks,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
  )
  validate.check(
    name == 'reference' or layout.of(k_pages) == _LAYOUTS[name],
    'k_pages',
    quantization.values_of(k_pages).shape,
    f'must be as from init_pages for {name!r}',
  )
  validate.check(
    0 < scale < math.inf, 'scale', scale, 'must be above 0, and finite'
  )
  validate.check(
    plan is None or name in _SHAPES,
    'plan',
    type(plan).__name__,
    f'must be None for {name!r}, which needs none',
  )
  more: dict[str, Any] = {} if plan is None else {'plan': plan}
  if has_sinks:
    more['sinks'] = sinks
  return IMPLEMENTATIONS[name](
    q,
    k_pages,
    v_pages,
    batch_lib.Batch(kv_lens, page_indices, cu_q_lens, distribution),
    batch_lib.Options(scale, sliding_window, soft_cap, batch_invariant),
    **more,
  )


def make_plan(
  q: jax.Array | jax.ShapeDtypeStruct,
  k_pages: Pages,
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  sliding_window: int | None = None,
  decodes_only: bool = False,
  batch_invariant: bool = False,
  has_sinks: bool = False,
  implementation: str | None = None,
) -> tuple[Any, ...] | None:
  """Plans how a batch is cut into work; arguments as of the attention.

  Reads only the shapes and dtypes of q and k_pages: layers that have these and
  the window in common can share a plan. If `decodes_only`, there will be no
  chunks of prefills, and no launch for them. `has_sinks` says whether there
  will be sinks, which not all implementations have.

  Returns:
    Arrays, a NamedTuple of the implementation; None if it needs no plan.

  Raises:
    ValueError: shapes, dtypes or the window don't fit; says which and why.
    NotImplementedError: the implementation doesn't support such shapes.
  """
  name = _chosen(k_pages, implementation, batch_invariant, has_sinks)
  validate.validate_batch(q, k_pages, kv_lens, cu_q_lens, distribution)
  validate.validate_options(sliding_window, None)
  if name not in _SHAPES:
    return None
  shape = tuning.Shape.of(q, k_pages)
  batch: Any = dict(
    kv_lens=kv_lens,
    cu_q_lens=cu_q_lens,
    distribution=distribution,
    num_tokens=q.shape[0],
    sliding_window=sliding_window,
    shape=shape,
    decodes_only=decodes_only,
  )
  if name == 'pallas_triton':
    return pallas_triton.make_plan(
      **batch, sizes=tuning.choose(shape), batch_invariant=batch_invariant
    )
  tuning.choose_mosaic(shape)
  plan: tuple[Any, ...] = _pallas_mosaic().make_plan(**batch)
  return plan


def init_pages(
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
) -> tuple[Pages, Pages]:
  """Returns zeroed pages for the keys and values of one layer.

  Args:
    num_pages: N.
    page_size: tokens a page.
    num_kv_heads: K.
    head_dim: h.
    dtype: float32, bfloat16, float16; int8 or float8_e4m3fn to quantize what
      is written, with a scale for each token and head (see `quantization`).
    implementation: what will read them; None: the fastest that can.

  Returns:
    (k_pages, v_pages) in the implementation's layout (see `layout`), arrays
    or trees of arrays: in each N comes first and K second; the rest is the
    layout's own business.

  Raises:
    ValueError: there is no such dtype, or a size is below 1.
    NotImplementedError: the implementation doesn't support such pages.
  """
  for name, size in (
    ('num_pages', num_pages),
    ('page_size', page_size),
    ('num_kv_heads', num_kv_heads),
    ('head_dim', head_dim),
  ):
    validate.check(size > 0, name, size, 'must be at least 1')
  known = (*validate.DTYPES, *quantization.DTYPES)
  validate.check(
    jnp.dtype(dtype) in known,
    'dtype',
    jnp.dtype(dtype),
    f'must be one of {", ".join(d.name for d in known)}',
  )
  most = most_pages(page_size, num_kv_heads, head_dim, dtype)
  if most is not None and num_pages > most:
    raise NotImplementedError(
      f'num_pages={num_pages}: must be at most {most}, or the kernel could '
      f"not count the bytes of one layer's keys in int32."
    )
  if implementation is None:
    implementation = _default(page_size, num_kv_heads, head_dim, dtype)
  elif implementation == 'llvm':
    llvm.check(page_size, head_dim, dtype)
  elif implementation in _SHAPES:
    _check_shape(implementation, page_size, num_kv_heads, head_dim, dtype)
  return layout.init(
    _LAYOUTS[_known(implementation)],
    num_pages,
    page_size,
    num_kv_heads,
    head_dim,
    dtype,
  )


def most_pages(
  page_size: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> int | None:
  """Returns the most pages that `init_pages` makes; None for no limit.

  Triton's offsets are int32, and int64 where an array has more than 2**32
  bytes: one between 2**31 and 2**32 numbers of a byte each would overflow.
  """
  if jnp.dtype(dtype).itemsize > 1:
    return None
  return (tuning.INDICES - 1) // (page_size * num_kv_heads * head_dim)


def query_dtype(
  k_pages: Pages,
  dtype: jax.typing.DTypeLike,
) -> jnp.dtype:
  """Returns the dtype that queries of `dtype` must have for these pages."""
  if isinstance(k_pages, quantization.Quantized):
    return jnp.dtype(dtype)
  return k_pages.dtype


def pages_from_rows(
  k_rows: Pages,
  v_rows: Pages,
  implementation: str | None = None,
) -> tuple[Pages, Pages]:
  """Lays out pages given as rows, [N, K, page_size, h].

  Args:
    k_rows: keys.
    v_rows: values.
    implementation: what will read them; see `init_pages`.
  """
  if implementation is None:
    _, num_kv_heads, page_size, head_dim = layout.sizes(k_rows)
    implementation = _default(
      page_size, num_kv_heads, head_dim, quantization.values_of(k_rows).dtype
    )
  return layout.from_rows(_LAYOUTS[_known(implementation)], k_rows, v_rows)


def write_kv(
  k_pages: Pages,
  v_pages: Pages,
  k: jax.Array,
  v: jax.Array,
  slot_mapping: jax.Array,
) -> tuple[Pages, Pages]:
  """Writes new keys and values to their pages; in place where donated.

  By XLA's scatter: `rotate_and_write` has a kernel that does more at once.

  Args:
    k_pages: as `init_pages` made them, for any implementation.
    v_pages: like k_pages.
    k: [T, K, h], the new keys, any float; rounded as the pages are.
    v: like k.
    slot_mapping: int32 [T], page * page_size + offset of every token, all
      different; those outside [0, N * page_size) are dropped (padding).

  Returns:
    The pages, updated.

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
  """
  validate.validate_written(k_pages, v_pages, k, v, slot_mapping)
  return layout.write(k_pages, v_pages, k, v, slot_mapping)


def _chosen(
  k_pages: Pages,
  implementation: str | None,
  batch_invariant: bool,
  has_sinks: bool,
) -> str:
  """Returns the name of what attends, by the arguments of the attention."""
  if implementation is None:
    return _for_pages(k_pages, batch_invariant or has_sinks)
  if has_sinks and implementation == 'pallas_mosaic':
    raise NotImplementedError(
      f'{implementation=}: its kernel for chunks has no sinks; pallas_triton '
      'does.'
    )
  if batch_invariant and implementation == 'pallas_mosaic':
    raise NotImplementedError(
      f'{implementation=}: decodes and chunks have kernels of their own, so it '
      "can't be batch_invariant."
    )
  return _known(implementation)


def _known(implementation: str) -> str:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'{implementation=}: must be None or one of '
      f'{", ".join(sorted(IMPLEMENTATIONS))}.'
    )
  return implementation


def _for_pages(k_pages: Pages, triton_only: bool) -> str:
  """Returns the name of the implementation for pages of this layout."""
  if not layout.is_rows(k_pages):
    return 'llvm' if layout.of(k_pages) == layout.LINES else 'xla'
  if triton_only:
    return 'pallas_triton'
  _, num_kv_heads, page_size, head_dim = layout.sizes(k_pages)
  name, reason = _fastest(
    page_size, num_kv_heads, head_dim, quantization.values_of(k_pages).dtype
  )
  if name and reason:
    _say_once(f'Attention falls back to {name}: {reason}')
  return name or 'pallas_triton'  # It will say why it can't.


def _default(
  page_size: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> str:
  """Returns what `implementation=None` means on the default device."""
  device = devices.default()
  if device.platform not in ('gpu', 'cuda'):
    return _of_cpu(page_size, head_dim, dtype)
  name, reason = _fastest(page_size, num_kv_heads, head_dim, dtype)
  if reason:
    _say_once(f'Attention falls back to {name or "plain XLA"}: {reason}')
  return name or 'xla'


def _of_cpu(page_size: int, head_dim: int, dtype: jax.typing.DTypeLike) -> str:
  try:
    llvm.check(page_size, head_dim, dtype)
  except NotImplementedError:
    return 'xla'
  return 'llvm'


def _fastest(
  page_size: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> tuple[str | None, str]:
  """Returns the fastest implementation that supports such pages.

  Returns:
    Its name, or None, on the default device; and why faster ones can't.
  """
  reasons = []
  for name in tuning.fastest():
    try:
      _check_shape(name, page_size, num_kv_heads, head_dim, dtype)
    except NotImplementedError as reason:
      reasons.append(str(reason))
    else:
      return name, ' '.join(reasons)
  return None, ' '.join(reasons)


@functools.cache  # Each layer asks.
def _say_once(text: str) -> None:
  _log.warning(text)


_SHAPES: Mapping[str, Callable[[tuning.Shape], Any]] = {
  'pallas_triton': tuning.choose,
  'pallas_mosaic': tuning.choose_mosaic,
}


def _check_shape(
  name: str,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
) -> None:
  """Raises NotImplementedError if the kernel doesn't support such pages."""
  kept = quantization.kept_dtype(dtype)
  # Quantized pages are meant for queries of 16 bits; 32 would do, too.
  queries = kept.name if kept.itemsize > 1 else 'bfloat16'
  _SHAPES[name](
    tuning.Shape(queries, kept.name, num_kv_heads, 1, head_dim, page_size)
  )

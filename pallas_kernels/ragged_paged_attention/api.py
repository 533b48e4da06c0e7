# SPDX-License-Identifier: Apache-2.0
"""What to call: attention over paged keys and values, and their cache.

Shape letters: T tokens of the batch, S sequences, P pages a sequence, N pages
in the pool, H query heads, K key-value heads, h head dim. T, S, P and N are
static; how many tokens, sequences and pages are real is in the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import pallas_triton
from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import xla

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
  'reference': reference.ragged_paged_attention,
  'xla': xla.ragged_paged_attention,
  'pallas_triton': pallas_triton.ragged_paged_attention,
}
_LAYOUTS = {'reference': layout.TILES, 'xla': layout.TILES,
            'pallas_triton': layout.ROWS}

_log = logging.getLogger(__name__)
_DTYPES = tuple(jnp.dtype(d) for d in ('float32', 'bfloat16', 'float16'))
_RANKS = {'q': (3,), 'k_pages': (4, 5), 'v_pages': (4, 5), 'kv_lens': (1,),
          'page_indices': (2,), 'cu_q_lens': (1,), 'distribution': (1,)}


def ragged_paged_attention(
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  plan: tuple[jax.Array, ...] | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Causal attention of a hybrid batch to the paged cache of its sequences.

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
    k_pages: from `init_pages` for this implementation, the dtype of q. Holds
      the keys of this batch's own tokens already (`write_kv`).
    v_pages: like k_pages.
    kv_lens: int32 [S], tokens in the cache, the new ones included; 0 for
      padding.
    page_indices: int32 [S, P], the pages of a sequence in order; only those
      that hold its tokens are read.
    cu_q_lens: int32 [S + 1], where in [0, T] a sequence's tokens start; the
      end is repeated for padding.
    distribution: int32 [2], (num_decodes, num_seqs).
    scale: multiplies q . k.
    sliding_window: a query at p attends to (p - sliding_window, p]; None:
      to [0, p].
    soft_cap: scores become soft_cap * tanh(score / soft_cap).
    plan: of `make_plan` for these arguments, to share it among layers; None:
      it is made here.
    implementation: a key of `IMPLEMENTATIONS`; None: the one that the pages
      were made for.

  Returns:
    [T, H, h] of q's dtype. Rows of padding are finite and mean nothing.

  Raises:
    ValueError: shapes, dtypes or options don't fit; says which and why.
    NotImplementedError: they do, but this implementation can't do it.
  """
  name = _for_pages(k_pages) if implementation is None else (
    _known(implementation))
  static_validate(q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens,
                  distribution, sliding_window=sliding_window,
                  soft_cap=soft_cap)
  _check(name == 'reference' or name == _for_pages(k_pages), 'k_pages',
         k_pages.shape, f'must be as from init_pages for {name!r}')
  planned = {} if plan is None else {'plan': plan}
  return IMPLEMENTATIONS[name](
    q, k_pages, v_pages,
    batch_lib.Batch(kv_lens, page_indices, cu_q_lens, distribution),
    batch_lib.Options(scale, sliding_window, soft_cap), **planned)


def make_plan(
  q: jax.Array,
  k_pages: jax.Array,
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  sliding_window: int | None = None,
) -> tuple[jax.Array, ...] | None:
  """How a batch is cut into work; arguments as of the attention.

  It depends on q and k_pages by their shapes only: layers that have these and
  the window in common can share a plan. None if there is nothing to plan.
  """
  if _for_pages(k_pages) != 'pallas_triton':
    return None
  shape = tuning.Shape.of(q, k_pages)
  return pallas_triton.make_plan(
    kv_lens, cu_q_lens, distribution, num_tokens=q.shape[0],
    sliding_window=sliding_window, sizes=tuning.choose(shape), shape=shape)


def init_pages(
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Zeroed keys and values of one layer.

  Args:
    num_pages: N.
    page_size: tokens a page.
    num_kv_heads: K.
    head_dim: h.
    dtype: float32, bfloat16 or float16.
    implementation: what will read them; None: 'pallas_triton' on a GPU where
      it can, else 'xla'.

  Returns:
    (k_pages, v_pages) in the implementation's layout (see `layout`): N comes
    first and K second; the rest is its own business.

  Raises:
    NotImplementedError: the implementation can't have such pages.
  """
  if implementation is None:
    implementation = _default(page_size, num_kv_heads, head_dim, dtype)
  elif implementation == 'pallas_triton':
    _triton_shape(page_size, num_kv_heads, head_dim, dtype)
  return layout.init(_LAYOUTS[_known(implementation)], num_pages, page_size,
                     num_kv_heads, head_dim, dtype)


def pages_from_rows(
  k_rows: jax.Array,
  v_rows: jax.Array,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Lays out pages given as [N, K, page_size, h] for an implementation."""
  if implementation is None:
    _, num_kv_heads, page_size, head_dim = k_rows.shape
    implementation = _default(page_size, num_kv_heads, head_dim, k_rows.dtype)
  return layout.from_rows(_LAYOUTS[_known(implementation)], k_rows, v_rows)


def write_kv(
  k_pages: jax.Array,
  v_pages: jax.Array,
  k: jax.Array,
  v: jax.Array,
  slot_mapping: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Puts new keys and values into their pages; in place where donated.

  Args:
    k_pages: as `init_pages` made them, for any implementation.
    v_pages: like k_pages.
    k: [T, K, h], the new keys.
    v: like k.
    slot_mapping: int32 [T], page * page_size + offset of every token, all
      different; those outside [0, N * page_size) are dropped (padding).

  Returns:
    The pages, updated.
  """
  return layout.write(k_pages, v_pages, k, v, slot_mapping)


def static_validate(
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
) -> None:
  """Checks what is known while tracing: ranks, shapes, dtypes, options.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  arrays = dict(q=q, k_pages=k_pages, v_pages=v_pages, kv_lens=kv_lens,
                page_indices=page_indices, cu_q_lens=cu_q_lens,
                distribution=distribution)
  for name, ranks in _RANKS.items():
    _check(arrays[name].ndim in ranks, name, arrays[name].shape,
           f'must have {" or ".join(map(str, ranks))} axes')
  for name in ('kv_lens', 'page_indices', 'cu_q_lens', 'distribution'):
    _check(arrays[name].dtype == jnp.int32, name, arrays[name].dtype,
           'must be int32')
  _check(q.dtype in _DTYPES, 'q', q.dtype,
         f'must be one of {", ".join(d.name for d in _DTYPES)}')
  _check(k_pages.dtype == q.dtype, 'k_pages', k_pages.dtype,
         f'must be the dtype of q, {q.dtype}')
  _check(v_pages.dtype == q.dtype, 'v_pages', v_pages.dtype,
         f'must be the dtype of q, {q.dtype}')
  num_pages, num_kv_heads, page_size, kv_head_dim = layout.sizes(k_pages)
  num_heads, head_dim = q.shape[1:]
  _check(kv_head_dim == head_dim, 'k_pages', k_pages.shape,
         f'its head dim must be that of q, {head_dim}')
  like = jax.eval_shape(lambda: layout.init(
    layout.ROWS if k_pages.ndim == 4 else layout.TILES, num_pages, page_size,
    num_kv_heads, head_dim, q.dtype))
  for name, expected in zip(('k_pages', 'v_pages'), like, strict=True):
    _check(arrays[name].shape == expected.shape, name, arrays[name].shape,
           f'must be {expected.shape}, as from init_pages')
  _check(min(k_pages.shape) > 0, 'k_pages', k_pages.shape,
         'must have no empty axis')
  _check(num_heads > 0 and num_heads % num_kv_heads == 0, 'q', q.shape,
         f'heads must be a multiple of the {num_kv_heads} of k_pages')
  num_seqs = kv_lens.shape[0]
  _check(page_indices.shape[0] == num_seqs, 'page_indices',
         page_indices.shape, f'must have {num_seqs} rows, as kv_lens')
  _check(cu_q_lens.shape[0] == num_seqs + 1, 'cu_q_lens', cu_q_lens.shape,
         f'must have one entry more than kv_lens, {num_seqs + 1}')
  _check(distribution.shape == (2,), 'distribution', distribution.shape,
         'must be (2,)')
  _check(sliding_window is None or sliding_window >= 1, 'sliding_window',
         sliding_window, 'must be None or at least 1')
  _check(soft_cap is None or soft_cap > 0, 'soft_cap', soft_cap,
         'must be None or above 0')


def dynamic_validate(
  q: jax.Array,
  k_pages: jax.Array,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
) -> None:
  """Checks values, which no jitted code can: for tests and debugging.

  Raises:
    ValueError: names the argument, what it is, and the rule.
  """
  num_decodes, num_seqs = (int(n) for n in np.asarray(distribution))
  lens, starts = np.asarray(kv_lens), np.asarray(cu_q_lens)
  q_lens = np.diff(starts)
  num_pages, _, page_size, _ = layout.sizes(k_pages)
  most = page_indices.shape[1] * page_size
  _check(0 <= num_decodes <= num_seqs <= len(lens), 'distribution',
         (num_decodes, num_seqs),
         f'must ascend within [0, {len(lens)}], the rows of kv_lens')
  _check(starts[0] == 0 and (q_lens >= 0).all(), 'cu_q_lens', starts,
         'must start at 0 and not descend')
  _check(starts[-1] <= q.shape[0], 'cu_q_lens', starts,
         f'must end within the {q.shape[0]} tokens of q')
  _check((q_lens[:num_decodes] == 1).all(), 'cu_q_lens', starts,
         f'the first {num_decodes} sequences are decodes, of one token each')
  _check((q_lens[num_seqs:] == 0).all(), 'cu_q_lens', starts,
         f'must not grow after the {num_seqs} sequences')
  _check((lens[num_seqs:] == 0).all(), 'kv_lens', lens,
         f'must be 0 after the {num_seqs} sequences')
  _check((lens >= q_lens).all(), 'kv_lens', lens,
         f'must count the new tokens too, {q_lens}')
  _check((lens <= most).all(), 'kv_lens', lens,
         f'must fit the page_indices, {most} tokens')
  for s in range(num_seqs):
    used = np.asarray(page_indices)[s, :-(-int(lens[s]) // page_size)]
    _check(((used >= 0) & (used < num_pages)).all(), f'page_indices[{s}]',
           used, f'must be in [0, {num_pages})')


def _check(ok: object, name: str, value: object, rule: str) -> None:
  if not ok:
    raise ValueError(f'{name}={value}: {rule}.')


def _known(implementation: str) -> str:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'{implementation=}: must be None or one of '
                     f'{", ".join(sorted(IMPLEMENTATIONS))}.')
  return implementation


def _for_pages(k_pages: jax.Array) -> str:
  """The implementation that pages of this layout are for."""
  return 'pallas_triton' if k_pages.ndim == 4 else 'xla'


def _default(page_size: int, num_kv_heads: int, head_dim: int,
             dtype: jax.typing.DTypeLike) -> str:
  """What `implementation=None` means on the default device."""
  device = tuning.default_device()
  if device.platform not in ('gpu', 'cuda'):
    return 'xla'
  capability = str(getattr(device, 'compute_capability', ''))
  major = capability.partition('.')[0]
  if not major.isdigit() or int(major) < 8:
    _say_once('Attention falls back to plain XLA: pallas_triton: '
              f'compute_capability={capability}: must be 8.0 or above.')
    return 'xla'
  try:
    _triton_shape(page_size, num_kv_heads, head_dim, dtype)
  except NotImplementedError as reason:
    _say_once(f'Attention falls back to plain XLA: {reason}')
    return 'xla'
  return 'pallas_triton'


@functools.cache  # Each layer asks.
def _say_once(text: str) -> None:
  _log.warning(text)


def _triton_shape(page_size: int, num_kv_heads: int, head_dim: int,
                  dtype: jax.typing.DTypeLike) -> None:
  """Raises NotImplementedError if the kernel can't have such pages."""
  tuning.choose(tuning.Shape(jnp.dtype(dtype).name, num_kv_heads, 1, head_dim,
                             page_size))

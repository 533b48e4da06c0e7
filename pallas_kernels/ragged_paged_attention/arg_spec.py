# SPDX-License-Identifier: Apache-2.0
"""A batch as data, from which the operation's arguments are drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import quantization


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
    sinks: whether there are sinks, about as high as the highest scores.
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
  sinks: bool = False

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
  if spec.sinks:
    sinks = 3 * rng.standard_normal(spec.num_heads)
    arrays['sinks'] = jnp.asarray(sinks, jnp.float32)
  return arrays | {name: jnp.asarray(x) for name, x in ints.items()}


def spread(low: int, high: int, count: int) -> tuple[int, ...]:
  """Returns `count` lengths, evenly from low to high, in a shuffled order."""
  lens = np.linspace(low, high, count).round().astype(int)
  return tuple(int(n) for n in np.random.default_rng(0).permutation(lens))

# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU takes a few heads of a token: of its queries, of its keys or
of its values. It normalizes and rotates them, rounds them as they are kept, and
stores them where attention reads them. XLA takes three launches for that, and
two more where there are norms, or pages are quantized.

A merged projection gives queries, keys and values side by side in one array. As
pieces of it they would be copied before a kernel may read them; put together
again, XLA knows them for that array, and the kernel finds them in it.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import tuning as attention_tuning
from pallas_kernels.rotate_and_write import head_norm
from pallas_kernels.rotate_and_write import tuning


class _Part(NamedTuple):
  """The heads of queries, of keys or of values.

  Attributes:
    source: the number of the array that they are in.
    first: the head of it that they begin at.
    num_heads: how many there are.
    tile: how many a block takes, a power of two.
  """

  source: int
  first: int
  num_heads: int
  tile: int

  @property
  def num_tiles(self) -> int:
    return -(-self.num_heads // self.tile)

  def heads_of(self, turn: jax.Array) -> jax.Array:
    """Returns the first head of a tile; the last one may repeat some."""
    return jnp.minimum(turn * self.tile, self.num_heads - self.tile)


def rotate_and_write(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rotation: tuple[jax.Array, jax.Array] | None,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  slot_mapping: jax.Array,
  norms: head_norm.HeadNorms | None = None,
  rows: jax.Array | None = None,
) -> tuple[jax.Array, tuple[quantization.Pages, quantization.Pages]]:
  """Rotates and writes; see `api.rotate_and_write`. Pages are rows.

  Raises:
    NotImplementedError: the kernel doesn't support such pages, or the device.
  """
  devices.check_triton(devices.default())
  attention_tuning.check_indices(k_pages)
  if not layout.is_rows(k_pages):
    raise NotImplementedError(
      f'pallas_triton: k_pages={quantization.values_of(k_pages).shape}: must '
      'be rows, [N, K, page_size, h].'
    )
  if not slot_mapping.size:
    return q, (k_pages, v_pages)  # No grid is empty, and so is q.
  num_heads, num_kv_heads, head_dim = q.shape[1], *k.shape[1:]
  is_one = rows is None
  sources = (_together(q, k, v),) if is_one else (q, _together(k, v))
  tile = functools.partial(_tile, head_dim=head_dim)
  keys = num_heads if is_one else 0
  parts = (
    _Part(0, 0, num_heads, tile(num_heads)),
    _Part(len(sources) - 1, keys, num_kv_heads, tile(num_kv_heads)),
    _Part(
      len(sources) - 1, keys + num_kv_heads, num_kv_heads, tile(num_kv_heads)
    ),
  )
  out, *pages = devices.launch(
    functools.partial(_launch, parts=parts, num_rows=len(q)),
    (slot_mapping, rows, rotation or (), norms or (None, None), sources),
    (k_pages, v_pages),
  )
  return out, (pages[0], pages[1])


def _together(*arrays: jax.Array) -> jax.Array:
  """Puts heads side by side, as flat as a projection gives them."""
  flat = [x.reshape(len(x), -1) for x in arrays]
  return jnp.concatenate(flat, axis=1).reshape(
    len(flat[0]), -1, arrays[0].shape[-1]
  )


def _tile(num_heads: int, head_dim: int) -> int:
  """Returns the heads of a tile: a power of two, no more than there are."""
  most = min(num_heads, max(tuning.TILE // head_dim, 1))
  return 1 << (most.bit_length() - 1)


def _launch(
  read: Any,
  pages: Any,
  *,
  parts: tuple[_Part, _Part, _Part],
  num_rows: int,
  interpret: bool,
) -> Any:
  """Launches the kernel.

  Args:
    read: (slot_mapping, rows, rotation, norms, sources).
    pages: (k_pages, v_pages), which are updated in place.
    parts: queries, keys, values.
    num_rows: R.
    interpret: whether to.

  Returns:
    Queries, and both pages.
  """
  slots, *_, sources = read
  queries = parts[0]
  source = sources[queries.source]
  out = jax.ShapeDtypeStruct(
    (num_rows, queries.num_heads, source.shape[-1]), source.dtype
  )
  first = len(jax.tree.leaves(read))
  return pl.pallas_call(
    functools.partial(_kernel, parts=parts),
    grid=(max(num_rows, len(slots)), sum(part.num_tiles for part in parts)),
    out_shape=(
      out,
      *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pages),
    ),
    input_output_aliases={
      first + i: 1 + i for i in range(len(jax.tree.leaves(pages)))
    },
    compiler_params=plgpu.CompilerParams(
      num_warps=tuning.NUM_WARPS, num_stages=1
    ),
    interpret=interpret,
    name='rotate_and_write',
  )(read, pages)


def _kernel(
  read: Any,
  old_pages: Any,
  out_ref: Any,
  *pages: Any,
  parts: tuple[_Part, _Part, _Part],
) -> None:
  """Turns and stores a tile: the kernel.

  Args:
    read: refs of (slots [T], rows [R] or None, (cos, sin) [T, half] each or
      (), norms of queries and of keys or None, arrays [.., heads, h] that
      hold the parts).
    old_pages: the same memory as `pages`.
    out_ref: [R, H, h], queries.
    *pages: refs of keys and of values, [N, K, page_size, h] each; or
      `Quantized` of such refs, with scales [N, K, page_size].
    parts: queries, keys, values.
  """
  del old_pages  # They are `pages`.
  slots_ref, rows_ref, tables, (q_norm, k_norm), sources = read
  index, turn = pl.program_id(0), pl.program_id(1)
  num_tokens, num_rows = slots_ref.shape[0], out_ref.shape[0]
  num_pages, _, page_size, _ = layout.sizes(pages[0])
  queries, keys, values = parts

  def tile(
    part: _Part, turn: jax.Array, token: jax.Array, tables: Any, norm: Any
  ) -> Any:
    """Returns heads, and their pieces."""
    first = part.heads_of(turn)
    heads = pl.ds(part.first + first, part.tile)
    pieces = _turned(sources[part.source], (index, heads), token, tables, norm)
    return pl.ds(first, part.tile), list(pieces)

  @pl.when((turn < queries.num_tiles) & (index < num_rows))
  def turn_queries() -> None:
    token = index if rows_ref is None else rows_ref[index]
    heads, pieces = tile(queries, turn, token, tables, q_norm)
    for piece, x in pieces:
      plgpu.store(out_ref.at[index, heads, pl.ds(*piece)], x)

  slot = slots_ref[jnp.minimum(index, num_tokens - 1)]
  is_real = (index < num_tokens) & (slot >= 0) & (slot < num_pages * page_size)
  begin = queries.num_tiles
  for part, turning, ref in (
    (keys, (tables, k_norm), pages[0]),
    (values, ((), None), pages[1]),
  ):
    its_turn = turn - begin
    begin += part.num_tiles

    @pl.when(is_real & (its_turn >= 0) & (its_turn < part.num_tiles))
    def write(
      part: _Part = part,
      its_turn: jax.Array = its_turn,
      turning: Any = turning,
      ref: Any = ref,
    ) -> None:
      heads, pieces = tile(part, its_turn, index, *turning)
      place = slot // page_size, heads, slot % page_size
      _store(ref, place, pieces)


_Piece = tuple[tuple[int, int], jax.Array]  # (first, size), [tile, size]


def _turned(
  ref: Any,
  place: Any,
  token: jax.Array,
  tables: Sequence[Any],
  norm: head_norm.HeadNorm | None,
) -> Iterator[_Piece]:
  """Yields the channels of a tile, in powers of two, turned.

  Args:
    ref: [.., heads, h].
    place: of the tile in it: a row, and heads.
    token: that the row is of.
    tables: refs of cosines and sines, [T, half] each; or none.
    norm: whose weight is a ref; or None.
  """
  head_dim = ref.shape[-1]
  half = tables[0].shape[1] if tables else 0
  pairs = attention_tuning.pieces(half)
  rest = [
    (2 * half + first, size)
    for first, size in attention_tuning.pieces(head_dim - 2 * half)
  ]
  beside = [(half + first, size) for first, size in pairs]
  x = {
    piece: plgpu.load(ref.at[*place, pl.ds(*piece)])
    for piece in (*pairs, *beside, *rest)
  }
  if norm is not None:
    x = _normalized(x, norm, head_dim)
  for first, second in zip(pairs, beside, strict=True):
    cos, sin = (
      plgpu.load(table.at[token, pl.ds(*first)])[None] for table in tables
    )
    left, right = (x[piece].astype(jnp.float32) for piece in (first, second))
    yield first, (left * cos - right * sin).astype(ref.dtype)
    yield second, (right * cos + left * sin).astype(ref.dtype)
  for piece in rest:
    yield piece, x[piece]


def _normalized(
  x: Mapping[tuple[int, int], jax.Array],
  norm: head_norm.HeadNorm,
  head_dim: int,
) -> dict[tuple[int, int], jax.Array]:
  """Divides heads, in pieces, by their root mean squares; see `_turned`."""
  wide = {piece: part.astype(jnp.float32) for piece, part in x.items()}
  squares = [jnp.square(part).sum(axis=1) for part in wide.values()]
  square = functools.reduce(jnp.add, squares) / head_dim
  factor = lax.rsqrt(square + norm.eps)[:, None]

  def scaled(piece: tuple[int, int]) -> jax.Array:
    weight = plgpu.load(norm.weight.at[pl.ds(*piece)]).astype(jnp.float32)
    weight = norm.offset + weight[None]
    return (wide[piece] * factor * weight).astype(x[piece].dtype)

  return {piece: scaled(piece) for piece in wide}


def _store(pages: Any, place: Any, pieces: list[_Piece]) -> None:
  """Stores keys or values of some heads, rounded as they are kept.

  Args:
    pages: refs, see `_kernel`.
    place: of the token: page, heads, offset in the page.
    pieces: all of the heads' channels.
  """
  if isinstance(pages, quantization.Quantized):
    ref: Any = pages.values
    scales_ref: Any = pages.scales
    numbers = [x.astype(jnp.float32) for _, x in pieces]
    peaks = [jnp.abs(x).max(axis=1) for x in numbers]
    scales = quantization.scales_of(
      functools.reduce(jnp.maximum, peaks), ref.dtype
    )
    plgpu.store(scales_ref.at[place], scales)
    pieces = [
      (piece, quantization.encode(x / scales[:, None], ref.dtype))
      for (piece, _), x in zip(pieces, numbers, strict=True)
    ]
  else:
    ref = pages
    pieces = [(piece, x.astype(ref.dtype)) for piece, x in pieces]
  for piece, x in pieces:
    plgpu.store(ref.at[*place, pl.ds(*piece)], x)

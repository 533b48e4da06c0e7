# SPDX-License-Identifier: Apache-2.0
"""Tables of the sizes of the GPU kernels' tiles, by device and shape.

`TUNED` is for sizes that were measured to be the fastest on a GPU, by
`scripts/gpu_check --stages=tune`; there are none yet. The other sizes are
those that compile for the device without spilling a register and, where
possible, leave room for two blocks on each multiprocessor. `python -m
pallas_kernels.aot` shows it, and CI proves it, for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels import mosaic_devices
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import plan as plan_lib
from pallas_kernels.ragged_paged_attention import quantization

INDICES = 2**31  # indices that int32 has; see `api.most_pages`


def pieces(size: int) -> tuple[tuple[int, int], ...]:
  """Cuts an axis into powers of two, (first, size), which Triton needs.

  So no load needs a mask. Worked example: 80 -> (0, 64), (64, 16).
  """
  sizes = [1 << i for i in reversed(range(size.bit_length())) if size >> i & 1]
  return tuple((sum(sizes[:i]), n) for i, n in enumerate(sizes))


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """The shape that a kernel is compiled for, beside its arrays' lengths.

  Attributes:
    dtype: of queries, and of keys and values once they are decoded.
    kv_dtype: of the array that they are kept in.
    num_kv_heads, group, head_dim, page_size: K, H / K, h, tokens.
  """

  dtype: str
  kv_dtype: str
  num_kv_heads: int
  group: int
  head_dim: int
  page_size: int

  @classmethod
  def of(
    cls, q: jax.Array | jax.ShapeDtypeStruct, k_pages: quantization.Pages
  ) -> Shape:
    """Returns the shape of a call.

    Args:
      q: [T, H, h].
      k_pages: of `api.init_pages`, as rows.

    Raises:
      NotImplementedError: the kernel doesn't support it; says why.
    """
    check_indices(k_pages)
    _, num_kv_heads, page_size, head_dim = layout.sizes(k_pages)
    kv_dtype = quantization.values_of(k_pages).dtype
    return cls(
      q.dtype.name,
      kv_dtype.name,
      num_kv_heads,
      q.shape[1] // num_kv_heads,
      head_dim,
      page_size,
    )

  def __post_init__(self) -> None:
    _check(
      self.head_dim % 16 == 0,
      'head_dim',
      self.head_dim,
      'must be a multiple of 16',
    )
    _check(
      self.page_size >= 16 and not self.page_size & (self.page_size - 1),
      'page_size',
      self.page_size,
      'must be a power of two from 16 on',
    )

  @property
  def pieces(self) -> tuple[tuple[int, int], ...]:
    """The channels, in powers of two; see `pieces`."""
    return pieces(self.head_dim)

  def channels(self) -> list[jax.Array]:
    """Returns the indices of each piece's channels, int32 [size]."""
    return [
      first + jnp.arange(size, dtype=jnp.int32) for first, size in self.pieces
    ]

  @property
  def dot_options(self) -> dict[str, Any]:
    """Keyword arguments of matmuls: float32 isn't rounded to TensorFloat32."""
    return dict(allow_tf32=False) if self.dtype == 'float32' else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
  """A kernel's tile, and how it is compiled and launched.

  Attributes:
    rows: query rows.
    block_n: keys of a block; they lie in one page.
    num_warps: of a block of the GPU.
    num_stages: of the pipeline that loads keys and values.
    num_blocks: blocks of the GPU, which take work items in turn.
  """

  rows: int
  block_n: int
  num_warps: int
  num_stages: int
  num_blocks: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
  """Tiles of `pallas_triton`'s kernels.

  Attributes:
    small: of small sequences.
    chunks: of chunks of prefills.
    merge: of what is split: partial results, as many at a time as `block_n`.
    tiling: by which small sequences are cut.
  """

  small: Tile
  chunks: Tile
  merge: Tile
  tiling: plan_lib.Tiling


# The fields of `Tile` that the tables hold. `rows` of small sequences are more
# where a group is.
NUMBERS = 'rows', 'block_n', 'num_warps', 'num_stages'
KINDS = 'small', 'chunks'
_Numbers = tuple[int, int, int, int]
_MOST_SMALL = 32  # rows
# Blocks for each multiprocessor: more than run at once, so that the rest begin
# as others end; and so few that those without work don't matter.
_PER_SM = {'small': 8, 'chunks': 2}
_AT_ONCE = 3  # small ones that a multiprocessor runs at once, about
# (kind, device, dtype, kv_dtype, H / K, head_dim, page_size) ->
TUNED: Mapping[tuple[str, str, str, str, int, int, int], _Numbers] = {}
# (bytes of a number, head_dim up to) ->
_Table = dict[tuple[int, int], _Numbers]
# Of float32: with more stages, registers spill.
_SMALL: _Table = {
  (2, 256): (16, 32, 4, 2),
  (4, 80): (16, 16, 2, 1),
  (4, 256): (16, 16, 4, 1),
}
_CHUNKS: _Table = {
  (2, 256): (64, 32, 8, 2),
  (4, 80): (32, 16, 4, 1),
  (4, 96): (32, 32, 8, 1),
  (4, 256): (32, 16, 8, 1),
}
_SIZES: Mapping[tuple[str, str], _Table] = {
  ('small', 'a100'): {(2, 128): (16, 32, 4, 3)} | _SMALL,
  ('small', 'a40'): {(2, 128): (16, 32, 4, 3)} | _SMALL,
  ('small', 'h100'): {(2, 128): (16, 64, 4, 3)} | _SMALL,
  ('chunks', 'a100'): _CHUNKS
  | {
    (2, 128): (128, 64, 8, 3),
    (2, 256): (64, 32, 8, 3),
  },
  ('chunks', 'a40'): {(2, 128): (128, 64, 8, 3)} | _CHUNKS,
  ('chunks', 'h100'): _CHUNKS
  | {
    (2, 128): (128, 64, 8, 3),
    (2, 256): (128, 32, 8, 3),
  },
}
# Those for a quantized cache, where the registers of the others spill, or fewer
# warps take fewer instructions: each of them loads the scales.
_QUANTIZED: Mapping[tuple[str, str], _Table] = {
  ('small', 'a100'): {(2, 128): (16, 32, 2, 3)},
  ('small', 'a40'): {(2, 128): (16, 16, 2, 4)},
  ('small', 'h100'): {
    (2, 64): (16, 64, 2, 3),
    (2, 80): (16, 32, 2, 3),
    (2, 128): (16, 64, 2, 3),
    (2, 256): (16, 32, 4, 1),
  },
  ('chunks', 'a100'): {(2, 80): (128, 64, 8, 2), (2, 96): (128, 32, 8, 2)},
  ('chunks', 'a40'): {(2, 128): (128, 32, 8, 3)},
}
# Compute capability -> its own sizes, where those of its target spill.
_ITS_OWN: Mapping[tuple[str, str], _Table] = {
  ('chunks', '10.0'): {**_SIZES['chunks', 'h100'], (2, 256): (32, 16, 8, 2)}
}
_MERGED_AT_ONCE = 16  # partial results
# `implementation=None` means the first of these that supports the pages. Only a
# measurement may put pallas_mosaic before pallas_triton, and there is none yet:
# `scripts/gpu_check` has both in its sweep.
_FASTEST: Mapping[str, tuple[str, ...]] = dict.fromkeys(
  ('a100', 'a40', 'h100'), ('pallas_triton', 'pallas_mosaic')
)


def choose(shape: Shape) -> Sizes:
  """Returns the sizes for a shape, on the default device.

  Takes those listed for its compute capability, or else those of the GPU in the
  tables whose multiprocessors are alike. CPUs interpret the kernel.

  Raises:
    NotImplementedError: there are none for such a shape or device.
  """
  devices.check_triton(devices.default())
  return _sizes(shape, {kind: _numbers(kind, shape) for kind in KINDS})


def _numbers(kind: str, shape: Shape) -> _Numbers:
  device = devices.default()
  target, width = devices.target_of(device), jnp.dtype(shape.dtype).itemsize
  tuned = TUNED.get(
    (
      kind,
      devices.measured_as(device),
      shape.dtype,
      shape.kv_dtype,
      shape.group,
      shape.head_dim,
      shape.page_size,
    )
  )
  if tuned is not None:
    return tuned
  table = _ITS_OWN.get(
    (kind, devices.capability_of(device)), _SIZES[kind, target]
  )
  if shape.kv_dtype != shape.dtype:
    table = {**table, **_QUANTIZED.get((kind, target), {})}
  for (itemsize, head_dim), numbers in sorted(table.items()):
    if itemsize == width and shape.head_dim <= head_dim:
      return numbers
  _check(
    width in (2, 4),
    'dtype',
    shape.dtype,
    'must be float32, bfloat16 or float16',
  )
  _check(False, 'head_dim', shape.head_dim, 'must be at most 256')
  raise AssertionError


def _sizes(
  shape: Shape, numbers: Mapping[str, _Numbers], *, within_pages: bool = True
) -> Sizes:
  """Returns sizes of the numbers of `KINDS`.

  Args:
    shape: what for.
    numbers: of each kind.
    within_pages: whether a block of keys has to lie in one page.
  """
  device = devices.default()
  multiprocessors = (
    _INTERPRETED_BLOCKS
    if device.platform == 'cpu'
    else devices.multiprocessors(device)
  )

  def tile(kind: str, least_rows: int) -> Tile:
    rows, block_n, num_warps, num_stages = numbers[kind]
    return Tile(
      max(rows, least_rows),
      min(block_n, shape.page_size) if within_pages else block_n,
      num_warps,
      num_stages,
      _PER_SM[kind] * multiprocessors,
    )

  of_small = tile('small', min(_power_of_two(shape.group), _MOST_SMALL))
  return Sizes(
    of_small,
    tile('chunks', 1),
    dataclasses.replace(
      of_small,
      block_n=_MERGED_AT_ONCE,
      num_warps=2 * -(-shape.head_dim // 128),  # With 2 for 256, some spill.
      num_stages=1,
    ),
    plan_lib.Tiling(
      of_small.rows,
      of_small.block_n,
      -(-_AT_ONCE * multiprocessors // shape.num_kv_heads),
    ),
  )


# Sizes worth trying, the most promising first.
_CANDIDATES: Mapping[str, tuple[_Numbers, ...]] = {
  'small': (
    (16, 64, 4, 3),
    (16, 32, 4, 3),
    (16, 32, 4, 4),
    (16, 64, 4, 2),
    (16, 64, 8, 3),
    (16, 32, 2, 3),
    (16, 32, 4, 2),
  ),
  'chunks': (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 32, 8, 3),
    (128, 32, 8, 2),
    (64, 32, 4, 3),
  ),
}


def candidates(kind: str, shape: Shape) -> Iterator[tuple[_Numbers, Sizes]]:
  """Yields sizes worth trying on the default device, most promising first.

  Args:
    kind: of `KINDS`, whose sizes vary; the other's are those of `choose`.
    shape: what for.
  """
  chosen = {kind: _numbers(kind, shape) for kind in KINDS}
  for numbers in _CANDIDATES[kind]:
    yield numbers, _sizes(shape, chosen | {kind: numbers})


def check_indices(pages: quantization.Pages) -> None:
  """Raises NotImplementedError if a kernel's offsets would overflow."""
  kept = quantization.values_of(pages)
  _check(
    kept.dtype.itemsize > 1 or kept.size < INDICES,
    'k_pages',
    kept.shape,
    f'must be less than {INDICES} numbers of a byte',
  )


def fastest() -> tuple[str, ...]:
  """Returns the implementations for the default device, fastest first."""
  return _FASTEST.get(
    devices.measured_as(devices.default()), ('pallas_triton',)
  )


@dataclasses.dataclass(frozen=True, slots=True)
class MosaicSizes:
  """Tiles of `pallas_mosaic`.

  Attributes:
    block_n: keys of a block.
    num_stages: blocks of keys, and of values, that shared memory holds.
    heads: heads of a tile's queries, which share their keys.
    queries: queries of a tile, for each of its heads.
    num_blocks: blocks (CTAs) of the GPU that share the tiles.
    interpret: whether to interpret the kernel, as there is no GPU.
  """

  block_n: int
  num_stages: int
  heads: int
  queries: int
  num_blocks: int
  interpret: bool


MOSAIC = {64: (128, 4), 128: (128, 2)}  # head_dim -> block_n, num_stages
_INTERPRETED_BLOCKS = 2  # Each runs after the other.
# Of Ampere's kernels, as of Triton's; a warpgroup multiplies 64 rows, of which
# small sequences fill few.
_MOSAIC_AMPERE: Mapping[int, Mapping[str, _Numbers]] = {
  64: {'small': (16, 64, 4, 3), 'chunks': (128, 64, 8, 3)},
  128: {'small': (16, 32, 4, 3), 'chunks': (128, 64, 8, 2)},
}
# Numbers of one copy by cp.async: for each of four warps a tile of 8 by 64.
_LEAST_COPY = 4 * 8 * 64


def choose_mosaic(shape: Shape) -> MosaicSizes | Sizes:
  """Returns pallas_mosaic's sizes for a shape, on the default device.

  Returns:
    Those of Hopper's kernel, or of Ampere's.

  Raises:
    NotImplementedError: there are none for such a shape, device or JAX.
  """
  check = functools.partial(_check, who='pallas_mosaic')
  device = devices.default()
  interpret = device.platform == 'cpu'
  capability = mosaic_devices.capability()
  check(
    shape.dtype in ('bfloat16', 'float16'),
    'dtype',
    shape.dtype,
    'must be bfloat16 or float16',
  )
  check(
    shape.kv_dtype == shape.dtype,
    'kv_dtype',
    shape.kv_dtype,
    'must be bfloat16 or float16, as of the queries',
  )
  check(
    shape.head_dim in MOSAIC,
    'head_dim',
    shape.head_dim,
    f'must be one of {", ".join(map(str, MOSAIC))}',
  )
  if capability != mosaic_devices.HOPPER:
    least = _LEAST_COPY // shape.head_dim
    check(
      interpret or shape.page_size >= least,
      'page_size',
      shape.page_size,
      f'must be at least {least} with head_dim={shape.head_dim}, on Ampere',
    )
    return _sizes(shape, _MOSAIC_AMPERE[shape.head_dim], within_pages=False)
  # Two warpgroups with 64 rows each.
  heads, queries = (1, 128) if shape.group % 2 else (2, 64)
  num_blocks = (
    _INTERPRETED_BLOCKS if interpret else devices.multiprocessors(device)
  )
  return MosaicSizes(
    *MOSAIC[shape.head_dim], heads, queries, num_blocks, interpret
  )


def _check(
  ok: bool, name: str, value: object, rule: str, who: str = 'pallas_triton'
) -> None:
  if not ok:
    raise NotImplementedError(f'{who}: {name}={value}: {rule}.')


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()

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
class Sizes:
  """Tiles and how they are compiled; see `plan.Tiling`.

  Attributes:
    wide_rows: query rows of a prefill's tile.
    block_n: keys of a block.
    num_warps: of a block of the GPU.
    num_stages: of the pipeline that loads keys and values.
    num_blocks: blocks that the GPU runs at once.
    has_wide: whether prefills are this kernel's work, too.
  """

  wide_rows: int
  block_n: int
  num_warps: int
  num_stages: int
  num_blocks: int
  has_wide: bool = True

  def tiling(self, shape: Shape) -> plan_lib.Tiling:
    narrow = min(max(16, _power_of_two(shape.group)), self.wide_rows // 2)
    return plan_lib.Tiling(
      wide_rows=self.wide_rows,
      narrow_rows=narrow,
      block_n=min(self.block_n, shape.page_size),
      num_items=-(-2 * self.num_blocks // shape.num_kv_heads),
      has_wide=self.has_wide,
    )


# The fields of Sizes that the tables hold.
NUMBERS = 'wide_rows', 'block_n', 'num_warps', 'num_stages'
_Numbers = tuple[int, int, int, int]
# (device, dtype, kv_dtype, H / K, head_dim, page_size) ->
TUNED: Mapping[tuple[str, str, str, int, int, int], _Numbers] = {}
# (bytes of a number, head_dim up to) ->
_WIDE = {(2, 256): (64, 32, 8, 2), (4, 256): (32, 16, 8, 2)}
# For float32 over a quantized cache: with more stages, registers spill.
_CONVERTED = (32, 16, 8, 1)
_SIZES: Mapping[str, Mapping[tuple[int, int], _Numbers]] = {
  'a100': {(2, 128): (64, 32, 4, 2)} | _WIDE,
  'a40': {(2, 128): (64, 32, 4, 3)} | _WIDE,
  'h100': {(2, 128): (64, 64, 4, 2)} | _WIDE,
}
# Compute capability -> its own sizes, where those of its target spill.
_ITS_OWN: Mapping[str, Mapping[tuple[int, int], _Numbers]] = {
  '10.0': {**_SIZES['h100'], (2, 256): (32, 16, 8, 2)}
}
# What `implementation=None` of `api.write_kv` means, for pages of rows: one of
# `api.WRITERS`, by `scripts/gpu_check --stages=write`, which has not run yet.
_WRITER: Mapping[str, str] = {'a100': 'xla', 'a40': 'xla', 'h100': 'xla'}
# `implementation=None` means the first of these that supports the pages. Only a
# measurement may put pallas_mosaic before pallas_triton on H100, and there is
# none yet: `scripts/gpu_check` has both in its sweep.
_FASTEST: Mapping[str, tuple[str, ...]] = {
  'a100': ('pallas_triton',),
  'a40': ('pallas_triton',),
  'h100': ('pallas_triton', 'pallas_mosaic'),
}


def choose(shape: Shape) -> Sizes:
  """Returns the sizes for a shape, on the default device.

  Takes those listed for its compute capability, or else those of the GPU in the
  tables whose multiprocessors are alike. CPUs interpret the kernel.

  Raises:
    NotImplementedError: there are none for such a shape or device.
  """
  device = devices.default()
  devices.check_triton(device)
  target, width = devices.target_of(device), jnp.dtype(shape.dtype).itemsize
  tuned = TUNED.get(
    (
      devices.measured_as(device),
      shape.dtype,
      shape.kv_dtype,
      shape.group,
      shape.head_dim,
      shape.page_size,
    )
  )
  num_blocks = 2 * devices.multiprocessors(device)
  if tuned is not None:
    return Sizes(*tuned, num_blocks=num_blocks)
  if width == 4 and shape.kv_dtype != shape.dtype:
    return Sizes(*_CONVERTED, num_blocks=num_blocks)
  rows = _ITS_OWN.get(devices.capability_of(device), _SIZES[target])
  for (itemsize, head_dim), sizes in rows.items():
    if itemsize == width and shape.head_dim <= head_dim:
      return Sizes(*sizes, num_blocks=num_blocks)
  _check(
    width in (2, 4),
    'dtype',
    shape.dtype,
    'must be float32, bfloat16 or float16',
  )
  _check(False, 'head_dim', shape.head_dim, 'must be at most 256')
  raise AssertionError


# Sizes worth trying, the most promising first. Those have the fewest machine
# instructions a product (tiles of 128 rows by eight warps), or load a block
# before the current one is done (three stages).
_CANDIDATES: tuple[_Numbers, ...] = (
  (64, 64, 4, 2),
  (128, 64, 8, 3),
  (64, 64, 4, 3),
  (128, 64, 8, 2),
  (64, 32, 4, 3),
  (128, 32, 8, 3),
  (64, 32, 4, 2),
  (128, 32, 8, 2),
  (64, 64, 8, 2),
  (64, 64, 8, 3),
  (64, 32, 8, 2),
  (64, 32, 8, 3),
  (128, 64, 4, 2),
  (128, 64, 4, 3),
  (128, 32, 4, 2),
  (128, 32, 4, 3),
)


def candidates() -> Iterator[Sizes]:
  """Yields sizes worth trying on the default device, most promising first."""
  num_blocks = 2 * devices.multiprocessors(devices.default())
  for numbers in _CANDIDATES:
    yield Sizes(*numbers, num_blocks=num_blocks)


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


def writer() -> str:
  """Returns the fastest writer of pages of rows, on the default device."""
  return _WRITER.get(devices.measured_as(devices.default()), 'xla')


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


MOSAIC_JAX = (0, 11)
MOSAIC = {64: (128, 4), 128: (128, 2)}  # head_dim -> block_n, num_stages
_INTERPRETED_BLOCKS = 2  # Each runs after the other.


def choose_mosaic(shape: Shape) -> MosaicSizes:
  """Returns pallas_mosaic's sizes for a shape, on the default device.

  Raises:
    NotImplementedError: there are none for such a shape, device or JAX.
  """
  check = functools.partial(_check, who='pallas_mosaic')
  check(
    jax.__version_info__ >= MOSAIC_JAX,
    'jax',
    jax.__version__,
    'must be 0.11 or newer',
  )
  device = devices.default()
  if not (interpret := device.platform == 'cpu'):
    capability = str(getattr(device, 'compute_capability', ''))
    check(
      capability in ('9.0', '9.0a'),
      'compute_capability',
      capability,
      "must be 9.0, as Hopper's",
    )
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

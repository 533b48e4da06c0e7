# SPDX-License-Identifier: Apache-2.0
"""Sizes of the GPU kernels' tiles, by device and shape: tables.

`TUNED` is for what a GPU showed to be the fastest, by `scripts/gpu_check
--stages=tune`; none did yet. The others' sizes are what compiles for the
device without a register spilled and leaves room for two blocks on each
multiprocessor where it can (`python -m pallas_kernels.aot` shows it, and CI
proves it, for both).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_targets
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import plan as plan_lib
from pallas_kernels.ragged_paged_attention import quantization

INDICES = 2**31  # that int32 has; see `api.most_pages`


def pieces(size: int) -> tuple[tuple[int, int], ...]:
  """An axis in powers of two, (first, size), as Triton needs them: no masks.

  80 -> (0, 64), (64, 16)
  """
  sizes = [1 << i for i in reversed(range(size.bit_length())) if size >> i & 1]
  return tuple((sum(sizes[:i]), n) for i, n in enumerate(sizes))


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """What a kernel is compiled for, beside the sizes of its arrays.

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
  def of(cls, q: jax.Array | jax.ShapeDtypeStruct,
         k_pages: quantization.Pages) -> Shape:
    """The shape of a call.

    Raises:
      NotImplementedError: the kernel can't have it; says why.
    """
    check_indices(k_pages)
    _, num_kv_heads, page_size, head_dim = layout.sizes(k_pages)
    kv_dtype = quantization.values_of(k_pages).dtype
    return cls(q.dtype.name, kv_dtype.name, num_kv_heads,
               q.shape[1] // num_kv_heads, head_dim, page_size)

  def __post_init__(self) -> None:
    _check(self.head_dim % 16 == 0, 'head_dim', self.head_dim,
           'must be a multiple of 16')
    _check(self.page_size >= 16 and not self.page_size & (self.page_size - 1),
           'page_size', self.page_size, 'must be a power of two from 16 on')

  @property
  def pieces(self) -> tuple[tuple[int, int], ...]:
    """Of the channels."""
    return pieces(self.head_dim)

  def channels(self) -> list[jax.Array]:
    """The indices of each piece's channels."""
    return [first + jnp.arange(size, dtype=jnp.int32)
            for first, size in self.pieces]

  @property
  def dot_options(self) -> dict[str, Any]:
    """Of a matmul: float32 is not rounded to TensorFloat32."""
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
      wide_rows=self.wide_rows, narrow_rows=narrow,
      block_n=min(self.block_n, shape.page_size),
      num_items=-(-2 * self.num_blocks // shape.num_kv_heads),
      has_wide=self.has_wide)


# Of Sizes, what the tables have.
NUMBERS = 'wide_rows', 'block_n', 'num_warps', 'num_stages'
_Numbers = tuple[int, int, int, int]
# (device, dtype, kv_dtype, H / K, head_dim, page_size) ->
TUNED: Mapping[tuple[str, str, str, int, int, int], _Numbers] = {}
# (bytes of a number, head_dim up to) ->
_WIDE = {(2, 256): (64, 32, 8, 2), (4, 256): (32, 16, 8, 2)}
# Of float32 over a quantized cache; in a pipeline, what is converted spills.
_CONVERTED = (32, 16, 8, 1)
_SIZES: Mapping[str, Mapping[tuple[int, int], _Numbers]] = {
  'a100': {(2, 128): (64, 32, 4, 2)} | _WIDE,
  'a40': {(2, 128): (64, 32, 4, 3)} | _WIDE,
  'h100': {(2, 128): (64, 64, 4, 2)} | _WIDE,
}
# By compute capability, where those of its like spill.
_ITS_OWN: Mapping[str, Mapping[tuple[int, int], _Numbers]] = {
  '10.0': {**_SIZES['h100'], (2, 256): (32, 16, 8, 2)}}
# What `implementation=None` of `api.write_kv` means, for pages of rows: one of
# `api.WRITERS`, by `scripts/gpu_check --stages=write`, which has not run yet.
_WRITER: Mapping[str, str] = {'a100': 'xla', 'a40': 'xla', 'h100': 'xla'}
# What `implementation=None` means, the first that can have the pages. It is for
# a measurement to put pallas_mosaic before pallas_triton on H100, and there is
# none yet: `scripts/gpu_check` has both in its sweep.
_FASTEST: Mapping[str, tuple[str, ...]] = {
  'a100': ('pallas_triton',), 'a40': ('pallas_triton',),
  'h100': ('pallas_triton', 'pallas_mosaic')}


def choose(shape: Shape) -> Sizes:
  """The sizes for a shape, on the default device.

  Those of the GPU in the tables that its multiprocessors are like, which is
  told by its compute capability. CPUs interpret the kernel.

  Raises:
    NotImplementedError: there are none for such a shape or device.
  """
  device = default_device()
  check_device(device)
  target, width = _target(device), jnp.dtype(shape.dtype).itemsize
  tuned = TUNED.get((measured_as(device), shape.dtype, shape.kv_dtype,
                     shape.group, shape.head_dim, shape.page_size))
  num_blocks = 2 * _multiprocessors(device)
  if tuned is not None:
    return Sizes(*tuned, num_blocks=num_blocks)
  if width == 4 and shape.kv_dtype != shape.dtype:
    return Sizes(*_CONVERTED, num_blocks=num_blocks)
  rows = _ITS_OWN.get(_capability(device), _SIZES[target])
  for (itemsize, head_dim), sizes in rows.items():
    if itemsize == width and shape.head_dim <= head_dim:
      return Sizes(*sizes, num_blocks=num_blocks)
  _check(width in (2, 4), 'dtype', shape.dtype,
         'must be float32, bfloat16 or float16')
  _check(False, 'head_dim', shape.head_dim, 'must be at most 256')
  raise AssertionError


# What is worth a try, the most promising first: of these, machine code has the
# fewest instructions a product (tiles of 128 rows by eight warps), or loads a
# block before the one at hand is done (three stages).
_CANDIDATES: tuple[_Numbers, ...] = (
  (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2),
  (64, 32, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2), (128, 32, 8, 2),
  (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 3),
  (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 2), (128, 32, 4, 3))


def candidates() -> Iterator[Sizes]:
  """What is worth a try on the default device, the most promising first."""
  num_blocks = 2 * _multiprocessors(default_device())
  for numbers in _CANDIDATES:
    yield Sizes(*numbers, num_blocks=num_blocks)


def check_device(device: Any) -> None:
  """Raises NotImplementedError if pallas_triton can't run there."""
  if device.platform == 'cpu':
    return
  _check(device.platform in ('gpu', 'cuda'), 'platform', device.platform,
         'must be gpu, or cpu to be interpreted')
  capability = str(getattr(device, 'compute_capability', ''))
  major = capability.partition('.')[0]
  _check(major.isdigit() and int(major) >= 8, 'compute_capability',
         capability, 'must be 8.0 or above')


def check_indices(pages: quantization.Pages) -> None:
  """Raises NotImplementedError if a kernel's offsets would overflow."""
  kept = quantization.values_of(pages)
  _check(kept.dtype.itemsize > 1 or kept.size < INDICES, 'k_pages',
         kept.shape, f'must be less than {INDICES} numbers of a byte')


def fastest() -> tuple[str, ...]:
  """The implementations for the default device, the fastest first."""
  return _FASTEST.get(measured_as(default_device()), ('pallas_triton',))


def writer() -> str:
  """What writes to pages of rows the fastest, on the default device."""
  return _WRITER.get(measured_as(default_device()), 'xla')


def _target(device: Any) -> str:
  return gpu_targets.alike(_capability(device))


def measured_as(device: Any) -> str:
  """The target whose measurements are its own, too; '' if none's are.

  Of the same multiprocessors, and not of those that have as much room.
  """
  target = _target(device)
  major, minor = gpu_targets.get(target).compute_capability
  return target if _capability(device) == f'{major}.{minor}' else ''


def _capability(device: Any) -> str:
  """Its compute capability, '9.0' where CUDA says '9.0a'; '' of a CPU."""
  return str(getattr(device, 'compute_capability', '')).rstrip('af')


def _multiprocessors(device: Any) -> int:
  """Of the device, if it says so: an H100 has 114 or 132."""
  count: int | None = getattr(device, 'core_count', None)
  if device.platform == 'cpu' or not count:
    return gpu_targets.get(_target(device)).multiprocessors
  return count


@dataclasses.dataclass(frozen=True, slots=True)
class MosaicSizes:
  """Tiles of `pallas_mosaic`.

  Attributes:
    block_n: keys of a block.
    num_stages: blocks of keys, and of values, that shared memory holds.
    heads: of the queries of a tile, which share their keys.
    queries: of a tile, for each of its heads.
    num_blocks: of the GPU's, that share the tiles.
    interpret: there is no GPU.
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
  """The sizes for a shape, on the default device.

  Raises:
    NotImplementedError: there are none for such a shape, device or JAX.
  """
  check = functools.partial(_check, who='pallas_mosaic')
  check(jax.__version_info__ >= MOSAIC_JAX, 'jax', jax.__version__,
        'must be 0.11 or newer')
  device = default_device()
  if not (interpret := device.platform == 'cpu'):
    capability = str(getattr(device, 'compute_capability', ''))
    check(capability in ('9.0', '9.0a'), 'compute_capability', capability,
          'must be 9.0, as Hopper\'s')
  check(shape.dtype in ('bfloat16', 'float16'), 'dtype', shape.dtype,
        'must be bfloat16 or float16')
  check(shape.kv_dtype == shape.dtype, 'kv_dtype', shape.kv_dtype,
        'must be bfloat16 or float16, as of the queries')
  check(shape.head_dim in MOSAIC, 'head_dim', shape.head_dim,
        f'must be one of {", ".join(map(str, MOSAIC))}')
  # Two warpgroups with 64 rows each.
  heads, queries = (1, 128) if shape.group % 2 else (2, 64)
  num_blocks = (
    _INTERPRETED_BLOCKS if interpret else _multiprocessors(device))
  return MosaicSizes(
    *MOSAIC[shape.head_dim], heads, queries, num_blocks, interpret)


def default_device() -> jax.Device:
  """Where a computation runs that does not say where."""
  config: Any = jax.config
  device = config.jax_default_device
  return jax.devices(device)[0] if device is None or isinstance(
    device, str) else device


def _check(ok: bool, name: str, value: object, rule: str,
           who: str = 'pallas_triton') -> None:
  if not ok:
    raise NotImplementedError(f'{who}: {name}={value}: {rule}.')


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()

# SPDX-License-Identifier: Apache-2.0
"""Rows in the registers of a warpgroup, for Mosaic's kernels.

A warpgroup has ROWS rows of a product: each thread has two neighbouring columns
of eight, of two rows that are eight apart. That is the layout of wgmma's
results (`plgpu.Layout.WGMMA`), and of mma's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS = 64  # of a warpgroup's product
STEP = 16  # columns of a left operand that an mma takes


def row_numbers() -> jax.Array:
  """Returns 0, 1, ... ROWS - 1, int32."""
  numbers: jax.Array = plgpu.broadcasted_iota(
    jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
  )
  return numbers


def along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats [ROWS] along the columns of `shape`."""
  return lax.broadcast_in_dim(x, shape, [0])


def mma_layout(operand: str, dtype: jax.typing.DTypeLike) -> Any:
  """Returns the layout of mma's left ('LHS') or right operand ('RHS')."""
  return getattr(plgpu.Layout, f'MMA_{operand}')(jnp.dtype(dtype))


def load_rows(
  ref: Any, places: jax.Array, interpret: bool, layout: Any = None
) -> Any:
  """Loads rows from the device's memory; returns [ROWS, n], or [ROWS].

  Args:
    ref: [N, n] or [N].
    places: [ROWS] int32, which rows.
    interpret: whether the kernel is interpreted.
    layout: of what is returned; None: as results of matmuls are laid out.
  """
  if interpret:
    return ref[...][places]
  of_rows = plgpu.Layout.WGMMA.reduce(1)
  shape = ROWS, *ref.shape[1:]
  layout = layout or (plgpu.Layout.WGMMA if len(shape) == 2 else of_rows)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), of_rows),
    return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
  )
  def load(context: Any, ref: Any, places: Any) -> Any:
    del context
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    laid_out = layout.to_mgpu()
    kind = laid_out.registers_element_type(ir.MemRefType(ref.type).element_type)
    loaded = [
      llvm.load(kind, pointer)
      for pointer in _pointers(ref, places, laid_out, shape)
    ]
    return array_of(loaded, laid_out, shape)

  return load(ref, places)


def store_rows(
  ref: Any, places: jax.Array, values: jax.Array, interpret: bool
) -> None:
  """Stores rows to the device's memory; rows of one place must be the same.

  Args:
    ref: [N, n] or [N].
    places: [ROWS] int32, which rows.
    values: [ROWS, n] or [ROWS], of the dtype of ref.
    interpret: whether the kernel is interpreted: then it is no store of these
      rows alone, and one warpgroup has to do it after the other.
  """
  if interpret:
    ref[...] = ref[...].at[places].set(values)
    return
  of_rows = plgpu.Layout.WGMMA.reduce(1)
  layout = plgpu.Layout.WGMMA if values.ndim == 2 else of_rows

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), of_rows, layout))
  def store(context: Any, ref: Any, places: Any, values: Any) -> None:
    del context
    from jaxlib.mlir.dialects import llvm

    pointers = _pointers(ref, places, values.layout, values.shape)
    for register, pointer in zip(values.registers.flat, pointers, strict=True):
      llvm.store(register, pointer)

  store(ref, places, values)


def _pointers(
  ref: Any, places: Any, layout: Any, shape: tuple[int, ...]
) -> Iterator[Any]:
  """Yields the address of each register of an array, in their order.

  The last thing that tells a thread's registers apart is the row, of two.

  Args:
    ref: MLIR's memref, [N, n] or [N].
    places: FragmentedArray [ROWS] int32, the row of ref of each row.
    layout: of the array.
    shape: of it, [ROWS, n] or [ROWS].
  """
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith as typed_arith
  from jaxlib.mlir.dialects import vector

  arith: Any = typed_arith  # Its types are those of another function.
  int32, int64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  (row_size, *_), _ = ir.MemRefType(ref.type).get_strides_and_offset()
  size = arith.constant(int32, row_size)
  starts = [
    arith.muli(
      vector.extract(
        register,
        dynamic_position=[],
        static_position=ir.DenseI64ArrayAttr.get([0]),
      ),
      size,
    )
    for register in places.registers.flat
  ]
  pointer = mgpu.utils.memref_ptr(ref)
  kind = ir.MemRefType(ref.type).element_type
  for i, index in enumerate(layout.thread_idxs(shape)):
    offset = starts[i % len(starts)]
    for column in index[1:]:
      offset = arith.addi(offset, arith.index_castui(int32, column))
    yield mgpu.utils.getelementptr(pointer, [arith.extsi(int64, offset)], kind)


def array_of(registers: Any, layout: Any, shape: tuple[int, ...]) -> Any:
  """Makes a FragmentedArray of registers, in the order of its layout."""
  from jax.experimental.mosaic import gpu as mgpu
  import numpy as np

  flat = np.empty(len(registers), dtype=object)
  flat[:] = registers
  return mgpu.FragmentedArray(
    _registers=flat.reshape(layout.registers_shape(shape)),
    _layout=layout,
    _is_signed=None,
  )

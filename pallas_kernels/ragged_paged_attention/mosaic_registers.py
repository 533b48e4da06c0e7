# SPDX-License-Identifier: Apache-2.0
"""What a warpgroup's registers do in Mosaic's kernels: softmax, rows, products.

A warpgroup keeps ROWS rows of queries: of scores, of weights and of sums each
thread has two neighbouring columns of eight, of two rows that are eight apart.
That is the layout of wgmma's results (`plgpu.Layout.WGMMA`), and of mma's.
Shape letters are those of `api`.
"""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import batch as batch_lib

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS = 64  # rows of queries in a warpgroup's matmul
STEP = 16  # columns of a left operand that an mma takes
MASKED = -1e30  # finite: the difference of two of them is no NaN
_LOG2_E = math.log2(math.e)


class State(NamedTuple):
  """The online softmax of a warpgroup's rows, float32.

  Attributes:
    acc: [ROWS, h], sums of weighted values.
    top: [ROWS], the highest scores.
    norm: [ROWS], sums of weights.
  """

  acc: Any
  top: Any
  norm: Any


def start(head_dim: int) -> State:
  """Returns the state of rows that have seen nothing."""

  def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    filled: jax.Array = plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), layout
    )
    return filled

  of_rows = plgpu.Layout.WGMMA.reduce(1)
  return State(
    full((ROWS, head_dim), 0.0, plgpu.Layout.WGMMA),
    full((ROWS,), MASKED, of_rows),
    full((ROWS,), 0.0, of_rows),
  )


def row_numbers() -> jax.Array:
  """Returns 0, 1, ... ROWS - 1, int32."""
  numbers: jax.Array = plgpu.broadcasted_iota(
    jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
  )
  return numbers


def along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats [ROWS] along the columns of `shape`."""
  return lax.broadcast_in_dim(x, shape, [0])


def factor(options: batch_lib.Options) -> float:
  """Returns what makes of a score of `weigh` a power of two."""
  return _LOG2_E * (options.soft_cap or options.scale)


def weigh(
  options: batch_lib.Options,
  scores: jax.Array,
  top: jax.Array,
  last: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes a block of keys into the online softmax.

  Args:
    options: of the attention.
    scores: [ROWS, block_n] float32, products of queries and keys.
    top: [ROWS] float32, the highest scores before, of `State`.
    last: [ROWS] int32, where in the block the last key is that a row sees,
      which may be before or after the block; None if all see all of it.

  Returns:
    The keys' weights, [ROWS, block_n]; what the sums so far are to be
    multiplied by, [ROWS]; and the new highest scores, [ROWS].
  """
  shape: Any = scores.shape
  if (cap := options.soft_cap) is not None:
    # tanh, whose own approximation is off by 2**-11.
    power = 2 * options.scale * _LOG2_E / cap
    scores = 1 - 2 / (jnp.exp2(scores * power) + 1)
  if last is not None:
    # The barrier keeps it from being computed once before the loop, and from
    # taking up 64 registers meanwhile.
    at = lax.optimization_barrier(
      plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    )
    scores = jnp.where(at <= along_rows(last, shape), scores, MASKED)
    if (window := options.sliding_window) is not None:
      scores = jnp.where(at > along_rows(last - window, shape), scores, MASKED)
  new_top = jnp.maximum(top, scores.max(axis=1))
  reached = new_top
  if last is not None:
    # Where a row sees nothing yet, its top's rounded product would not cancel.
    reached = jnp.where(new_top > MASKED, new_top, 0.0)
  # A product and a difference become one instruction.
  by = factor(options)
  shift = reached * by
  decay = jnp.exp2(top * by - shift)
  weights = jnp.exp2(scores * by - along_rows(shift, shape))
  return weights, decay, new_top


def mma_layout(operand: str, dtype: jax.typing.DTypeLike) -> Any:
  """Returns the layout of mma's left ('LHS') or right operand ('RHS')."""
  return getattr(plgpu.Layout, f'MMA_{operand}')(jnp.dtype(dtype))


def as_left_operands(weights: jax.Array) -> list[jax.Array]:
  """Returns [ROWS, n] of 16 bits as mma's left operands, of STEP columns each.

  What a thread has of 16 columns of scores are the registers, in their order,
  that mma wants of it: nothing is moved. Mosaic does not know that.
  """
  layout = mma_layout('LHS', weights.dtype)
  shape = ROWS, STEP
  count = weights.shape[1] // STEP
  kind = plgpu.ShapeDtypeStruct(shape, weights.dtype, layout=layout)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,), return_type=[kind] * count
  )
  def relabel(context: Any, x: Any) -> Any:
    del context
    return [
      _array(registers, layout.to_mgpu(), shape)
      for registers in x.registers.reshape(count, -1)
    ]

  pieces: list[jax.Array] = relabel(weights)
  return pieces


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
    return _array(loaded, laid_out, shape)

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


def _array(registers: Any, layout: Any, shape: tuple[int, ...]) -> Any:
  from jax.experimental.mosaic import gpu as mgpu
  import numpy as np

  flat = np.empty(len(registers), dtype=object)
  flat[:] = registers
  return mgpu.FragmentedArray(
    _registers=flat.reshape(layout.registers_shape(shape)),
    _layout=layout,
    _is_signed=None,
  )

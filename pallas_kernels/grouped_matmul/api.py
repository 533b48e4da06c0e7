# SPDX-License-Identifier: Apache-2.0
"""The function to call: a product of rows with the matrices of their groups.

Shape letters: R rows, G groups, T tokens that the rows are of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import coded
from pallas_kernels.grouped_matmul import pallas_mosaic
from pallas_kernels.grouped_matmul import pallas_triton
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tuning
from pallas_kernels.grouped_matmul import xla

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
  'reference': reference.grouped_matmul,
  'xla': xla.grouped_matmul,
  'pallas_triton': pallas_triton.grouped_matmul,
  'pallas_mosaic': pallas_mosaic.grouped_matmul,
}


def first(product: jax.Array) -> jax.Array:
  """Returns the one product there is."""
  return product


def grouped_matmul(
  x: jax.Array,
  matrices: Sequence[Any],
  group_sizes: jax.Array,
  *,
  rows: jax.Array | None = None,
  biases: Sequence[jax.Array] = (),
  combine: Callable[..., jax.Array] = first,
  matmul: Callable[[jax.Array, Any], jax.Array] | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies each row by its group's matrix, of one or several kinds.

  Rows lie group after group (`group` brings them into that order). No matrix of
  a group without rows is read. What a row's result is depends on no other row,
  nor on where it lies, but for the order of its sums: that may be another for
  another number of rows, R, or of tokens, T; never for other groups' sizes.

  Worked example: x=[[1], [2], [3]], matrices=[[[[10]], [[100]]]] and
  group_sizes=[1, 1] -> [[10], [200], [undefined]].

  Args:
    x: [T, in].
    matrices: of one kind, or of several, such as gate and up. Each is an array
      [G, in, out]; or, with `matmul`, a tree of arrays with G in front; with
      `Coded`, a `quantized_matmul.Operand`.
    group_sizes: [G] int32; their sum is at most R.
    rows: [R] int32, which row of x each one is; None: those of x, and R is T.
      A group has none of them twice.
    biases: of each kind, [G, out] float, what is added to its products before
      they are combined; none: nothing is.
    combine: makes the result of the kinds' products, number by number, all in
      float32.
    matmul: multiplies rows [n, in] by the tree of one group, in float32; or
      `Coded`, of which kernels multiply by the codes as they are. None where
      matrices are arrays.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here.

  Returns:
    [R, out], in x's dtype. Rows of no group, which come last, are undefined.

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
    NotImplementedError: the implementation can't run here.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{implementation=}: must be None or one of {", ".join(IMPLEMENTATIONS)}.'
    )
  x, matrices, biases = jax.tree.map(
    jnp.asarray, (x, tuple(matrices), tuple(biases))
  )
  _check(x.ndim == 2, 'x', x.shape, 'must have 2 axes')
  for name, indices in (('group_sizes', group_sizes), ('rows', rows)):
    if indices is not None:
      _check(
        indices.ndim == 1 and indices.dtype == jnp.int32,
        name,
        f'{indices.dtype}{indices.shape}',
        'must be int32, of 1 axis',
      )
  (num_groups,) = group_sizes.shape
  for name, arrays in (('matrices', matrices), ('biases', biases)):
    for leaf in jax.tree.leaves(arrays):
      _check(
        leaf.shape[:1] == (num_groups,),
        name,
        leaf.shape,
        f'must begin with the number of groups, {num_groups}',
      )
  _check(
    len(biases) in (0, len(matrices)),
    'biases',
    len(biases),
    f'must be none, or one of each kind of matrices, {len(matrices)}',
  )
  if isinstance(matmul, coded.Coded):
    matmul.check(matrices, num_groups, x.shape[1])
  elif matmul is None:
    for w in matrices:
      _check(
        w.ndim == 3 and w.shape[1] == x.shape[1] and w.dtype == x.dtype,
        'matrices',
        f'{w.dtype}{w.shape}',
        f'must be {x.dtype}[{num_groups}, {x.shape[1]}, ...]',
      )
  else:
    _check(
      implementation not in ('pallas_triton', 'pallas_mosaic'),
      'matmul',
      matmul,
      f'must be None or Coded with {implementation=}',
    )
  if rows is None:
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
  if implementation is None:
    implementation = tuning.fastest(x, matrices, rows, matmul)
  return _multiply(
    implementation,
    combine,
    matmul or float32_matmul,
    x,
    matrices,
    biases,
    group_sizes,
    rows,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(
  implementation: str,
  combine: Callable[..., jax.Array],
  matmul: Callable[[jax.Array, Any], jax.Array],
  x: jax.Array,
  matrices: tuple[Any, ...],
  biases: tuple[jax.Array, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
) -> jax.Array:
  return IMPLEMENTATIONS[implementation](
    x, matrices, group_sizes, rows, combine, matmul, biases
  )


def _forward(implementation: str, combine: Any, matmul: Any, *args: Any) -> Any:
  return _multiply(implementation, combine, matmul, *args), args


def _backward(
  implementation: str, combine: Any, matmul: Any, args: Any, gradient: jax.Array
) -> Any:
  del implementation  # Only one can be differentiated.
  x, matrices, biases, group_sizes, rows = args
  if isinstance(matmul, coded.Coded):
    matmul = matmul.differentiable()
  _, pull = jax.vjp(
    lambda x, matrices, biases: xla.grouped_matmul(
      x,
      matrices,
      group_sizes,
      rows,
      combine,
      matmul,
      biases,
      differentiable=True,
    ),
    x,
    matrices,
    biases,
  )
  return *pull(gradient), None, None


_multiply.defvjp(_forward, _backward)


def float32_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns x @ w, summed in float32."""
  return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _check(ok: bool, name: str, value: object, rule: str) -> None:
  if not ok:
    raise ValueError(f'{name}={value}: {rule}.')

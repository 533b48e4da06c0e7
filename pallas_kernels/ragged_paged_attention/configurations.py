# SPDX-License-Identifier: Apache-2.0
"""Every tuned and default configuration, to be compiled for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_devices
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention import arg_specs
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import tuning


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    name: for people.
    function: the function to jit.
    args: its positional arguments, trees of ShapeDtypeStruct.
  """

  name: str
  function: Any
  args: Any


# All models are compiled in bfloat16; in other dtypes, one of each head dim.
_DTYPES: Mapping[str, tuple[str, ...]] = {
  'mistral-7b': ('float16',),
  'falcon-7b': ('float32',),
  'phi-2': ('float32',),
  'h96': ('float32',),
}
_WITH_SINKS = ('gpt-oss-20b',)
_OF_EACH_HEAD_DIM = ('mistral-7b', 'falcon-7b', 'phi-2', 'h96', 'gemma-7b')


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name. The
  plan is an argument of a case: it has no kernel of ours, and whole steps
  compile it.
  """
  for name, (heads, kv_heads, head_dim) in arg_specs.HEADS.items():
    plain = batch_lib.Options(head_dim**-0.5)
    special = batch_lib.Options(head_dim**-0.5, 4096, 30.0)
    if name in _WITH_SINKS:
      case = functools.partial(_case, name, heads, kv_heads, head_dim)
      yield case(plain, sinks=True)
      yield case(dataclasses.replace(plain, sliding_window=128), sinks=True)
      for kept in ('int8', 'float8_e4m3fn'):
        yield case(plain, kv_dtype=kept, sinks=True)
      yield case(plain, 'float32', sinks=True)
      continue
    yield _case(name, heads, kv_heads, head_dim, plain)
    yield _case(name, heads, kv_heads, head_dim, plain, kv_dtype='int8')
    if name in _OF_EACH_HEAD_DIM:  # It differs little from int8.
      yield _case(
        name, heads, kv_heads, head_dim, plain, kv_dtype='float8_e4m3fn'
      )
    if name in ('mistral-7b', 'gemma-7b'):
      for options in (
        special,
        dataclasses.replace(special, batch_invariant=True),
      ):
        yield _case(name, heads, kv_heads, head_dim, options)
      for kept in ('int8', 'float8_e4m3fn'):
        yield _case(name, heads, kv_heads, head_dim, special, kv_dtype=kept)
      for options in (plain, special):
        yield _case(name, heads, kv_heads, head_dim, options, 'float32')
    for dtype in _DTYPES.get(name, ()):
      yield _case(name, heads, kv_heads, head_dim, plain, dtype)
    if name == 'mistral-7b':  # Larger pages than a block change no block.
      for page_size in (16, 32):
        for small in (None, 'int8', 'float8_e4m3fn'):
          yield _case(
            name,
            heads,
            kv_heads,
            head_dim,
            plain,
            kv_dtype=small,
            page_size=page_size,
          )
      for dtype in ('float16', 'float32'):
        yield _case(name, heads, kv_heads, head_dim, plain, dtype, page_size=16)
        for kept in ('int8', 'float8_e4m3fn'):
          yield _case(name, heads, kv_heads, head_dim, plain, dtype, kept)
  for target, dtype, kept, group, head_dim, page_size in dict.fromkeys(
    key[1:] for key in tuning.TUNED
  ):
    if target == device:
      yield _case(
        f'tuned {group} {head_dim}',
        4 * group,
        4,
        head_dim,
        batch_lib.Options(head_dim**-0.5),
        dtype,
        None if kept == dtype else 'float8_e4m3fn' if kept == 'uint8' else kept,
        page_size=page_size,
      )
  if mosaic_devices.has_kernels():
    yield from mosaic_cases()


def mosaic_cases() -> Iterator[Case]:
  """Yields the cases of pallas_mosaic, which need a recent enough JAX."""
  case = functools.partial(_case, implementation='pallas_mosaic')
  for name, sizes in arg_specs.HEADS.items():
    *_, head_dim = sizes
    if head_dim not in tuning.MOSAIC or name in _WITH_SINKS:
      continue
    scale = head_dim**-0.5
    yield case(name, *sizes, batch_lib.Options(scale))
    if name == 'mistral-7b':
      yield case(name, *sizes, batch_lib.Options(scale, 4096))
    # For each head dim, tiles of two heads and of one.
    if name in ('mistral-7b', 'llama2-7b', 'llama3.2-1b', 'falcon-7b'):
      yield case(name, *sizes, batch_lib.Options(scale, 4096, 30.0))
    # Pages of parts of a block, and of several.
    if name in ('mistral-7b', 'llama3.2-1b'):
      for page_size in (2048 // head_dim, 256):  # Ampere's has none smaller.
        yield case(
          name, *sizes, batch_lib.Options(scale), 'float16', page_size=page_size
        )


def _case(
  model: str,
  heads: int,
  kv_heads: int,
  head_dim: int,
  options: batch_lib.Options,
  dtype: str = 'bfloat16',
  kv_dtype: str | None = None,
  implementation: str = 'pallas_triton',
  page_size: int = 64,
  *,
  sinks: bool = False,
) -> Case:
  pages = jax.eval_shape(
    lambda: layout.init(
      layout.ROWS, 1024, page_size, kv_heads, head_dim, kv_dtype or dtype
    )
  )
  ints: Any = [
    jax.ShapeDtypeStruct(shape, jnp.int32)
    for shape in ((128,), (128, 128), (129,), (2,))
  ]
  q = jax.ShapeDtypeStruct((512, heads, head_dim), dtype)
  batch = batch_lib.Batch(*ints)
  plan = jax.eval_shape(
    functools.partial(
      api.make_plan,
      sliding_window=options.sliding_window,
      batch_invariant=options.batch_invariant,
      has_sinks=sinks,
      implementation=implementation,
    ),
    q,
    pages[0],
    batch.kv_lens,
    batch.cu_q_lens,
    batch.distribution,
  )
  what = [
    model,
    dtype,
    *([f'KV {kv_dtype}'] if kv_dtype else []),
    *([f'pages of {page_size}'] if page_size != 64 else []),
    *(['window'] if options.sliding_window else []),
    *(['cap'] if options.soft_cap else []),
    *(['sinks'] if sinks else []),
    *(['invariant'] if options.batch_invariant else []),
    *(['Mosaic'] if implementation == 'pallas_mosaic' else []),
  ]

  def attend(*args: Any) -> jax.Array:
    *arrays, plan, more = args
    return api.IMPLEMENTATIONS[implementation](
      *arrays, options=options, plan=plan, **more
    )

  more = {'sinks': jax.ShapeDtypeStruct((heads,), jnp.float32)} if sinks else {}
  return Case(' '.join(what), attend, (q, *pages, batch, plan, more))

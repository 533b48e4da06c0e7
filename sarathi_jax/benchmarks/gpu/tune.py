# SPDX-License-Identifier: Apache-2.0
"""Measures what the tables of the kernels' `tuning` need of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import add_and_norm
from pallas_kernels import filter_threshold
from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels import rotate_and_write
from pallas_kernels.filter_threshold import arg_specs as filter_specs
from pallas_kernels.filter_threshold import pallas_triton as filter_kernel
from pallas_kernels.filter_threshold import tuning as filter_tuning
from pallas_kernels.ragged_paged_attention import tuning
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import timing


def writes(
  journal: journal_lib.Journal,
  sweep: attention.Sweep,
  num_tokens: tuple[int, ...],
) -> None:
  """Times the ways to rotate, and to put keys and values into their pages.

  Of a merged projection, in place. Plain XLA, should it win, goes into
  `rotate_and_write.tuning._FASTEST`.

  Args:
    journal: as for `attention.run`.
    sweep: the shape of queries and pages.
    num_tokens: tokens of a step, for each measurement.
  """
  shape = sweep.page_size, sweep.num_kv_heads, sweep.head_dim
  heads = sweep.num_heads, sweep.num_kv_heads, sweep.num_kv_heads
  *ends, width = (n * sweep.head_dim for n in itertools.accumulate(heads))
  num_slots = sweep.pool_tokens // sweep.page_size * sweep.page_size

  def row(kept: str, tokens: int, name: str) -> journal_lib.Row:
    pages = rpa.init_pages(
      num_slots // sweep.page_size, *shape, kept, 'pallas_triton'
    )
    slots = jnp.asarray(
      np.random.default_rng(0)
      .permutation(num_slots)[: sweep.calls * tokens]
      .reshape(-1, tokens),
      jnp.int32,
    )
    # Each call has a projection of its own, as each layer: of equal ones XLA
    # would round those of all calls at once.
    new = jax.random.normal(
      jax.random.key(0), (sweep.calls, tokens, width), sweep.dtype
    )
    angles = jax.random.normal(jax.random.key(1), (tokens, sweep.head_dim // 2))
    rotation = jnp.cos(angles), jnp.sin(angles)

    def chain(
      pages: Any, new: jax.Array, slots: jax.Array, rotation: Any
    ) -> Any:
      rotated = []
      k_pages, v_pages = pages
      for merged, mine in zip(new, slots, strict=True):
        q, k, v = (
          x.reshape(tokens, -1, sweep.head_dim)
          for x in jnp.split(merged, ends, axis=1)
        )
        q, (k_pages, v_pages) = rotate_and_write.rotate_and_write(
          q, k, v, rotation, k_pages, v_pages, mine, implementation=name
        )
        rotated.append(q)
      return (k_pages, v_pages), rotated

    run = jax.jit(chain, donate_argnums=0)
    kept_pages = [pages]

    def once() -> Any:
      kept_pages[0], rotated = run(kept_pages[0], new, slots, rotation)
      return rotated

    took = timing.seconds(once) / sweep.calls
    return {'kept': kept, 'new': tokens, 'by': name, 'us': took * 1e6}

  for kept, tokens, name in itertools.product(
    (sweep.dtype, 'int8'), num_tokens, ('xla', 'pallas_triton')
  ):
    journal.measure(
      f'{kept} {tokens} {name}', functools.partial(row, kept, tokens, name)
    )


def norms(
  journal: journal_lib.Journal,
  sweep: attention.Sweep,
  num_tokens: tuple[int, ...],
) -> None:
  """Times the ways to add to the residual stream, and to normalize it.

  Each call adds to the sum of the one before, as layers do. Plain XLA, should
  it win, goes into `add_and_norm.tuning._FASTEST`.

  Args:
    journal: as for `attention.run`.
    sweep: the shape; a row is as wide as all heads of its queries.
    num_tokens: tokens of a step, for each measurement.
  """
  width = sweep.num_heads * sweep.head_dim

  def row(tokens: int, name: str) -> journal_lib.Row:
    drawn = jax.random.normal(
      jax.random.key(0), (sweep.calls + 1, tokens, width), sweep.dtype
    )
    weight = jnp.ones(width, sweep.dtype)

    @jax.jit
    def chain(drawn: jax.Array, weight: jax.Array) -> Any:
      x, *outs = drawn
      normed = []
      for out in outs:
        x, each = add_and_norm.add_and_norm(
          x, out, weight, eps=1e-5, implementation=name
        )
        normed.append(each)
      return x, normed

    took = timing.seconds(lambda: chain(drawn, weight)) / sweep.calls
    return {'new': tokens, 'by': name, 'us': took * 1e6}

  for tokens, name in itertools.product(num_tokens, ('xla', 'pallas_triton')):
    journal.measure(
      f'norm {tokens} {name}', functools.partial(row, tokens, name)
    )


def sizes(
  journal: journal_lib.Journal, sweep: attention.Sweep, most: int | None = None
) -> None:
  """Times pallas_triton with sizes that are worth a try, for each kernel.

  Sizes that can't be compiled, as shared memory does not suffice, are absent.
  The winners go into `tuning.TUNED`, under the sweep's shape; CI then compiles
  them to look for spills.

  Args:
    journal: as for `attention.run`.
    sweep: the shape, and batches that count alike.
    most: number of sizes to try, the most promising first; None: all.
  """
  shape = sweep.shape
  tried = {
    kind: tuple(itertools.islice(tuning.candidates(kind, shape), most))
    for kind in tuning.KINDS
  }
  kernel = functools.cache(
    lambda: attention.Kernel(
      sweep,
      'pallas_triton',
      [sizes for of_kind in tried.values() for _, sizes in of_kind],
    )
  )

  def row(
    batch: attention.Batch, about: journal_lib.Row, sizes: tuning.Sizes
  ) -> journal_lib.Row:
    try:
      took = kernel().seconds(batch, sizes)
    except Exception as error:
      return about | journal_lib.absent(error)
    return {'batch': batch.name, **about, 'us': took * 1e6}

  for kind, of_kind in tried.items():
    for (numbers, sizes), batch in itertools.product(of_kind, sweep.batches):
      if batch.has(kind):
        about = {'kernel': kind} | dict(
          zip(tuning.NUMBERS, numbers, strict=True)
        )
        journal.measure(
          f'{batch.name}: {kind} {", ".join(map(str, numbers))}',
          functools.partial(row, batch, about, sizes),
        )


def filters(
  journal: journal_lib.Journal,
  shapes: tuple[tuple[int, int], ...],
  most: int,
) -> None:
  """Times what finds the threshold of top-k and top-p.

  Of rows that keep few tokens, and of rows that keep many. The sizes that win
  go into `filter_threshold.tuning._SIZES`; plain XLA, should it win, into
  `_FASTEST`.

  Args:
    journal: as for `attention.run`.
    shapes: rows and tokens of the logits.
    most: number of sizes to try, the default ones among them.
  """
  ways: Mapping[str, Callable[..., jax.Array]] = {
    name: jax.jit(
      functools.partial(filter_threshold.least_kept, implementation=name)
    )
    for name in ('pallas_triton', 'xla')
  } | {
    str(dataclasses.astuple(sizes)): jax.jit(
      functools.partial(filter_kernel.least_kept, sizes=sizes)
    )
    for sizes in filter_tuning.CANDIDATES[: most - 1]
  }

  def row(spec: filter_specs.ArgSpec, by: str) -> journal_lib.Row:
    args = [jnp.asarray(x) for x in filter_specs.make(spec)]
    took = timing.seconds(lambda: ways[by](*args))
    return {**dataclasses.asdict(spec), 'by': by, 'us': took * 1e6}

  for (rows, vocab_size), by, kind in itertools.product(
    shapes, ways, ('normal', 'flat')
  ):
    spec = filter_specs.ArgSpec(kind, rows, vocab_size)
    journal.measure(
      f'{kind} {rows} x {vocab_size} {by}', functools.partial(row, spec, by)
    )

# SPDX-License-Identifier: Apache-2.0
"""Times the implementations on the specs of `arg_specs`.

Example:
  python -m pallas_kernels.ragged_paged_attention.bench \
    --specs=decode_43m,prefill_43m --implementations=xla --layers=12

A row is the time of one call of each layer, with a cache of its own, so that
a batch's keys and values don't stay in the processor's caches. Specs and
implementations take turns, and the least time counts, for a busy machine only
ever adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from pallas_kernels import attention_work
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import arg_specs

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags; not on import, when others may have these names."""
  flags.DEFINE_list(
    'specs',
    [spec.name for spec in arg_specs.BENCHMARKS],
    'Batches to time, by their names in arg_specs.',
  )
  flags.DEFINE_list(
    'implementations',
    ['xla'],
    'Implementations to time, of '
    f'{", ".join(sorted(api.IMPLEMENTATIONS))}; the reference can not be '
    'jitted.',
  )
  flags.DEFINE_integer(
    'layers',
    12,
    'Calls of the attention in a timed step, each with its own pages.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'repeats', 20, 'Steps to time, of which the fastest counts.', lower_bound=1
  )
  flags.DEFINE_string(
    'output', '', 'File to write the results to, as JSON; none by default.'
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
  """One measurement.

  Attributes:
    spec: name of the batch.
    implementation: name of the implementation.
    ms: milliseconds of all layers.
    gb_per_s: keys and values that had to be read, over the time.
    gflop_per_s: multiplications and additions that had to be done, likewise.
    compile_s: seconds to trace and compile.
  """

  spec: str
  implementation: str
  ms: float
  gb_per_s: float
  gflop_per_s: float
  compile_s: float


def work(spec: arg_spec.ArgSpec) -> tuple[int, int]:
  """Returns the bytes of keys and values, and the operations, of one call."""
  window = spec.sliding_window
  rows = pairs = 0
  for context, q_len in zip(spec.contexts, spec.all_q_lens, strict=True):
    pairs += attention_work.num_pairs(context - q_len, q_len, window)
    rows += attention_work.num_keys(context - q_len, q_len, window)
  return (
    rows
    * attention_work.token_bytes(
      spec.num_kv_heads, spec.head_dim, spec.kv_dtype or spec.dtype
    ),
    pairs * attention_work.pair_flops(spec.num_heads, spec.head_dim),
  )


def _step(
  spec: arg_spec.ArgSpec,
  implementation: str,
  layers: int,
) -> tuple[Callable[[], Any], float]:
  """Compiles a step of all layers; returns it, and the seconds it took."""
  arrays = arg_spec.make(spec)
  pages = api.pages_from_rows(
    arrays.pop('k_pages'), arrays.pop('v_pages'), implementation
  )
  caches = jax.block_until_ready(
    [jax.tree.map(jnp.copy, pages) for _ in range(layers)]
  )
  attend = functools.partial(
    api.ragged_paged_attention, implementation=implementation, **spec.options
  )

  def step(arrays: dict[str, jax.Array], caches: Any) -> jax.Array:
    q = arrays['q']
    for k_pages, v_pages in caches:  # each waits for the one before
      q += attend(**(arrays | dict(q=q, k_pages=k_pages, v_pages=v_pages)))
    return q

  start = time.perf_counter()
  compiled = jax.jit(step).lower(arrays, caches).compile()
  seconds = time.perf_counter() - start
  return functools.partial(compiled, arrays, caches), seconds


def run(
  specs: Sequence[arg_spec.ArgSpec],
  implementations: Sequence[str],
  layers: int,
  repeats: int,
) -> list[Row]:
  """Measures every spec with every implementation."""
  steps = {
    (spec, name): _step(spec, name, layers)
    for spec in specs
    for name in implementations
  }
  best = dict.fromkeys(steps, float('inf'))
  for _ in range(repeats):
    for key, (step, _) in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step())
      best[key] = min(best[key], time.perf_counter() - start)
  rows = []
  for (spec, name), seconds in best.items():
    num_bytes, operations = (n * layers for n in work(spec))
    rows.append(
      Row(
        spec=spec.name,
        implementation=name,
        ms=seconds * 1e3,
        gb_per_s=num_bytes / seconds / 1e9,
        gflop_per_s=operations / seconds / 1e9,
        compile_s=steps[spec, name][1],
      )
    )
  return rows


def main(argv: Sequence[str]) -> None:
  """Prints a table, and writes JSON if asked."""
  if len(argv) > 1:
    raise app.UsageError(f'{argv[1]}: takes flags only.')
  unknown = sorted(set(FLAGS.specs) - set(arg_specs.BY_NAME))
  if unknown:
    raise app.UsageError(
      f'--specs={",".join(unknown)}: not among '
      f'{", ".join(sorted(arg_specs.BY_NAME))}.'
    )
  rows = run(
    [arg_specs.BY_NAME[name] for name in FLAGS.specs],
    FLAGS.implementations,
    FLAGS.layers,
    FLAGS.repeats,
  )
  print(
    f'{"spec":18} {"implementation":15} {"ms":>9} {"GB/s":>7} '
    f'{"GFLOP/s":>8} {"compile s":>9}'
  )
  for r in rows:
    print(
      f'{r.spec:18} {r.implementation:15} {r.ms:9.2f} {r.gb_per_s:7.1f} '
      f'{r.gflop_per_s:8.1f} {r.compile_s:9.1f}'
    )
  if FLAGS.output:
    pathlib.Path(FLAGS.output).write_text(
      json.dumps(
        {
          'device': jax.devices()[0].device_kind,
          'jax': jax.__version__,
          'layers': FLAGS.layers,
          'repeats': FLAGS.repeats,
          'rows': [dataclasses.asdict(row) for row in rows],
        },
        indent=2,
      )
      + '\n'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)

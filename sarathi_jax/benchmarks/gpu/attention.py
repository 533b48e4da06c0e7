# SPDX-License-Identifier: Apache-2.0
"""Times the attention kernel at many points, against the device's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent import futures
import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention_work
from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.ragged_paged_attention import arg_specs
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import pallas_triton
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import tuning
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import timing

_HEADS = arg_specs.HEADS['mistral-7b']
_TORCH_WORKER = (
  pathlib.Path(__file__).parents[1] / 'peer_workers' / 'torch_sdpa.py'
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
  """What is swept over.

  Attributes:
    batches: the points.
    compared: names of the points at which others' attention is timed, too.
    num_heads, num_kv_heads, head_dim, dtype: the model's; Mistral-7B's.
    kv_dtype: dtype of the cache, if it is quantized.
    pool_tokens: tokens in the cache; a batch of more meets its pages again,
      gigabytes later.
    calls: calls in a program, each on pages of its own, as a model's layers
      are; to launch one costs as much as a short call.
  """

  batches: tuple[Batch, ...]
  compared: tuple[str, ...] = ()
  num_heads: int = _HEADS[0]
  num_kv_heads: int = _HEADS[1]
  head_dim: int = _HEADS[2]
  dtype: str = 'bfloat16'
  kv_dtype: str | None = None
  page_size: int = 64
  pool_tokens: int = 2**21
  calls: int = 8

  @property
  def shape(self) -> tuning.Shape:
    """What kernels are compiled for."""
    return tuning.Shape(
      self.dtype,
      quantization.kept_dtype(self.kv_dtype or self.dtype).name,
      self.num_kv_heads,
      self.num_heads // self.num_kv_heads,
      self.head_dim,
      self.page_size,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
  """One point: decodes, and at most one chunk."""

  kind: str
  decodes: int
  context: int
  chunk: int
  before: int

  @property
  def name(self) -> str:
    parts = [f'{self.decodes} x {self.context}'] if self.decodes else []
    parts += [f'{self.chunk} after {self.before}'] if self.chunk else []
    return f'{self.kind} {" + ".join(parts)}'

  @property
  def num_tokens(self) -> int:
    return self.decodes + self.chunk

  def has(self, kind: str) -> bool:
    """Says whether there is work for a kernel, of `tuning.KINDS`."""
    return bool(self.decodes if kind == 'small' else self.chunk)

  @property
  def lens(self) -> list[int]:
    chunk = [self.before + self.chunk] if self.chunk else []
    return [self.context] * self.decodes + chunk

  def kv_bytes(self, sweep: Sweep) -> int:
    """Counts the bytes of keys and values that must be read at least once."""
    return sum(self.lens) * attention_work.token_bytes(
      sweep.num_kv_heads, sweep.head_dim, sweep.kv_dtype or sweep.dtype
    )

  def flops(self, sweep: Sweep) -> int:
    """Counts operations of the pairs of query and key that causality leaves."""
    pairs = self.decodes * self.context + attention_work.num_pairs(
      self.before, self.chunk
    )
    return pairs * attention_work.pair_flops(sweep.num_heads, sweep.head_dim)


def decodes(*pairs: tuple[int, int]) -> tuple[Batch, ...]:
  """Makes points of (sequences, context)."""
  return tuple(Batch('decode', n, context, 0, 0) for n, context in pairs)


def prefills(*pairs: tuple[int, int]) -> tuple[Batch, ...]:
  """Makes points of (tokens of the chunk, context before it)."""
  return tuple(Batch('prefill', 0, 0, n, before) for n, before in pairs)


def hybrids(*batches: tuple[int, int, int, int]) -> tuple[Batch, ...]:
  """Makes points of (decodes, their context, chunk, before it), and parts."""
  return tuple(
    itertools.chain.from_iterable(
      (
        Batch('hybrid', n, context, chunk, before),
        Batch('part', n, context, 0, 0),
        Batch('part', 0, 0, chunk, before),
      )
      for n, context, chunk, before in batches
    )
  )


class Kernel:
  """The kernel on a cache.

  Args:
    sweep: the cache, and the batches that it will be run with.
    implementation: name of the attention's implementation.
    tried: sizes of tiles that it is run with; None: those of the table.
  """

  def __init__(
    self,
    sweep: Sweep,
    implementation: str,
    tried: Iterable[tuning.Sizes | None] = (None,),
  ) -> None:
    self.sweep = sweep
    self._implementation = implementation
    num_pages = -(-sweep.pool_tokens // sweep.page_size)
    shape = (num_pages, sweep.page_size, sweep.num_kv_heads, sweep.head_dim)
    zeros, tree = jax.tree.flatten(
      rpa.init_pages(*shape, sweep.kv_dtype or sweep.dtype, implementation)
    )
    self._pages = jax.tree.unflatten(
      tree,
      [
        jax.jit(functools.partial(_random, x.shape, x.dtype))(jax.random.key(i))
        for i, x in enumerate(zeros)
      ],
    )
    self._order = np.random.default_rng(0).permutation(num_pages)
    self._pages_per_seq = -(
      -max(max(b.lens) for b in sweep.batches) // sweep.page_size
    )
    # Compiled several at a time, and all before the first is timed, which is
    # to have the host for itself.
    with futures.ThreadPoolExecutor(max_workers=4) as pool:
      self._programs = {
        (tokens, rows, sizes): pool.submit(self._compile, batch, sizes)
        for sizes in tried
        for (tokens, rows), batch in {
          _rows_of(batch): batch for batch in sweep.batches
        }.items()
      }

  def arguments(self, batch: Batch) -> tuple[Any, ...]:
    lens = batch.lens
    tokens, rows = _rows_of(batch)
    tables = np.zeros((self.sweep.calls, rows, self._pages_per_seq), np.int32)
    at = 0
    for table in tables:
      for row, n in zip(table, lens, strict=False):
        count = -(-n // self.sweep.page_size)
        # Pages of the pool in a shuffled order, around if it ends.
        row[:count] = self._order[np.arange(at, at + count) % len(self._order)]
        at += count
    kv_lens = np.zeros(rows, np.int32)
    kv_lens[: len(lens)] = lens
    starts = np.full(rows + 1, batch.num_tokens, np.int32)
    starts[: batch.decodes + 1] = np.arange(batch.decodes + 1)
    q = jax.random.normal(
      jax.random.key(2),
      (tokens, self.sweep.num_heads, self.sweep.head_dim),
      self.sweep.dtype,
    )
    return (
      q,
      *self._pages,
      *map(
        jnp.asarray,
        (
          kv_lens,
          tables,
          starts,
          np.array([batch.decodes, len(lens)], np.int32),
        ),
      ),
    )

  def seconds(self, batch: Batch, sizes: tuning.Sizes | None = None) -> float:
    """Times a call; raises what compiling it raised."""
    run = self._programs[*_rows_of(batch), sizes].result()
    arguments = self.arguments(batch)
    return timing.seconds(lambda: run(*arguments)) / self.sweep.calls

  def _compile(self, batch: Batch, sizes: tuning.Sizes | None) -> Any:
    scale = self.sweep.head_dim**-0.5
    chain = (
      functools.partial(
        _chain,
        scale=scale,
        implementation=self._implementation,
      )
      if sizes is None
      else functools.partial(_chain_of, sizes, batch_lib.Options(scale))
    )
    return jax.jit(chain).lower(*self.arguments(batch)).compile()


def _rows_of(batch: Batch) -> tuple[int, int]:
  """Returns padded tokens and sequences, which a program is compiled for."""
  return max(8, batch.num_tokens), max(8, len(batch.lens))


def _random(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
  if jnp.issubdtype(dtype, jnp.integer):
    return jax.random.randint(key, shape, 0, 100, dtype)
  return jax.random.normal(key, shape, dtype)


def _chain(
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  kv_lens: jax.Array,
  tables: jax.Array,
  starts: jax.Array,
  distribution: jax.Array,
  *,
  implementation: str,
  **options: Any,
) -> jax.Array:
  """Chains attention to attention's output by one plan, as model layers do."""
  plan = rpa.make_plan(
    q, k_pages, kv_lens, starts, distribution, implementation=implementation
  )
  for table in tables:
    q = rpa.ragged_paged_attention(
      q,
      k_pages,
      v_pages,
      kv_lens,
      table,
      starts,
      distribution,
      plan=plan,
      implementation=implementation,
      **options,
    )
  return q


def _chain_of(
  sizes: tuning.Sizes,
  options: batch_lib.Options,
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  kv_lens: jax.Array,
  tables: jax.Array,
  starts: jax.Array,
  distribution: jax.Array,
) -> jax.Array:
  """Chains as `_chain`, by pallas_triton with these sizes."""
  for table in tables:
    batch = batch_lib.Batch(kv_lens, table, starts, distribution)
    q = pallas_triton.ragged_paged_attention(
      q, k_pages, v_pages, batch, options, sizes=sizes
    )
  return q


def dense_seconds(sweep: Sweep, batch: Batch, implementation: str) -> float:
  """Times jax.nn.dot_product_attention on contiguous keys, for comparison.

  All calls read the same keys: few keys stay in the device's cache, which ours
  have to leave, as they do in a model.
  """
  rows, q_len = (batch.decodes, 1) if batch.decodes else (1, batch.chunk)
  q, k, v = (
    jax.random.normal(
      jax.random.key(i), (rows, n, heads, sweep.head_dim), sweep.dtype
    )
    for i, (n, heads) in enumerate(
      (
        (q_len, sweep.num_heads),
        (batch.lens[0], sweep.num_kv_heads),
        (batch.lens[0], sweep.num_kv_heads),
      )
    )
  )

  def chain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    attend: Any = jax.nn.dot_product_attention
    for _ in range(sweep.calls):
      q = attend(q, k, v, is_causal=q_len > 1, implementation=implementation)
    return q

  run = jax.jit(chain)
  return timing.seconds(lambda: run(q, k, v)) / sweep.calls


def run(
  journal: journal_lib.Journal,
  sweep: Sweep,
  limits: Mapping[str, float],
  implementation: str,
  dense: str | None = None,
) -> None:
  """Measures all points.

  Args:
    journal: takes the rows, and has those of an earlier run.
    sweep: the points.
    limits: results of `timing.limits` on this device.
    implementation: name of the attention's implementation.
    dense: implementation of jax.nn.dot_product_attention to compare; None:
      compare with none.
  """
  kernel = functools.cache(lambda: Kernel(sweep, implementation))

  def row(batch: Batch) -> journal_lib.Row:
    took = kernel().seconds(batch)
    num_bytes, flops = batch.kv_bytes(sweep), batch.flops(sweep)
    return {
      **dataclasses.asdict(batch),
      'us': took * 1e6,
      'tb_per_s': num_bytes / took / 1e12,
      'tflop_per_s': flops / took / 1e12,
      'of_copy': num_bytes / took / limits['copy_bytes_per_s'],
      'of_matmul': flops / took / limits['matmul_flops_per_s'],
      # Small caches stay in the device's own; theirs is no memory's speed.
      'kv_mb': num_bytes / 1e6,
    }

  def alternative(batch: Batch, name: str) -> journal_lib.Row:
    try:
      took = dense_seconds(sweep, batch, name)
    except Exception as error:  # The comparison is a guest.
      return journal_lib.absent(error)
    return {'alternative_to': batch.name, 'us': took * 1e6}

  kept = f'{sweep.kv_dtype} ' if sweep.kv_dtype else ''
  for batch in sweep.batches:
    journal.measure(f'{kept}{batch.name}', functools.partial(row, batch))
  for batch in sweep.batches:
    # It has no mask for a chunk behind others but one in memory.
    if dense and batch.name in sweep.compared and not batch.before:
      journal.measure(
        f'{batch.name} {dense}', functools.partial(alternative, batch, dense)
      )


def run_mosaic(
  journal: journal_lib.Journal, sweep: Sweep, limits: Mapping[str, float]
) -> None:
  """Measures pallas_mosaic, too, where device and JAX can run it."""
  name = 'pallas_mosaic'
  try:
    rpa.init_pages(
      1, sweep.page_size, sweep.num_kv_heads, sweep.head_dim, sweep.dtype, name
    )
  except NotImplementedError as reason:
    journal.add(name, {'absent': str(reason)})
    return
  run(journal, sweep, limits, name)


def run_torch(journal: journal_lib.Journal, sweep: Sweep, python: str) -> None:
  """Times torch at the compared points, in a process, if `python` has torch."""
  specs = [
    json.dumps(
      {
        'point': batch.name,
        'rows': batch.decodes or 1,
        'q_len': batch.chunk or 1,
        'kv_len': batch.lens[0],
        'num_heads': sweep.num_heads,
        'num_kv_heads': sweep.num_kv_heads,
        'head_dim': sweep.head_dim,
        'dtype': sweep.dtype,
      }
    )
    for batch in sweep.batches
    if batch.name in sweep.compared and f'{batch.name} torch' not in journal
  ]
  # Files, for a pipe that nobody reads would fill up.
  with (
    tempfile.TemporaryFile('w+') as questions,
    tempfile.TemporaryFile('w+') as log,
  ):
    questions.write(''.join(f'{spec}\n' for spec in specs))
    questions.seek(0)
    with subprocess.Popen(
      [python, str(_TORCH_WORKER), jax.default_backend()],
      stdin=questions,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
    ) as worker:
      assert worker.stdout
      for answer in map(json.loads, worker.stdout):
        if point := answer.pop('point', None):
          journal.add(f'{point} torch', {'alternative_to': point, **answer})
        else:
          journal.add('torch', answer)
    if worker.returncode:
      log.seek(0)
      last = log.read().strip().splitlines()[-1:]
      journal.add('torch', {'absent': ''.join(last)})

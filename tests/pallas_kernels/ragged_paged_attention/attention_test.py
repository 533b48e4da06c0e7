# SPDX-License-Identifier: Apache-2.0
"""Implementations against the reference, on values that try to mislead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.llvm import panels
from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import arg_specs
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import llvm
from pallas_kernels.ragged_paged_attention import llvm_kernel
from pallas_kernels.ragged_paged_attention import small_specs
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import xla_decode

# Results are rounded once to their dtype; the rest is float32's, whose
# exponentials a GPU approximates.
TOLERANCES = {
  'float32': 5e-6 if jax.default_backend() == 'cpu' else 5e-5,
  'bfloat16': 2e-2,
  'float16': 2e-3,
}


def _missing_for_mosaic() -> str | None:
  try:
    tuning.choose_mosaic(tuning.Shape('bfloat16', 'bfloat16', 1, 1, 64, 64))
  except NotImplementedError as error:
    return str(error)
  return None


_MISSING = _missing_for_mosaic()
MOSAIC = pytest.param(
  'pallas_mosaic',
  marks=(
    pytest.mark.gpu,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
  ),
)
LLVM = pytest.param(
  'llvm',
  marks=pytest.mark.skipif(panels.tile() is None, reason='no such processor'),
)
IMPLEMENTATIONS: list[Any] = [
  'xla',
  LLVM,
  pytest.param('pallas_triton', marks=pytest.mark.gpu),
  MOSAIC,
]
# What Mosaic's kernel, and on a push Triton's, is tried on where it is
# interpreted, which takes its time: one compilation serves those that differ in
# values only. On a push CPUs' is, too.
_INTERPRETED = (
  'empty',
  'one_token',
  'one_token_prefill',
  'q_len_around_a_page',
  'late_chunks',
  'whole_bucket_prefill',
  '4_decodes',
  'all_phases',
  'mixed',
  'window_9',
  'window_soft_cap',
  'window_sinks',
  'long_sinks',
  'float16',
  'groups_of_7',
  'head_dim_80',
  'many_tiles',
  'head_dim_128_bfloat16',
  'pages_of_256',
)
# Of these, what others have, too; XLA's compile fast.
_IN_OTHERS = ('4_decodes', 'all_phases', 'window_9')
# Heads and pages of real models, for the tiles of kernels.
_OF_TILES = (
  'head_dim_64_bfloat16',
  'head_dim_96_float16',
  'head_dim_128_bfloat16',
  'head_dim_128_float32',
  'head_dim_256',
  'pages_of_256',
)


def _can(spec: arg_spec.ArgSpec) -> bool:
  """Whether Mosaic's kernel has such specs, and is to be tried on this one."""
  return (
    spec.kv_dtype is None
    and not spec.sinks
    and spec.head_dim <= 128
    and (jax.default_backend() == 'gpu' or spec.name in _INTERPRETED)
  )


# What a push tries for Ampere alone, of Mosaic's; that has these for Hopper.
_OF_AMPERE = ('float16', 'many_tiles')
_OF_HOPPER = ('groups_of_7', 'pages_of_256')
# Mosaic's kernels have heads of 64 and 128 only, which others are.
_OF_TRITON = ('head_dim_80',)


def _cases() -> Iterator[Any]:
  # On a GPU, what is served counts first.
  production = arg_specs.PRODUCTION if jax.default_backend() == 'gpu' else ()
  for spec in production + small_specs.TESTS:
    marks = [pytest.mark.slow] if spec.name in _OF_TILES else []
    yield pytest.param(spec, 'xla', id=f'{spec.name}-xla', marks=marks)
    if spec.kv_dtype is None:
      marks = [] if spec.name in _INTERPRETED else [pytest.mark.slow]
      yield pytest.param(
        spec, 'llvm', id=f'{spec.name}-llvm', marks=[*LLVM.marks, *marks]
      )
    for kernel in IMPLEMENTATIONS[2:]:
      (name,) = kernel.values
      is_slow = jax.default_backend() != 'gpu' and (
        spec.name not in _INTERPRETED
        or spec.name in _IN_OTHERS
        or (kernel is MOSAIC and spec.name in _OF_AMPERE + _OF_TRITON)
      )
      if kernel is not MOSAIC or _can(spec):
        yield pytest.param(
          spec,
          name,
          id=f'{spec.name}-{name}',
          marks=[*kernel.marks, *[pytest.mark.slow] * is_slow],
        )


MIXED = arg_specs.BY_NAME['mixed']

_jitted = jax.jit(
  rpa.ragged_paged_attention,
  static_argnames=(
    'scale',
    'sliding_window',
    'soft_cap',
    'batch_invariant',
    'implementation',
  ),
)


def attend(
  spec: arg_spec.ArgSpec,
  arrays: Mapping[str, Any],
  implementation: str,
  **options: Any,
) -> np.ndarray:
  """The outputs of all rows, as float32."""
  call = (
    rpa.ragged_paged_attention if implementation == 'reference' else (_jitted)
  )
  k_pages, v_pages = rpa.pages_from_rows(
    arrays['k_pages'], arrays['v_pages'], implementation
  )
  out = call(
    **(arrays | dict(k_pages=k_pages, v_pages=v_pages)),
    **spec.options,
    **options,
    implementation=implementation,
  )
  assert out.dtype == arrays['q'].dtype
  return np.asarray(out, np.float32)


def fit(spec: arg_spec.ArgSpec, implementation: str) -> arg_spec.ArgSpec:
  """The spec with pages and heads that the implementation can have."""
  if implementation == 'xla':
    return spec
  spec = dataclasses.replace(
    spec,
    page_size=max(16, 1 << (spec.page_size - 1).bit_length()),
    head_dim=-(-spec.head_dim // 16) * 16,
  )
  if implementation == 'llvm':
    return dataclasses.replace(spec, dtype='float32', kv_dtype=None)
  if implementation == 'pallas_triton':
    return spec
  return dataclasses.replace(
    spec,
    head_dim=64 if spec.head_dim <= 64 else 128,
    dtype='float16' if spec.dtype == 'float16' else 'bfloat16',
  )


def check(
  spec: arg_spec.ArgSpec,
  implementation: str,
  seed: int = 0,
  *,
  batch_invariant: bool = False,
) -> None:
  spec = fit(spec, implementation)
  arrays = arg_spec.make(spec, seed, unused=float('nan'))
  rpa.dynamic_validate(
    **{
      name: arrays[name]
      for name in (
        'q',
        'k_pages',
        'kv_lens',
        'page_indices',
        'cu_q_lens',
        'distribution',
      )
    }
  )
  got = attend(spec, arrays, implementation, batch_invariant=batch_invariant)
  want = attend(spec, arrays, 'reference')
  real = sum(spec.all_q_lens)
  assert np.isfinite(got).all()
  # float16 mixes quantized values as bfloat16; see pallas_triton.
  rounded = (
    'bfloat16' if spec.kv_dtype and spec.dtype == 'float16' else (spec.dtype)
  )
  np.testing.assert_allclose(
    got[:real], want[:real], rtol=0, atol=TOLERANCES[rounded]
  )


@pytest.mark.parametrize(('spec', 'implementation'), list(_cases()))
def test_equals_reference(spec: arg_spec.ArgSpec, implementation: str):
  check(spec, implementation)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=30)
def test_any_lengths(implementation: str, data: strategies.DataObject):
  """Any values in one shape: nothing of them is compiled in."""
  num_seqs = data.draw(strategies.integers(0, 8), 'num_seqs')
  num_decodes = data.draw(strategies.integers(0, num_seqs), 'num_decodes')
  room, q_lens = MIXED.max_tokens - num_decodes, []
  for _ in range(num_seqs - num_decodes):
    q_lens.append(data.draw(strategies.integers(1, room // 2 or 1), 'q_len'))
    room -= q_lens[-1]
    hypothesis.assume(room >= 0)
  contexts = [
    data.draw(strategies.integers(n, 64), 'context')
    for n in [1] * num_decodes + q_lens
  ]
  check(
    dataclasses.replace(
      MIXED,
      name='drawn',
      contexts=tuple(contexts),
      q_lens=tuple(q_lens),
      num_decodes=num_decodes,
    ),
    implementation,
    seed=data.draw(strategies.integers(0, 99), 'seed'),
  )


# Mosaic's kernel has two head dims, and its interpreter takes its time.
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS[:3])
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=2)
def test_any_shapes(implementation: str, data: strategies.DataObject):
  def draw(*choices: Any) -> Any:
    return data.draw(strategies.sampled_from(choices))

  num_kv_heads = draw(1, 2, 3)
  context = data.draw(strategies.integers(1, 70), 'context')
  check(
    arg_spec.ArgSpec(
      name='drawn',
      contexts=(context, 13, context),
      num_decodes=2,
      q_lens=(data.draw(strategies.integers(1, context), 'q_len'),),
      num_kv_heads=num_kv_heads,
      num_heads=num_kv_heads * draw(1, 2, 3),
      head_dim=draw(4, 8, 20),
      page_size=draw(1, 3, 4, 16),
      dtype=draw('float32', 'bfloat16'),
      soft_cap=draw(None, 3.0),
      sliding_window=draw(None, 1, 10),
    ),
    implementation,
  )


@pytest.mark.parametrize(
  'implementation',
  ['xla', pytest.param('pallas_triton', marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize('kv_dtype', ['int8', 'float8_e4m3fn'])
def test_small_values_are_kept(kv_dtype: str, implementation: str):
  """A weight times the scale of a small value is none of float16's numbers."""
  spec = fit(
    dataclasses.replace(MIXED, dtype='float16', kv_dtype=kv_dtype),
    implementation,
  )
  arrays = arg_spec.make(spec)
  values = arrays['v_pages']
  arrays['v_pages'] = values._replace(scales=values.scales * 2.0**-10)
  got, want = (
    attend(spec, arrays, name)[: sum(spec.all_q_lens)]
    for name in (implementation, 'reference')
  )
  assert np.abs(got - want).max() < 0.004 * np.abs(want).max()


def test_a_wrong_page_or_position_is_noticed():
  arrays = arg_spec.make(MIXED)
  want = attend(MIXED, arrays, 'reference')
  table = arrays['page_indices']
  wrong = {
    'page_indices': table.at[2, :2].set(table[2, 1::-1]),
    'kv_lens': arrays['kv_lens'].at[4].add(-1),
    'cu_q_lens': arrays['cu_q_lens'].at[4].add(1),
  }
  # The order of pages that are seen whole does not matter; of the chunk's
  # own pages it does.
  wrong['page_indices'] = table.at[4, 3:5].set(table[4, 4:2:-1])
  for name, value in wrong.items():
    got = attend(MIXED, arrays | {name: value}, 'xla')
    real = sum(MIXED.all_q_lens)
    assert np.abs(got - want)[:real].max() > 1e-2, name


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_batch_mates_change_nothing(implementation: str):
  """What a sequence gets does not depend on who else is in the batch."""
  mixed = fit(MIXED, implementation)
  arrays = arg_spec.make(mixed)
  together = attend(mixed, arrays, implementation)
  starts = np.asarray(arrays['cu_q_lens'])
  for s, q_len in enumerate(mixed.all_q_lens):
    alone = dict(arrays)
    for name in ('kv_lens', 'page_indices'):
      rows = arrays[name]
      alone[name] = jnp.zeros_like(rows).at[0].set(rows[s])
    alone['q'] = jnp.roll(arrays['q'], -starts[s], axis=0)
    alone['cu_q_lens'] = jnp.full_like(arrays['cu_q_lens'], q_len).at[0].set(0)
    alone['distribution'] = jnp.array(
      [int(s < mixed.num_decodes), 1], jnp.int32
    )
    np.testing.assert_allclose(
      attend(mixed, alone, implementation)[:q_len],
      together[starts[s] : starts[s] + q_len],
      rtol=0,
      atol=2e-6,
    )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS[:3])
@pytest.mark.parametrize(
  ('name', 'batch_invariant'),
  [
    ('long_hybrid', True),
    ('window_soft_cap', True),
    ('long_sinks', True),
    ('long_hybrid', False),
  ],
)
def test_if_asked_for_batch_mates_change_no_bit(
  name: str, batch_invariant: bool, implementation: str
):
  """Nor whether a query is of a chunk, or a decode of its own.

  The negative control is that they do if nobody asks.
  """
  spec = fit(arg_specs.BY_NAME[name], implementation)
  arrays = arg_spec.make(spec, unused=float('nan'))
  run = functools.partial(
    attend,
    spec,
    implementation=implementation,
    batch_invariant=batch_invariant,
  )
  together = run(arrays)
  num_different = 0
  starts = np.asarray(arrays['cu_q_lens'])
  for s, (q_len, context) in enumerate(
    zip(spec.all_q_lens, spec.contexts, strict=True)
  ):
    table = arrays['page_indices']
    for i in range(q_len):
      alone = arrays | {
        'kv_lens': jnp.zeros_like(arrays['kv_lens'])
        .at[0]
        .set(context - q_len + i + 1),
        'page_indices': table.at[0].set(table[s]),
        'q': jnp.roll(arrays['q'], -(starts[s] + i), axis=0),
        'cu_q_lens': jnp.ones_like(arrays['cu_q_lens']).at[0].set(0),
        'distribution': jnp.array([1, 1], jnp.int32),
      }
      num_different += not np.array_equal(
        run(alone)[0], together[starts[s] + i]
      )
  # On CPUs a kernel computes all alike, asked for or not.
  assert (num_different == 0) == (batch_invariant or implementation == 'llvm')
  check(spec, implementation, batch_invariant=batch_invariant)


@pytest.mark.parametrize('implementation', [*IMPLEMENTATIONS[:2], 'reference'])
@pytest.mark.parametrize('name', ['long_sinks', 'window_sinks'])
def test_sinks_take_their_part_of_the_attention(name: str, implementation: str):
  """None if they are far below all scores, all if they are far above."""
  spec = fit(arg_specs.BY_NAME[name], implementation)
  arrays = arg_spec.make(spec, unused=float('nan'))
  real = sum(spec.all_q_lens)

  def run(sinks: Any) -> np.ndarray:
    return attend(spec, arrays | {'sinks': sinks}, implementation)[:real]

  of_all = (None, jnp.full(4, -1e4), jnp.full(4, 1e4))
  without, low, high = map(run, of_all)
  np.testing.assert_allclose(low, without, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(high, 0)
  # A head's own: the others' outputs stay as they are.
  one = run(jnp.array([-1e4, 5.0, -1e4, -1e4]))
  np.testing.assert_allclose(
    one[:, [0, 2, 3]], without[:, [0, 2, 3]], atol=1e-6
  )
  assert (np.abs(one[:, 1]) <= np.abs(without[:, 1])).all()
  assert (np.abs(one[:, 1]) < np.abs(without[:, 1])).mean() > 0.9


def test_a_kernel_without_sinks_says_so():
  arrays = arg_spec.make(arg_specs.BY_NAME['sinks'])
  with pytest.raises(
    NotImplementedError, match='kernel for chunks has no sinks'
  ):
    rpa.ragged_paged_attention(
      **arrays, scale=1.0, implementation='pallas_mosaic'
    )


def test_a_kernel_that_is_not_batch_invariant_says_so():
  arrays = arg_spec.make(MIXED)
  with pytest.raises(NotImplementedError, match='be batch_invariant'):
    rpa.ragged_paged_attention(
      **arrays,
      scale=1.0,
      batch_invariant=True,
      implementation='pallas_mosaic',
    )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('pages', ['k_pages', 'v_pages'])
def test_a_sequence_of_nan_ruins_itself_alone(pages: str, implementation: str):
  """Not even those whose work is shared; and it does not hide its own."""
  mixed = fit(MIXED, implementation)
  arrays = arg_spec.make(mixed)
  want = attend(mixed, arrays, implementation)
  starts, page_size = np.asarray(arrays['cu_q_lens']), mixed.page_size
  for s, (q_len, context) in enumerate(
    zip(mixed.all_q_lens, mixed.contexts, strict=True)
  ):
    first = arrays['page_indices'][s, : -(-context // page_size)][:1]
    ruined = arrays | {pages: arrays[pages].at[first].set(np.nan)}
    got = attend(mixed, ruined, implementation)
    mine = np.arange(len(got)) - starts[s]
    mine = (mine >= 0) & (mine < q_len)
    assert np.isnan(got[mine]).all(), s
    mine[starts[-1] :] = True  # padding
    np.testing.assert_array_equal(got[~mine], want[~mine])


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_query_alone_is_a_decode_or_a_chunk(implementation: str):
  """The two paths agree on what both can do."""
  decodes, chunks = (
    fit(arg_specs.BY_NAME[f'{n}_decodes'], implementation) for n in (8, 0)
  )
  np.testing.assert_allclose(
    attend(decodes, arg_spec.make(decodes), implementation)[:8],
    attend(chunks, arg_spec.make(chunks), implementation)[:8],
    rtol=0,
    atol=2e-6,
  )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_one_compilation_serves_all_values(implementation: str):
  traces = 0

  @jax.jit
  def counted(arrays: dict[str, Any]) -> jax.Array:
    nonlocal traces
    traces += 1
    return rpa.ragged_paged_attention(
      **arrays,
      **fit(MIXED, implementation).options,
      implementation=implementation,
    )

  # JAX loads its interpreter within a first trace, which then no longer counts
  # as one of the same settings.
  mixed = fit(MIXED, implementation)
  attend(mixed, arg_spec.make(mixed), implementation)
  for name in ('mixed', 'empty', 'phase_3', '4_decodes'):
    arrays = arg_spec.make(fit(arg_specs.BY_NAME[name], implementation))
    arrays['k_pages'], arrays['v_pages'] = rpa.pages_from_rows(
      arrays['k_pages'], arrays['v_pages'], implementation
    )
    counted(arrays)
  assert traces == 1


def _decode_temp_bytes() -> tuple[int, int]:
  """Temporaries of decodes, and the size of one block's keys."""
  spec = dataclasses.replace(
    arg_specs.BY_NAME['decode_43m'], head_dim=32, page_size=32
  )
  arrays = arg_spec.make(spec)
  k_pages, v_pages = rpa.pages_from_rows(
    arrays['k_pages'], arrays['v_pages'], 'xla'
  )
  q = arrays['q'].reshape(-1, spec.num_kv_heads, 2, spec.head_dim)
  compiled = (
    jax.jit(
      functools.partial(xla_decode.decodes, options=batch_lib.Options(1.0))
    )
    .lower(
      q,
      k_pages,
      v_pages,
      batch_lib.Batch(*(arrays[name] for name in batch_lib.Batch._fields)),
    )
    .compile()
  )
  keys = xla_decode._BLOCK * k_pages[0].nbytes
  return compiled.memory_analysis().temp_size_in_bytes, keys


def test_decodes_on_cpu_copy_no_pages(monkeypatch: pytest.MonkeyPatch):
  """XLA fuses the gathers, which is all the speed; not so without the wall."""
  got, keys = _decode_temp_bytes()
  assert got < keys
  monkeypatch.setattr(
    xla_decode, '_walled', lambda _, function, *args: function(*args)
  )
  got, keys = _decode_temp_bytes()
  assert got > keys


@pytest.mark.skipif(panels.tile() is None, reason='no such processor')
def test_threads_of_a_cpu_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
  """However many there are: a push's devices have no threads to share."""
  spec = fit(arg_specs.BY_NAME['long_hybrid'], 'llvm')
  arrays = arg_spec.make(spec, unused=float('nan'))
  k_pages, v_pages = rpa.pages_from_rows(
    arrays['k_pages'], arrays['v_pages'], 'llvm'
  )
  arrays |= {'k_pages': k_pages, 'v_pages': v_pages}

  def jitted() -> Any:
    call = functools.partial(
      rpa.ragged_paged_attention, **spec.options, implementation='llvm'
    )
    return jax.jit(call)

  alone = jitted()(**arrays)
  target = 'tests.ragged_paged_attention'
  assert llvm_kernel.register(target, num_devices=1)
  monkeypatch.setattr(llvm, '_TARGET', target)
  shared = jitted()
  assert target in shared.lower(**arrays).as_text()
  for _ in range(50):
    np.testing.assert_array_equal(shared(**arrays), alone)


@pytest.mark.parametrize(
  ('page_size', 'head_dim', 'dtype', 'match'),
  [
    (24, 64, 'float32', 'llvm: page_size=24: must be a multiple of 16'),
    (16, 40, 'float32', 'llvm: head_dim=40: must be a multiple of 16'),
    (16, 64, 'int8', 'llvm: dtype=int8: must be float32'),
  ],
)
def test_what_cpus_kernel_lacks_xla_does(
  page_size: int, head_dim: int, dtype: str, match: str
) -> None:
  sizes = 2, page_size, 1, head_dim, dtype
  with pytest.raises(NotImplementedError, match=match):
    rpa.init_pages(*sizes, 'llvm')
  chosen, by_xla = (rpa.init_pages(*sizes, name) for name in (None, 'xla'))
  assert jax.tree.map(jnp.shape, chosen) == jax.tree.map(jnp.shape, by_xla)

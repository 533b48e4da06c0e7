# SPDX-License-Identifier: Apache-2.0
"""What does not fit is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import arg_specs

SPEC = arg_specs.BY_NAME['mixed']


def _arrays() -> dict[str, Any]:
  arrays = arg_spec.make(SPEC)
  arrays['k_pages'], arrays['v_pages'] = rpa.pages_from_rows(
    arrays['k_pages'], arrays['v_pages']
  )
  return arrays


def zeros(*shape: int, dtype: str = 'float32') -> Any:
  return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
  ('name', 'value', 'match'),
  [
    ('q', zeros(64, 64), r'q=\(64, 64\): must have 3 axes'),
    ('q', zeros(64, 4, 16, dtype='int32'), 'q=int32: must be one of float32'),
    ('q', zeros(64, 4, 16, dtype='float16'), 'k_pages=float32: must be the'),
    ('q', zeros(64, 3, 16), r'q=\(64, 3, 16\): heads must be a multiple'),
    ('q', zeros(64, 4, 32), r'k_pages=.*: its head dim must be that of q, 32'),
    ('v_pages', zeros(65, 2, 1, 8, 16), r'v_pages=\(65, 2, 1, 8, 16\): must'),
    ('v_pages', zeros(64, 2, 1, 8, 16), r'v_pages=\(64, 2, 1, 8, 16\): must'),
    ('k_pages', zeros(65, 2, 2, 16, 4), r'v_pages=|k_pages='),
    ('kv_lens', zeros(8), 'kv_lens=float32: must be int32'),
    ('kv_lens', zeros(8, 1, dtype='int32'), r'kv_lens=\(8, 1\): must have 1'),
    ('page_indices', zeros(7, 8, dtype='int32'), 'page_indices=.* 8 rows'),
    ('cu_q_lens', zeros(8, dtype='int32'), r'cu_q_lens=\(8,\): .*, 9'),
    ('distribution', zeros(3, dtype='int32'), r'distribution=\(3,\)'),
    ('sinks', zeros(2), r'sinks=float32\(2,\): must be floats, \(4,\)'),
    ('sinks', zeros(4, dtype='int32'), r'sinks=int32.*must be floats'),
  ],
)
def test_static(name: str, value: Any, match: str):
  arrays = _arrays()
  with pytest.raises(ValueError, match=match):
    rpa.ragged_paged_attention(**(arrays | {name: value}), scale=1.0)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    (dict(sliding_window=0), 'sliding_window=0: must be None or at least 1'),
    (dict(soft_cap=0.0), r'soft_cap=0\.0: must be None or above 0'),
    (
      dict(implementation='cuda'),
      'None or one of llvm, pallas_mosaic, pallas_triton, reference, xla',
    ),
  ],
)
def test_options(options: dict[str, Any], match: str):
  with pytest.raises(ValueError, match=match):
    rpa.ragged_paged_attention(**_arrays(), scale=1.0, **options)


@pytest.mark.parametrize(
  ('name', 'value', 'match'),
  [
    ('k', zeros(3, 2, 8), r'k=\(3, 2, 8\): must be \(3, 2, 16\)'),
    ('v', zeros(4, 2, 16), r'v=\(4, 2, 16\): must be \(3, 2, 16\)'),
    ('k', zeros(3, 2, 16, dtype='int32'), 'k=int32: must be a float'),
    ('slot_mapping', zeros(3), r'slot_mapping=float32\(3,\): must be int32'),
    ('v_pages', zeros(64, 2, 1, 8, 16), r'v_pages=\(64, .*as from init_pages'),
  ],
)
def test_what_is_written(name: str, value: Any, match: str):
  arrays = {key: _arrays()[key] for key in ('k_pages', 'v_pages')} | dict(
    k=zeros(3, 2, 16), v=zeros(3, 2, 16), slot_mapping=zeros(3, dtype='int32')
  )
  rpa.write_kv(**arrays)
  with pytest.raises(ValueError, match=match):
    rpa.write_kv(**(arrays | {name: value}))


def test_a_plan_for_other_shapes():
  spec = dataclasses.replace(SPEC, page_size=16)
  arrays = arg_spec.make(spec)
  ints = {
    name: arrays[name]
    for name in ('k_pages', 'kv_lens', 'cu_q_lens', 'distribution')
  }
  plan = rpa.make_plan(arrays['q'][:8], **ints, implementation='pallas_triton')
  with pytest.raises(ValueError, match=r'plan=\d+ items: must be of make_plan'):
    rpa.ragged_paged_attention(
      **arrays, scale=1.0, plan=plan, implementation='pallas_triton'
    )


def test_the_reference_is_not_traced():
  with pytest.raises(NotImplementedError, match='reference: it looks at val'):
    jax.jit(
      lambda arrays: rpa.ragged_paged_attention(
        **arrays, scale=1.0, implementation='reference'
      )
    )(_arrays())


def test_unknown_implementation_of_pages():
  with pytest.raises(ValueError, match='pallas_triton, reference, xla'):
    rpa.init_pages(2, 8, 2, 16, 'float32', 'cuda')


@pytest.mark.parametrize(
  ('name', 'index', 'value', 'match'),
  [
    ('distribution', 0, 6, r'distribution=\(6, 5\): must ascend'),
    ('distribution', 1, 9, r'distribution=\(3, 9\): must ascend'),
    ('distribution', 0, 4, 'the first 4 sequences are decodes'),
    ('distribution', 1, 4, 'must not grow after the 4 sequences'),
    ('cu_q_lens', 0, 1, 'must start at 0'),
    ('cu_q_lens', 4, 99, 'cu_q_lens=.*must start at 0 and not descend'),
    ('cu_q_lens', 8, 65, 'must end within the 64 tokens'),
    ('kv_lens', 3, 22, 'must count the new tokens too'),
    ('kv_lens', 0, 65, 'must fit the page_indices, 64 tokens'),
    ('kv_lens', 5, 1, 'kv_lens=.*must be 0 after the 5 sequences'),
    ('page_indices', (0, 1), 65, r'page_indices\[0\]=.*must be in \[0, 65\)'),
  ],
)
def test_dynamic(name: str, index: Any, value: int, match: str):
  arrays = _arrays()
  arrays.pop('v_pages')
  rpa.dynamic_validate(**arrays)
  with pytest.raises(ValueError, match=match):
    rpa.dynamic_validate(**(arrays | {name: arrays[name].at[index].set(value)}))


@pytest.mark.parametrize(
  ('dtype', 'scales', 'match'),
  [
    ('int32', 'float32', 'k_pages.values=int32: must be int8, or uint8'),
    ('int8', 'float16', 'k_pages.scales=float16: must be float32'),
  ],
)
def test_quantized(dtype: str, scales: str, match: str):
  values = zeros(65, 2, 1, 16, 8, dtype=dtype)
  with pytest.raises(ValueError, match=match):
    rpa.ragged_paged_attention(
      **(
        _arrays()
        | dict(k_pages=rpa.Quantized(values, zeros(65, 2, 8, dtype=scales)))
      ),
      scale=1.0,
    )


def test_quantized_by_half():
  pages = rpa.init_pages(65, 8, 2, 16, 'int8')
  with pytest.raises(ValueError, match='v_pages=float32: must be of the dtype'):
    rpa.ragged_paged_attention(
      **(_arrays() | dict(k_pages=pages[0])), scale=1.0
    )
  wrong = pages[0]._replace(scales=zeros(65, 2, 4))
  with pytest.raises(ValueError, match=r'k_pages.scales=.*be \(65, 2, 8\)'):
    rpa.ragged_paged_attention(
      **(_arrays() | dict(k_pages=wrong, v_pages=pages[1])), scale=1.0
    )


def test_pages_of_other_numbers():
  with pytest.raises(ValueError, match='dtype=float8_e5m2: must be one of'):
    rpa.init_pages(2, 16, 2, 16, 'float8_e5m2')


def test_pages_for_another_implementation():
  pages = rpa.init_pages(65, 16, 2, 16, 'float32', 'pallas_triton')
  with pytest.raises(ValueError, match="must be as from init_pages for 'xla'"):
    rpa.ragged_paged_attention(
      **(_arrays() | dict(zip(('k_pages', 'v_pages'), pages, strict=True))),
      scale=1.0,
      implementation='xla',
    )


@pytest.mark.parametrize(
  ('call', 'match'),
  [
    (
      lambda a: _write(a, k_pages=zeros(3, 3)),
      r'k_pages=\(3, 3\): must have 4',
    ),
    (
      lambda a: _write(a, v_pages=a['v_pages'].astype('int32')),
      'v_pages=int32: must be one of float32',
    ),
    (lambda a: _attend(a, plan=(1, 2)), "plan=tuple: must be None for 'xla'"),
    (lambda a: _attend(a, scale=float('nan')), 'scale=nan: must be above 0'),
    (lambda a: _attend(a, scale=-1.0), r'scale=-1\.0: must be above 0'),
    (lambda a: _attend(a, soft_cap=float('inf')), 'soft_cap=inf: must be None'),
    (lambda a: _plan(a, sliding_window=0), 'sliding_window=0: must be None'),
    (lambda a: _plan(a, q=zeros(5, 3, 16)), r'q=\(5, 3, 16\): heads must be'),
    (lambda a: _plan(a, q=zeros(5, 16)), r'q=\(5, 16\): must have 3 axes'),
    (
      lambda a: rpa.init_pages(-1, 8, 2, 16, 'float32'),
      'num_pages=-1: must be at least 1',
    ),
    (
      lambda a: rpa.init_pages(4, 8, 0, 16, 'float32'),
      'num_kv_heads=0: must be at least 1',
    ),
    (
      lambda a: rpa.quantize(a['q'], 'float32'),
      'dtype=float32: must be one of int8, float8_e4m3fn',
    ),
  ],
)
def test_bad_calls_are_named(call: Callable[..., Any], match: str):
  with pytest.raises(ValueError, match=match):
    call(_arrays())


def _write(arrays: dict[str, Any], **change: Any) -> Any:
  new = zeros(3, 2, 16)
  pages = {name: arrays[name] for name in ('k_pages', 'v_pages')}
  return rpa.write_kv(
    **pages | change, k=new, v=new, slot_mapping=jnp.zeros(3, jnp.int32)
  )


def _attend(arrays: dict[str, Any], **change: Any) -> Any:
  return rpa.ragged_paged_attention(
    **arrays | {'scale': 1.0, 'implementation': 'xla'} | change
  )


def _plan(arrays: dict[str, Any], **change: Any) -> Any:
  names = 'q', 'k_pages', 'kv_lens', 'cu_q_lens', 'distribution'
  return rpa.make_plan(**{n: arrays[n] for n in names} | change)

# SPDX-License-Identifier: Apache-2.0
"""What does not fit is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention import arg_specs
from pallas_kernels.ragged_paged_attention import configurations
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import tuning

SPEC = arg_specs.BY_NAME['mixed']


def _arrays() -> dict[str, Any]:
  arrays = arg_specs.make(SPEC)
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
      'must be None or one of pallas_mosaic, pallas_triton, reference, xla',
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
    (
      'implementation',
      'cuda',
      'implementation=cuda: must be None or one of xla',
    ),
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
  arrays = arg_specs.make(spec)
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


def test_kernels_refuse_more_than_int32_can_count():
  """Pages of another making, for `init_pages` makes none of them."""
  pages = jax.eval_shape(
    lambda: layout.init(layout.ROWS, 2**21 + 1, 64, 1, 16, 'int8')
  )
  with pytest.raises(
    NotImplementedError,
    match=(r'k_pages=\(2097153, .*\): must be less than 2147483648 numbers'),
  ):
    rpa.make_plan(
      jax.ShapeDtypeStruct((4, 2, 16), 'bfloat16'),
      pages[0],
      *(jnp.zeros(n, jnp.int32) for n in (4, 5, 2)),
      implementation='pallas_triton',
    )


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_offsets_stay_within_int32(dtype: str):
  shape = 64, 8, 128
  most = rpa.most_pages(*shape, dtype)
  assert most == 2**31 // (64 * 8 * 128) - 1
  assert rpa.most_pages(*shape, 'bfloat16') is None
  pages = jax.eval_shape(lambda: rpa.init_pages(most, *shape, dtype))
  assert pages[0].values.size < 2**31
  with pytest.raises(
    NotImplementedError, match=f'num_pages={most + 1}: must be at most {most}'
  ):
    rpa.init_pages(most + 1, *shape, dtype)


@pytest.mark.parametrize(
  ('page_size', 'head_dim', 'match'),
  [
    (8, 16, 'page_size=8: must be a power of two from 16 on'),
    (48, 16, 'page_size=48: must be a power of two'),
    (16, 20, 'head_dim=20: must be a multiple of 16'),
    (16, 272, 'head_dim=272: must be at most 256'),
  ],
)
def test_what_the_kernel_cannot_do(page_size: int, head_dim: int, match: str):
  with pytest.raises(NotImplementedError, match=match):
    rpa.init_pages(2, page_size, 2, head_dim, 'float32', 'pallas_triton')


def _pretend(
  monkeypatch: pytest.MonkeyPatch,
  kind: str,
  capability: str,
  jax_version: tuple[int, ...] = (0, 11, 2),
) -> None:
  monkeypatch.setattr(
    tuning,
    'default_device',
    lambda: types.SimpleNamespace(
      platform='gpu', device_kind=kind, compute_capability=capability
    ),
  )
  monkeypatch.setattr(jax, '__version_info__', jax_version)
  monkeypatch.setattr(jax, '__version__', '.'.join(map(str, jax_version)))


@pytest.mark.parametrize(
  ('page_size', 'head_dim', 'dtype', 'match'),
  [
    (64, 128, 'float32', 'dtype=float32: must be bfloat16 or float16'),
    (64, 128, 'int8', 'kv_dtype=int8: must be bfloat16 or float16'),
    (64, 128, 'float8_e4m3fn', 'kv_dtype=uint8: must be bfloat16'),
    (64, 80, 'bfloat16', 'head_dim=80: must be one of 64, 128'),
    (64, 256, 'bfloat16', 'head_dim=256: must be one of 64, 128'),
    (8, 128, 'bfloat16', 'page_size=8: must be a power of two from 16 on'),
  ],
)
def test_what_mosaics_kernel_cannot_do(
  page_size: int,
  head_dim: int,
  dtype: str,
  match: str,
  monkeypatch: pytest.MonkeyPatch,
):
  _pretend(monkeypatch, 'NVIDIA H100 80GB HBM3', '9.0')
  assert rpa.init_pages(2, 64, 2, 128, 'bfloat16', 'pallas_mosaic')[0].ndim == 4
  with pytest.raises(NotImplementedError, match=match):
    rpa.init_pages(2, page_size, 2, head_dim, dtype, 'pallas_mosaic')


@pytest.mark.parametrize(
  ('kind', 'capability', 'version', 'match'),
  [
    (
      'NVIDIA A100-SXM4-80GB',
      '8.0',
      (0, 11, 2),
      'compute_capability=8.0: must',
    ),
    ('NVIDIA B200', '10.0', (0, 12, 0), 'compute_capability=10.0: must be 9.0'),
    (
      'NVIDIA H100 PCIe',
      '9.0',
      (0, 10, 2),
      'jax=0.10.2: must be 0.11 or newer',
    ),
  ],
)
def test_where_mosaics_kernel_cannot_run(
  kind: str,
  capability: str,
  version: tuple[int, ...],
  match: str,
  monkeypatch: pytest.MonkeyPatch,
):
  _pretend(monkeypatch, kind, capability, version)
  with pytest.raises(NotImplementedError, match=f'pallas_mosaic: {match}'):
    rpa.init_pages(2, 64, 2, 128, 'bfloat16', 'pallas_mosaic')


def test_mosaics_kernel_is_not_chosen_by_itself(
  monkeypatch: pytest.MonkeyPatch,
):
  """Until it is measured to be faster: then the table says so."""
  _pretend(monkeypatch, 'NVIDIA H100 80GB HBM3', '9.0')
  args = 64, 2, 128, jnp.bfloat16
  assert api._default(*args) == 'pallas_triton'
  monkeypatch.setitem(
    tuning._FASTEST, 'h100', ('pallas_mosaic', 'pallas_triton')
  )
  assert api._default(*args) == 'pallas_mosaic'
  assert api._default(64, 2, 80, jnp.bfloat16) == 'pallas_triton'


def test_tuned_sizes_go_first(monkeypatch: pytest.MonkeyPatch):
  shape = tuning.Shape('bfloat16', 'int8', 8, 4, 128, 64)
  monkeypatch.setattr(
    tuning, 'TUNED', {('a100', 'bfloat16', 'int8', 4, 128, 64): (128, 16, 8, 3)}
  )
  _pretend(monkeypatch, 'NVIDIA H100 80GB HBM3', '9.0')
  assert tuning.choose(shape).wide_rows == 64
  _pretend(monkeypatch, 'NVIDIA A100-SXM4-80GB', '8.0')
  sizes = tuning.choose(shape)
  assert (
    sizes.wide_rows,
    sizes.block_n,
    sizes.num_warps,
    sizes.num_stages,
    sizes.num_blocks,
  ) == (128, 16, 8, 3, 2 * 108)
  assert tuning.choose(dataclasses.replace(shape, page_size=32)).wide_rows == 64
  _pretend(monkeypatch, 'NVIDIA A800-SXM4-80GB', '8.0')
  assert tuning.choose(shape).wide_rows == 128
  _pretend(monkeypatch, 'Orin (nvgpu)', '8.7')  # It is like A100, but no A100.
  assert tuning.choose(shape).wide_rows == 64
  assert 'tuned 4 128 bfloat16 KV int8' in {
    case.name for case in configurations.cases('a100')
  }


def test_the_device_knows_its_multiprocessors_best(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(
    tuning,
    'default_device',
    lambda: types.SimpleNamespace(
      platform='gpu',
      device_kind='NVIDIA H100 PCIe',
      core_count=114,
      compute_capability='9.0',
    ),
  )
  shape = tuning.Shape('bfloat16', 'bfloat16', 8, 4, 128, 64)
  assert tuning.choose(shape).num_blocks == 2 * 114
  assert all(c.num_blocks == 2 * 114 for c in tuning.candidates())


@pytest.mark.parametrize(
  ('kind', 'capability', 'like'),
  [
    ('NVIDIA GH200 480GB', '9.0', 'NVIDIA H100 80GB HBM3'),
    ('NVIDIA H20', '9.0', 'NVIDIA H100 80GB HBM3'),
    ('NVIDIA A800-SXM4-80GB', '8.0', 'NVIDIA A100-SXM4-80GB'),
  ],
)
def test_a_gpu_takes_the_sizes_of_its_like(
  kind: str, capability: str, like: str, monkeypatch: pytest.MonkeyPatch
):
  """Not those of the most modest, of which it has never been one."""
  shape = tuning.Shape('bfloat16', 'bfloat16', 8, 4, 128, 64)
  _pretend(monkeypatch, like, capability)
  expected = tuning.choose(shape)
  _pretend(monkeypatch, 'NVIDIA A40', '8.6')
  modest = tuning.choose(shape)
  _pretend(monkeypatch, kind, capability)
  assert tuning.choose(shape) == expected != modest


def test_a_b200_takes_what_does_not_spill_there(
  monkeypatch: pytest.MonkeyPatch,
):
  """Compiled for it: H100's tiles of 256 channels spill 24 bytes a thread."""
  shape = tuning.Shape('bfloat16', 'bfloat16', 8, 4, 128, 64)
  wide = dataclasses.replace(shape, head_dim=256)
  _pretend(monkeypatch, 'NVIDIA H100 80GB HBM3', '9.0')
  hopper = tuning.choose(shape), tuning.choose(wide)
  _pretend(monkeypatch, 'NVIDIA B200', '10.0')
  assert tuning.choose(shape) == hopper[0]
  assert tuning.choose(wide).wide_rows < hopper[1].wide_rows


@pytest.mark.parametrize(
  ('device', 'match'),
  [
    (
      dict(platform='gpu', device_kind='Tesla V100', compute_capability='7.0'),
      'pallas_triton: compute_capability=7.0: must be 8.0 or above',
    ),
    (
      dict(
        platform='gpu',
        device_kind='AMD Instinct MI300X',
        compute_capability='gfx942',
      ),
      'compute_capability=gfx942',
    ),
    (
      dict(platform='tpu', device_kind='TPU v5e'),
      'platform=tpu: must be gpu, or cpu to be interpreted',
    ),
  ],
)
def test_where_the_kernel_cannot_run(
  device: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(
    tuning, 'default_device', lambda: types.SimpleNamespace(**device)
  )
  with pytest.raises(NotImplementedError, match=match):
    rpa.init_pages(2, 64, 2, 128, 'bfloat16', 'pallas_triton')


def test_pages_for_another_implementation():
  pages = rpa.init_pages(65, 16, 2, 16, 'float32', 'pallas_triton')
  with pytest.raises(ValueError, match="must be as from init_pages for 'xla'"):
    rpa.ragged_paged_attention(
      **(_arrays() | dict(zip(('k_pages', 'v_pages'), pages, strict=True))),
      scale=1.0,
      implementation='xla',
    )


def test_a_gpu_gets_the_kernel_where_it_can(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
  monkeypatch.setattr(
    tuning,
    'default_device',
    lambda: types.SimpleNamespace(
      platform='gpu',
      device_kind='NVIDIA A100-SXM4-80GB',
      compute_capability='8.0',
    ),
  )
  assert rpa.init_pages(2, 16, 2, 32, 'bfloat16')[0].ndim == 4
  assert not caplog.text
  assert rpa.init_pages(2, 8, 2, 32, 'bfloat16')[0].ndim == 5
  assert 'falls back to plain XLA: pallas_triton: page_size=8' in caplog.text
  monkeypatch.setattr(
    tuning,
    'default_device',
    lambda: types.SimpleNamespace(
      platform='gpu', device_kind='Tesla V100', compute_capability='7.0'
    ),
  )
  assert rpa.init_pages(2, 16, 2, 32, 'float16')[0].ndim == 5
  assert 'compute_capability=7.0: must be 8.0 or above' in caplog.text


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
    (lambda a: _attend(a, scale=float('nan')), 'scale=nan: must be finite'),
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

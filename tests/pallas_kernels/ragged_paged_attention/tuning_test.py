# SPDX-License-Identifier: Apache-2.0
"""What kernels can do on which device, and the sizes they take there."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices
from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention import configurations
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import tuning


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
    devices,
    'default',
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
@pytest.mark.parametrize(
  ('kind', 'capability'),
  [('NVIDIA H100 80GB HBM3', '9.0'), ('NVIDIA A40', '8.6')],
)
def test_what_mosaics_kernel_cannot_do(
  kind: str,
  capability: str,
  page_size: int,
  head_dim: int,
  dtype: str,
  match: str,
  monkeypatch: pytest.MonkeyPatch,
):
  _pretend(monkeypatch, kind, capability, (0, 12, 0))
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
      'jax=0.11.2: must be 0.12 or newer',
    ),
    (
      'NVIDIA B200',
      '10.0',
      (0, 12, 0),
      'compute_capability=10.0: must be one of 8.0, 8.6, 9.0',
    ),
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


def test_pages_too_small_for_mosaics_copies_on_ampere(
  monkeypatch: pytest.MonkeyPatch,
):
  _pretend(monkeypatch, 'NVIDIA A40', '8.6', (0, 12, 0))
  for page_size, head_dim in ((16, 128), (32, 64)):
    rpa.init_pages(2, page_size, 2, head_dim, 'bfloat16', 'pallas_mosaic')
  with pytest.raises(NotImplementedError, match='page_size=16: must be at lea'):
    rpa.init_pages(2, 16, 2, 64, 'bfloat16', 'pallas_mosaic')


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
  key = 'a100', 'bfloat16', 'int8', 4, 128, 64
  monkeypatch.setattr(
    tuning,
    'TUNED',
    {('small', *key): (16, 16, 2, 4), ('chunks', *key): (32, 16, 8, 3)},
  )
  small = tuning.Tile(16, 16, 2, 4, 8 * 108)
  chunks = tuning.Tile(32, 16, 8, 3, 2 * 108)
  _pretend(monkeypatch, 'NVIDIA A100-SXM4-80GB', '8.0')
  tuned = tuning.choose(shape)
  assert (tuned.small, tuned.chunks) == (small, chunks)
  assert tuned.tiling.block_n == 16
  others = tuning.choose(dataclasses.replace(shape, page_size=32))
  assert small != others.small and chunks != others.chunks
  _pretend(monkeypatch, 'NVIDIA A800-SXM4-80GB', '8.0')
  assert tuning.choose(shape) == tuned
  for other in (
    ('NVIDIA H100 80GB HBM3', '9.0'),
    ('Orin (nvgpu)', '8.7'),  # It is like A100, but no A100.
  ):
    _pretend(monkeypatch, *other)
    assert tuning.choose(shape).chunks.rows != 32
  assert 'tuned 4 128 bfloat16 KV int8' in {
    case.name for case in configurations.cases('a100')
  }


@pytest.mark.parametrize(
  ('group', 'page_size', 'rows', 'block_n'),
  [(1, 64, 16, 64), (7, 16, 16, 16), (29, 32, 32, 32), (71, 256, 32, 64)],
)
def test_tiles_fit_the_group_and_the_page(
  group: int,
  page_size: int,
  rows: int,
  block_n: int,
  monkeypatch: pytest.MonkeyPatch,
):
  _pretend(monkeypatch, 'NVIDIA H100 80GB HBM3', '9.0')
  sizes = tuning.choose(
    tuning.Shape('bfloat16', 'bfloat16', 8, group, 128, page_size)
  )
  assert (sizes.small.rows, sizes.small.block_n) == (rows, block_n)
  assert (sizes.tiling.rows, sizes.tiling.block_n) == (rows, block_n)
  assert (sizes.merge.rows, sizes.chunks.block_n) == (rows, block_n)


def test_the_device_knows_its_multiprocessors_best(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(
    devices,
    'default',
    lambda: types.SimpleNamespace(
      platform='gpu',
      device_kind='NVIDIA H100 PCIe',
      core_count=114,
      compute_capability='9.0',
    ),
  )
  shape = tuning.Shape('bfloat16', 'bfloat16', 8, 4, 128, 64)
  assert tuning.choose(shape).chunks.num_blocks == 2 * 114
  for _, sizes in tuning.candidates('small', shape):
    assert sizes.small.num_blocks == 8 * 114


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
  assert tuning.choose(wide).chunks.rows < hopper[1].chunks.rows


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
    devices, 'default', lambda: types.SimpleNamespace(**device)
  )
  with pytest.raises(NotImplementedError, match=match):
    rpa.init_pages(2, 64, 2, 128, 'bfloat16', 'pallas_triton')


def test_a_gpu_gets_the_kernel_where_it_can(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
  monkeypatch.setattr(
    devices,
    'default',
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
    devices,
    'default',
    lambda: types.SimpleNamespace(
      platform='gpu', device_kind='Tesla V100', compute_capability='7.0'
    ),
  )
  assert rpa.init_pages(2, 16, 2, 32, 'float16')[0].ndim == 5
  assert 'compute_capability=7.0: must be 8.0 or above' in caplog.text

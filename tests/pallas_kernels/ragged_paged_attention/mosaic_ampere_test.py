# SPDX-License-Identifier: Apache-2.0
"""Mosaic's kernels for Ampere, interpreted, against the reference.

The interpreter knows neither mma nor cp.async: in their place it computes and
copies plainly. `mosaic_registers_test` is about what it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from pallas_kernels import mosaic_devices
from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import small_specs
from pallas_kernels.ragged_paged_attention import tuning
from tests.pallas_kernels.ragged_paged_attention import attention_test

pytestmark = [
  pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='needs JAX 0.12'),
  pytest.mark.skipif(
    jax.default_backend() != 'cpu', reason='is for the interpreter'
  ),
]
# What others have, too, and ends that a push tries for Hopper.
_SLOW = (
  *attention_test._IN_OTHERS,
  *attention_test._OF_HOPPER,
  *attention_test._OF_TRITON,
  'one_token',
  'one_token_prefill',
  'whole_bucket_prefill',
)
SPECS = [
  pytest.param(
    spec,
    id=spec.name,
    marks=[pytest.mark.slow] if spec.name in _SLOW else [],
  )
  for spec in small_specs.TESTS
  if attention_test._can(spec)
]


@pytest.fixture(autouse=True)
def interpreted_as_ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  monkeypatch.setattr(mosaic_devices, '_INTERPRETED_AS', '8.0')
  jax.clear_caches()  # of Hopper's, of the same name
  yield
  jax.clear_caches()


@pytest.mark.parametrize('spec', SPECS)
def test_equals_reference(spec: arg_spec.ArgSpec):
  attention_test.check(spec, 'pallas_mosaic')


def test_a_sequence_of_nan_ruins_itself_alone():
  for pages in ('k_pages', 'v_pages'):
    attention_test.test_a_sequence_of_nan_ruins_itself_alone(
      pages, 'pallas_mosaic'
    )


def test_splits_are_merged(monkeypatch: pytest.MonkeyPatch):
  """Of blocks so small that each decode has several."""
  spec = attention_test.fit(attention_test.MIXED, 'pallas_mosaic')
  arrays = arg_spec.make(spec, unused=float('nan'))
  want = attention_test.attend(spec, arrays, 'reference')
  sizes = tuning._MOSAIC_AMPERE[64]
  monkeypatch.setitem(
    tuning._MOSAIC_AMPERE, 64, sizes | {'small': (16, 16, 4, 3)}
  )
  monkeypatch.setattr(tuning, '_AT_ONCE', 64)
  got = attention_test.attend(spec, arrays, 'pallas_mosaic')
  real = sum(spec.all_q_lens)
  np.testing.assert_allclose(got[:real], want[:real], rtol=0, atol=2e-2)

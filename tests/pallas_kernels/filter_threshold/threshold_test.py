# SPDX-License-Identifier: Apache-2.0
"""The filters' threshold, by each implementation, against sorting."""

from __future__ import annotations

from collections.abc import Callable
import functools
import types
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels import filter_threshold
from pallas_kernels.filter_threshold import arg_specs
from pallas_kernels.filter_threshold import pallas_triton
from pallas_kernels.filter_threshold import reference
from pallas_kernels.filter_threshold import tuning
from pallas_kernels.filter_threshold import xla

NEVER = -np.inf
# A sketch of 64 logits, of which most rows here have more.
_SMALL = tuning.Sizes(16, 2, 2, 4)
_ROUNDING = 2e-6  # Of a sum of probabilities in float32.

FOUND: list[Any] = [
  pytest.param(xla.least_kept, id='xla'),
  pytest.param(
    pallas_triton.least_kept, marks=pytest.mark.gpu, id='pallas_triton'
  ),
  pytest.param(
    functools.partial(pallas_triton.least_kept, sizes=_SMALL),
    marks=pytest.mark.gpu,
    id='pallas_triton, small',
  ),
]
_by_name = pytest.mark.parametrize('find', FOUND)


@functools.cache
def _jitted(find: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
  jitted = jax.jit(find)
  return lambda *args: np.asarray(jitted(*args))


def _check(find: Callable[..., jax.Array], args: Any) -> int:
  """Compares with the definition; returns the rows that rounding decided."""
  got = _jitted(find)(*args)
  want, margin = np.array(
    [
      reference.least_of_row(x, int(k), float(p))
      for x, k, p in zip(*args, strict=True)
    ],
    np.float64,
  ).T
  is_clear = margin > _ROUNDING
  np.testing.assert_array_equal(got[is_clear], np.float32(want)[is_clear])
  return int((~is_clear).sum())


@_by_name
@pytest.mark.parametrize('kind', arg_specs.KINDS)
@pytest.mark.parametrize('vocab_size', [33, 500])
def test_is_what_sorting_finds(
  find: Callable[..., jax.Array], kind: str, vocab_size: int
):
  num_rows = 600
  spec = arg_specs.ArgSpec(kind, num_rows, vocab_size)
  assert _check(find, arg_specs.make(spec)) < num_rows // 50


@pytest.mark.gpu
@pytest.mark.parametrize('kind', arg_specs.KINDS)
def test_of_a_vocabulary_that_no_sketch_holds(kind: str):
  spec = arg_specs.ArgSpec(kind, 12, 50257)
  _check(pallas_triton.least_kept, arg_specs.make(spec, seed=1))


def _row(values: list[float], top_k: int, top_p: float) -> Any:
  x = np.array([values], np.float32)
  return x, np.array([top_k], np.int32), np.array([top_p], np.float32)


@_by_name
@pytest.mark.parametrize(
  ('values', 'top_k', 'top_p', 'least'),
  [
    ([-1, 0, -3, -1, -2], 4, 0.8, -1),  # The docstring's.
    ([-1, 0, -3, -1, -2], 1, 1, 0),
    ([-1, 0, -3, -1, -2], 2, 1, -1),  # A tie for the second place.
    ([-1, 0, -3, -1, -2], 5, 1, -3),
    ([-1, 0, -3, -1, -2], 99, 1, NEVER),
    ([-1, 0, -3, -1, -2], 0, 1, NEVER),
    ([-1, 0, -3, -1, -2], 0, 1e-6, 0),
    ([-1, 0, -3, -1, -2], 0, 0, 0),
    ([-1, 0, -3, -1, -2], 0, 1e-40, 0),
    ([-1, 0, -3, -1, -2], 0, 0.54, -1),
    ([0, 0, 0, 0, 0], 1, 0.1, 0),
    ([0, -0.0, -1, -2, -3], 1, 1, 0),
    ([NEVER, 0, NEVER, -1, NEVER], 3, 1, NEVER),
    ([NEVER, 0, NEVER, -1, NEVER], 2, 0.9, -1),
    ([NEVER, 0, NEVER, -1, NEVER], 0, 0.7, 0),
    ([NEVER] * 5, 2, 0.5, NEVER),
    ([-3e38, 0, -1e30, -1e-30, -2e38], 4, 1, -2e38),
    ([-3e38, 0, -1e30, -1e-30, -2e38], 0, 0.9, -1e-30),
  ],
)
def test_by_hand(
  find: Callable[..., jax.Array],
  values: list[float],
  top_k: int,
  top_p: float,
  least: float,
):
  args = _row(values, top_k, top_p)
  assert _jitted(find)(*args) == np.float32(least)
  assert reference.least_kept(*args) == np.float32(least)


@_by_name
def test_rows_do_not_depend_on_others(find: Callable[..., jax.Array]):
  args = arg_specs.make(arg_specs.ArgSpec('normal', 64, 500))
  whole = _jitted(find)(*args)
  some = np.random.default_rng(1).permutation(64)[:16]
  np.testing.assert_array_equal(
    _jitted(find)(*(x[some] for x in args)), whole[some]
  )


@pytest.mark.parametrize(
  ('top_k', 'top_p', 'passes'),
  [(0, 0.5, [0, 32]), (3, 1, [32, 0]), (3, 0.5, [32, 32]), (0, 1, [0, 0])],
)
def test_what_nobody_asks_for_makes_no_pass(
  monkeypatch: pytest.MonkeyPatch, top_k: int, top_p: float, passes: list[int]
):
  counts = []
  find = xla._largest_threshold

  def counted(keys: Any, is_asked: Any, enough: Callable[..., Any]) -> Any:
    counts.append(0)
    i = len(counts) - 1

    def count(kept: Any) -> Any:
      counts[i] += 1
      return np.asarray(enough(kept))

    with jax.disable_jit():
      return find(keys, is_asked, count)

  monkeypatch.setattr(xla, '_largest_threshold', counted)
  xla.least_kept(*_row([0, -1, -2], top_k, top_p))
  assert counts == passes


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({0: np.zeros(5, np.float32)}, r'logits=\(5,\): must have 2 axes'),
    ({0: np.zeros((1, 5), np.float16)}, r'logits=float16\(1, 5\): must be fl'),
    ({0: np.zeros((1, 0), np.float32)}, r'logits=\(1, 0\): must have a token'),
    ({1: np.zeros(2, np.int32)}, r'top_k=int32\(2,\): must be int32\(1,\)'),
    ({2: np.zeros(1, np.int32)}, r'top_p=int32\(1,\): must be float32'),
  ],
)
def test_what_does_not_fit_is_named(change: dict[int, np.ndarray], match: str):
  args = [change.get(i, x) for i, x in enumerate(_row([0, -1], 0, 1))]
  with pytest.raises(ValueError, match=match):
    filter_threshold.least_kept(*args)


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match="implementation='cub': must be None or"):
    filter_threshold.least_kept(*_row([0, -1], 0, 1), implementation='cub')


@pytest.mark.parametrize(
  ('device', 'name'),
  [
    (dict(platform='cpu'), 'xla'),
    (dict(platform='gpu', compute_capability='7.0'), 'xla'),
    (dict(platform='gpu', compute_capability='8.0'), 'pallas_triton'),
    (dict(platform='gpu', compute_capability='8.9'), 'pallas_triton'),
    (dict(platform='gpu', compute_capability='9.0a'), 'pallas_triton'),
    (dict(platform='gpu', compute_capability='10.0'), 'pallas_triton'),
    (dict(platform='tpu'), 'xla'),
  ],
)
def test_a_gpu_gets_the_kernel_where_it_can(
  device: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(
    devices, 'default', lambda: types.SimpleNamespace(**device)
  )
  assert tuning.fastest() == name
  if name == 'pallas_triton':
    assert tuning.choose().num_logits == 2**15
  elif device['platform'] != 'cpu':
    with pytest.raises(NotImplementedError, match='pallas_triton: '):
      pallas_triton.least_kept(*_row([0, -1], 0, 1))


def test_a_sketch_is_no_larger_than_the_row():
  sizes = tuning.Sizes(2048, 4, 4, 16)
  assert [
    sizes.for_vocab(n).num_tiles for n in (1, 8192, 8193, 32000, 151936)
  ] == [1, 1, 2, 4, 4]

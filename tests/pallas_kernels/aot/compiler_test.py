# SPDX-License-Identifier: Apache-2.0
"""Compiling for absent GPUs: what is missing is named, copies are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels import rotate_and_write
from pallas_kernels.aot import compiler
from pallas_kernels.aot import toolkit
from tests.pallas_kernels.aot import matmul


def test_unknown_devices_are_refused() -> None:
  with pytest.raises(ValueError, match=r"'b200': must be one of a100, a40"):
    compiler.devices_for('b200')


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(toolkit.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    toolkit.UnavailableError, match=r"pip install -e '\.\[aot\]'"
  ):
    compiler.devices_for.__wrapped__('a40')


@pytest.mark.parametrize(
  ('update', 'donated', 'expected'),
  [
    (lambda kv, x: kv.at[3].set(x), True, []),
    (
      lambda kv, x: kv.at[3].set(x),
      False,
      ['0 bytes are updated in place', 'copies of the KV cache'],
    ),
    (
      lambda kv, x: (kv.at[3].set(x), kv.at[4].set(x)),
      True,
      ['copies of the KV cache'],
    ),
  ],
)
def test_copies_of_the_cache_are_found(
  update: Callable[..., Any], donated: bool, expected: list[str]
) -> None:
  kv, x = jnp.zeros((64, 4, 128)), jnp.ones((4, 128))
  compiled = (
    jax.jit(update, donate_argnums=0 if donated else ()).lower(kv, x).compile()
  )
  problems = compiler.in_place_problems(compiled, kv, kv)
  assert len(problems) == len(expected)
  for problem, words in zip(problems, expected, strict=True):
    assert words in problem


def compile_for(fn: Any, args: Any, device: str) -> Any:
  """Compiles a function that may write to its first argument."""
  with compiler.on(device):
    return (
      jax.jit(fn, donate_argnums=0)
      .lower(*compiler.placed(args, device))
      .compile({'xla_gpu_cuda_data_dir': str(toolkit.find())})
    )


@matmul.needs_wheels
def test_a_donated_cache_is_written_in_place() -> None:
  kv = jax.ShapeDtypeStruct((64, 8, 64, 128), jnp.bfloat16)
  compiled = compile_for(lambda kv: kv.at[3].set(1), (kv,), 'h100')
  assert not compiler.in_place_problems(compiled, kv, kv)


@matmul.needs_wheels
@pytest.mark.parametrize(
  'dtype',
  [
    'bfloat16',
    'int8',
    pytest.param('float8_e4m3fn', marks=pytest.mark.slow),  # as int8
  ],
)
@pytest.mark.parametrize('writer', ['xla', 'pallas_triton'])
def test_a_cache_is_written_in_place_and_read(dtype: str, writer: str) -> None:
  """Also where the device knows no fp8."""

  def step(
    pages: Any, q: jax.Array, k: jax.Array, slots: jax.Array, ints: Any
  ) -> Any:
    q, pages = rotate_and_write.rotate_and_write(
      q, k, k, None, *pages, slots, implementation=writer
    )
    return pages, rpa.ragged_paged_attention(
      q, *pages, *ints, scale=1.0, implementation='pallas_triton'
    )

  def array(*shape: int, dtype: str = 'int32') -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  pages = jax.eval_shape(
    lambda: rpa.init_pages(512, 64, 8, 128, dtype, 'pallas_triton')
  )
  compiled = compile_for(
    step,
    (
      pages,
      array(64, 32, 128, dtype='bfloat16'),
      array(64, 8, 128, dtype='bfloat16'),
      array(64),
      (array(8), array(8, 16), array(9), array(2)),
    ),
    'a100',
  )
  assert not compiler.in_place_problems(compiled, pages, pages)

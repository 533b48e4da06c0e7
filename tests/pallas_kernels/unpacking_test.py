# SPDX-License-Identifier: Apache-2.0
"""The instructions that convert kept bytes, run here one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import unpacking

Words = np.ndarray  # [N] uint32, a register of N threads


def permute(low: Words, high: Words, selector: Words) -> Words:
  """PTX's prmt.b32: takes bytes of both words, one for each nibble."""
  both = [(w >> (8 * i)) & 0xFF for w in (low, high) for i in range(4)]
  nibbles = [int(selector[0]) >> (4 * i) & 0xF for i in range(4)]
  assert max(nibbles) < 8
  return np.bitwise_or.reduce(
    [both[n] << (8 * i) for i, n in enumerate(nibbles)]
  )


def combine(a: Words, b: Words, c: Words, table: Words) -> Words:
  """PTX's lop3.b32, of the one table that is used."""
  assert table[0] == 0xF0 & 0xCC | 0xAA
  return a & b | c


def fma(dtype: type) -> Callable[[Words, Words, Words], Words]:
  """PTX's fma.rn of two halves: rounds a * b + c once."""

  def run(a: Words, b: Words, c: Words) -> Words:
    wide = [x.view(dtype).astype(np.float64) for x in (a, b, c)]
    return (wide[0] * wide[1] + wide[2]).astype(dtype).view(np.uint32)

  return run


def largest(a: Words, b: Words) -> Words:
  """PTX's max of two bfloat16."""
  halves = (x.view(ml_dtypes.bfloat16) for x in (a, b))
  return np.maximum(*halves).view(np.uint32)


INSTRUCTIONS: Mapping[str, Callable[..., Words]] = {
  'mov.b32': lambda x: x,
  'prmt.b32': permute,
  'and.b32': np.bitwise_and,
  'lop3.b32': combine,
  'shr.u32': np.right_shift,
  'shl.b32': np.left_shift,
  'max.bf16x2': largest,
  'fma.rn.f16x2': fma(np.float16),
  'fma.rn.bf16x2': fma(ml_dtypes.bfloat16),
}


def run(assembly: str, *given: Words) -> list[Words]:
  """Runs a listing, given $2 and those that follow; returns $0 and $1."""
  registers = {f'${2 + i}': words for i, words in enumerate(given)}
  for line in re.findall(r'^(\w+\.\S+ .*);$', assembly, re.MULTILINE):
    name, _, operands = line.partition(' ')
    target, *sources = operands.split(', ')
    registers[target] = INSTRUCTIONS[name](
      *(
        registers[s] if s in registers else np.full_like(given[0], int(s, 0))
        for s in sources
      )
    )
  return [registers['$0'], registers['$1']]


@pytest.mark.parametrize('kept', [jnp.int8, jnp.uint8])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_every_byte_becomes_its_number(kept: type, dtype: str) -> None:
  values = np.random.default_rng(0).integers(0, 256, (4096, 4), np.uint8)
  values[:256, :] = np.arange(256, dtype=np.uint8)[:, None]
  halves = unpacking.HALVES[dtype]
  low, high = run(
    unpacking.assembly(jnp.dtype(kept), halves), values.view(np.uint32)[:, 0]
  )
  expected = unpacking.decode(jnp.asarray(values.view(kept)), dtype)
  found = np.stack([low, high], 1).view(np.uint16)
  np.testing.assert_array_equal(
    found, np.asarray(expected).view(np.uint16).reshape(found.shape)
  )

# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax

from pallas_kernels.ragged_paged_attention import arg_specs as attention_specs
from pallas_kernels.rotate_and_write import arg_specs
from pallas_kernels.rotate_and_write import pallas_triton

# Models of which pages of each dtype are compiled, one of each head dim; of the
# others, as of all, in bfloat16 alone.
_OF_EACH_HEAD_DIM = ('mistral-7b', 'falcon-7b', 'phi-2', 'h96', 'gemma-7b')
_KEPT = 'float32', 'int8', 'float8_e4m3fn'
_HALVES = {'phi-2': 16}  # pairs that are turned, where not all are


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    model: for people.
    spec: the shapes.
  """

  model: str
  spec: arg_specs.ArgSpec

  @property
  def name(self) -> str:
    kept = self.spec.kv_dtype or self.spec.dtype
    rows = '' if self.spec.num_rows is None else ', some rows'
    still = ', no rotation' if self.spec.half is None else ''
    norms = ', norms' * self.spec.norms
    return f'{self.model} rotate and write {kept}{rows}{still}{norms}'

  def function(self, *args: Any) -> Any:
    return pallas_triton.rotate_and_write(*args)

  @property
  def args(self) -> Any:
    return jax.eval_shape(lambda: tuple(arg_specs.make(self.spec).values()))


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  del device  # All have the same.
  for model, (heads, kv_heads, head_dim) in attention_specs.HEADS.items():
    spec = arg_specs.ArgSpec(
      heads,
      kv_heads,
      head_dim,
      _HALVES.get(model, head_dim // 2),
      dtype='bfloat16',
      num_tokens=64,
      page_size=64,
    )
    yield Case(model, spec)
    if model in _OF_EACH_HEAD_DIM:
      for kept in _KEPT:
        yield Case(model, dataclasses.replace(spec, kv_dtype=kept))
    if model == 'mistral-7b':
      yield Case(model, dataclasses.replace(spec, dtype='float16'))
      yield Case(model, dataclasses.replace(spec, half=None))
      yield Case(model, dataclasses.replace(spec, num_rows=8))
    if head_dim == 128:  # as Qwen3's
      yield Case(model, dataclasses.replace(spec, norms=True))

# SPDX-License-Identifier: Apache-2.0
"""What qwix quantizes is served as it is, where that is installed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import models
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized
from sarathi_jax.runner import params as params_lib
from tests import tiny

qwix = pytest.importorskip('qwix', reason='needs qwix: scripts/test --slow')
pytestmark = [
  pytest.mark.tunix,
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
]


@pytest.mark.parametrize('codes', ['int8', 'fp8', 'int4'])
@pytest.mark.parametrize('group', [None, 32])
def test_numbers_are_those_of_qwix(codes: str, group: int | None) -> None:
  dtype = {'fp8': jnp.float8_e4m3fn}.get(codes, codes)
  model = dataclasses.replace(
    tiny.MODEL,
    hidden_size=64,
    intermediate_size=96,
    head_dim=32,
    quantization=quantization_lib.Quantization(codes=codes, group=group),
  )
  plain = dataclasses.replace(model, quantization=None)
  params = models.init_params(plain, jax.random.key(0), jnp.bfloat16)

  def one(path: Any, spec: Any, leaf: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    assert model.quantization is not None
    if not spec.is_factor or not model.quantization.covers(name):
      return leaf
    return qwix.quantize(
      leaf,
      dtype,
      channelwise_axes=[1],
      tiled_axes={} if group is None else {0: group},
    )

  given = jax.tree.map_with_path(one, models.param_specs(plain), params)
  taken = params_lib.check_params(model, given)
  node = taken['layers'][0]['mlp']['down']
  array = given['layers'][0]['mlp']['down']
  assert isinstance(node, quantized.Quantized)
  np.testing.assert_array_equal(
    quantized.dequantize(node, jnp.bfloat16), qwix.dequantize(array)
  )
  if codes != 'int4':
    assert node.values is array.qvalue

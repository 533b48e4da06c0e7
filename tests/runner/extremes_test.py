# SPDX-License-Identifier: Apache-2.0
"""Whatever `SamplingParams` takes can be packed for the device.

What can't would fail the step, and with it all requests that sample in it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.engine import checks
from sarathi_jax.engine import info as info_lib
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.scheduler import sequence as sequence_lib

V = 23
_SIZES = (
  *(1, 2, 2**53, 10**30, 10**400),
  *(2**bits + more for bits in (31, 32, 63, 64) for more in (-1, 0, 1)),
  *(1e-45, 5e-324, 1e38, 4e38, sys.float_info.max, math.inf, math.nan),
)
_NUMBERS = (0, *_SIZES, *(-size for size in _SIZES))
_CONFIG = config_lib.SchedulerConfig(
  token_budget=8, max_num_seqs=2, max_model_len=40, num_pages=10, page_size=4
)
_INFO = info_lib.EngineInfo.of(_CONFIG, policy='sarathi', vocab_size=V)
_LAYOUT = batch_lib.BatchLayout(8, 2, 2, 10)


def _values(field: sampling_params.Field) -> list[Any]:
  """Returns the extremes of what a field may be made of."""
  kind = sampling_params.Kind
  if field.kind is kind.IDS:
    return [[number] for number in _NUMBERS]
  if field.kind is kind.BIAS:
    return [
      *({number: 1.0} for number in _NUMBERS),
      *({str(number): 1.0} for number in _NUMBERS),
      *({1: number} for number in _NUMBERS),
    ]
  return _NUMBERS if field.kind in (kind.INT, kind.LONG, kind.FLOAT) else []


_CASES = [
  (name, value)
  for name, field in sampling_params.FIELDS.items()
  for value in _values(field)
]


@pytest.mark.parametrize('name', dict(_CASES))
def test_each_extreme_is_refused_or_packed(name: str) -> None:
  """And refused by an error that clients are told."""
  num_refused = num_packed = 0
  for value in (value for field, value in _CASES if field == name):
    try:
      request = types.Request(
        request_id='r',
        prompt_token_ids=(3, 4),
        # A penalty has the device set up, and told of tokens.
        sampling=types.SamplingParams(
          **{'max_tokens': None, 'repetition_penalty': 2.0, name: value}
        ),
      )
      checks.check_tokens(request, _INFO)
    except errors.InvalidRequestError:
      num_refused += 1
      continue
    _pack(request)
    num_packed += 1
  assert num_refused and num_packed


def _pack(request: types.Request) -> None:
  """Packs what a step of a request's last output has."""
  seq = sequence_lib.Sequence.of(
    request, _CONFIG, 0, request.sampling.seed or 0, index=1
  )
  chunk = types.Chunk(
    request_id='r',
    slot=1,
    start=0,
    tokens=(3, 4),
    num_tokens=2,
    page_table=(1,),
    is_prefill=True,
    samples=1,
    prompt_len=seq.prompt_len,
    seed=seq.seed,
    sampling=request.sampling,
    setup=seq.setup and seq.setup._replace(tokens=(3, 4)),
  )
  fork = types.Fork(0, chunk._replace(slot=0, tokens=(), num_tokens=0))
  batch_lib.BatchBuilder(2, 10).build(
    types.ScheduledBatch(0, (chunk,), 2, forks=(fork,)), _LAYOUT
  )
  if chunk.setup is not None:
    for ints in adjusting.messages(chunk):
      assert ints.dtype == np.int32

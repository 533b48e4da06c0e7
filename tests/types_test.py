# SPDX-License-Identifier: Apache-2.0
"""What users send is refused at the border, by field, value and rule."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import types
from tests import sampling_fields

HUGE = 10**400  # An integer that no float can hold: JSON may have one.
BAD, NOT_SUPPORTED = sampling_fields.BAD, sampling_fields.NOT_SUPPORTED
BAD_HUGE = pytest.param(
  'temperature', HUGE, 'must be finite and >= 0', id='temperature-huge'
)


@pytest.mark.parametrize(('field', 'value', 'rule'), (*BAD, BAD_HUGE))
def test_a_bad_value_is_refused(field: str, value: Any, rule: str) -> None:
  with pytest.raises(errors.InvalidRequestError) as caught:
    types.SamplingParams(**{field: value})
  message = str(caught.value)
  assert message.startswith((f'{field}=', f'{field}.'))
  assert rule in message
  with pytest.raises(errors.InvalidRequestError):
    types.SamplingParams.from_dict({field: value})


@pytest.mark.parametrize(
  ('seed', 'kept'),
  [
    (-(2**63), -(2**63)),
    (2**63 - 1, 2**63 - 1),
    (0, 0),
    (None, None),
    (-1, None),
  ],
)
def test_seeds_are_those_that_vllm_takes(
  seed: int | None, kept: int | None
) -> None:
  assert types.SamplingParams(seed=seed).seed == kept


def test_every_field_has_an_example() -> None:
  params = types.SamplingParams(**sampling_fields.EXAMPLES)
  default = types.SamplingParams()
  for field in sampling_params.FIELDS:
    assert getattr(params, field) != getattr(default, field)


def test_every_field_has_a_bad_value() -> None:
  assert {field for field, _, _ in BAD} == set(
    types.SamplingParams.__dataclass_fields__
  )


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('max_tokens', None),
    ('max_tokens', 1),
    ('temperature', 0),
    ('top_k', -1),
    ('top_k', 0),
    ('top_k', 2**40),
    ('top_p', 1),
    ('min_p', 0),
    ('min_p', 1),
    ('seed', 0),
    ('seed', 2**31 - 1),
    ('logprobs', 0),
    ('logprobs', 20),
    ('logprobs', None),
    ('prompt_logprobs', 0),
    ('logprob_token_ids', (7,) * 128),
    ('stop_token_ids', (0,)),
  ],
)
def test_the_ends_of_each_range_are_accepted(field: str, value: Any) -> None:
  assert getattr(types.SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
  'field',
  [
    name
    for name, field in sampling_params.FIELDS.items()
    if field.none_is_default
  ],
)
def test_none_is_the_default_where_vllm_takes_it(field: str) -> None:
  default = types.SamplingParams()
  assert types.SamplingParams(**{field: None}) == default
  assert types.SamplingParams.from_dict({field: None}) == default
  hot = sampling_fields.EXAMPLES[field]
  # What the checkpoint's makers recommend, then.
  assert types.SamplingParams.from_dict({field: None}, {field: hot}) == (
    types.SamplingParams(**{field: hot})
  )


def test_what_is_said_comes_before_defaults() -> None:
  params = types.SamplingParams.from_dict(
    {'max_tokens': None, 'top_k': 0}, {'max_tokens': 3, 'top_k': 9, 'seed': 1}
  )
  assert params == types.SamplingParams(max_tokens=None, seed=1)


@pytest.mark.parametrize(
  'scalar',
  [
    np.float32,
    np.float64,
    np.array,
    jnp.float32,
    jnp.bfloat16,
    ml_dtypes.bfloat16,
  ],
)
def test_real_scalars_of_numpy_and_jax_are_taken(scalar: Any) -> None:
  params = types.SamplingParams(
    temperature=scalar(0.5), top_p=scalar(0.25), min_p=scalar(0.125)
  )
  assert params == types.SamplingParams(
    temperature=0.5, top_p=0.25, min_p=0.125
  )
  assert {type(params.temperature), type(params.top_p)} == {float}


@pytest.mark.parametrize(
  'scalar', [np.int32, np.uint64, np.int8, np.array, jnp.int32]
)
def test_whole_scalars_of_numpy_and_jax_are_taken(scalar: Any) -> None:
  params = types.SamplingParams(
    max_tokens=scalar(3),
    top_k=scalar(4),
    seed=scalar(5),
    stop_token_ids=[scalar(6)],
    logit_bias={7: scalar(2)},
    allowed_token_ids=np.array([8, 9]),
    min_tokens=scalar(1),
    logprobs=scalar(0),
  )  # type: ignore[arg-type]
  assert json.loads(json.dumps(dataclasses.asdict(params))) == {
    **dataclasses.asdict(types.SamplingParams()),
    'max_tokens': 3,
    'top_k': 4,
    'seed': 5,
    'stop_token_ids': [6],
    'logit_bias': {'7': 2},
    'allowed_token_ids': [8, 9],
    'min_tokens': 1,
    'logprobs': 0,
    'stop': [],
    'bad_token_ids': [],
    'bad_words': [],
  }
  assert types.SamplingParams(
    ignore_eos=np.True_,
    stop_token_ids=np.array([6, 7]),  # type: ignore
  ) == types.SamplingParams(ignore_eos=True, stop_token_ids=(6, 7))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', np.float32('nan')),
    ('temperature', np.True_),
    ('top_k', np.float64(3)),
    ('seed', np.uint64(2**63)),
    ('top_p', np.float32(2)),
    ('max_tokens', np.array([3])),
    ('stop_token_ids', np.array([1.5])),
    ('stop_token_ids', np.array([[1]])),
  ],
)
def test_bad_scalars_of_numpy_are_refused_as_others(
  field: str, value: Any
) -> None:
  with pytest.raises(errors.InvalidRequestError, match=f'^{field}='):
    types.SamplingParams(**{field: value})


def test_stop_takes_a_string_or_a_list() -> None:
  assert types.SamplingParams(stop='ab').stop == ('ab',)  # type: ignore
  assert types.SamplingParams(stop=['a', 'b']).stop == ('a', 'b')  # type: ignore
  params = types.SamplingParams.from_dict({'stop': ['a'], 'seed': 3})
  assert params == types.SamplingParams(stop=('a',), seed=3)
  assert hash(params) == hash(types.SamplingParams(stop=('a',), seed=3))


@pytest.mark.parametrize(('field', 'value'), NOT_SUPPORTED)
def test_what_vllm_knows_and_we_do_not_is_refused_by_name(
  field: str, value: Any
) -> None:
  with pytest.raises(errors.UnsupportedError) as caught:
    types.SamplingParams.from_dict({field: value})
  assert str(caught.value).startswith(f'{field}={value!r}: ')


def test_every_unsupported_field_is_tested() -> None:
  tested = {field for field, _ in NOT_SUPPORTED} | {'repetition_detection'}
  assert tested == set(sampling_params.UNSUPPORTED)


@pytest.mark.parametrize('field', sorted(sampling_params.UNSUPPORTED))
def test_neutral_values_of_unsupported_fields_pass(field: str) -> None:
  neutral = sampling_params.UNSUPPORTED[field]
  assert (
    types.SamplingParams.from_dict({field: neutral}) == types.SamplingParams()
  )
  assert types.SamplingParams.from_dict({field: None}) == types.SamplingParams()


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('bad_words', []),
    ('logit_bias', {}),
    ('frequency_penalty', 0),
    ('repetition_penalty', 1),
  ],
)
def test_json_spellings_of_neutral_values_pass(field: str, value: Any) -> None:
  assert (
    types.SamplingParams.from_dict({field: value}) == types.SamplingParams()
  )


def test_an_unknown_field_is_refused_and_the_known_are_named() -> None:
  with pytest.raises(errors.InvalidRequestError) as caught:
    types.SamplingParams.from_dict({'temprature': 1})
  assert 'temprature=1: unknown sampling field' in str(caught.value)
  assert 'temperature' in str(caught.value)


@pytest.mark.parametrize('fields', [[], 'greedy', 3, None])
def test_sampling_that_is_no_object_is_refused(fields: Any) -> None:
  with pytest.raises(errors.InvalidRequestError, match='sampling='):
    types.SamplingParams.from_dict(fields)

# SPDX-License-Identifier: Apache-2.0
"""Workloads: the paper's quantiles, the rates asked for, bad traces."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax.simulator import workload

Config = workload.WorkloadConfig

# The paper's table 2, outputs' deviations put right; see lengths.DATASETS.
TABLE_2 = {
  'openchat_sharegpt4': ((1730, 5696, 2088), (415, 834, 265.6), 8192),
  'arxiv_summarization': ((7059, 12985, 3638), (208, 371, 101), 16384),
}


@pytest.mark.parametrize('name', TABLE_2)
def test_datasets_have_the_quantiles_of_the_paper(name: str) -> None:
  made = workload.make(Config(source=name, num_requests=50_000))
  *expected, cap = TABLE_2[name]
  for lens, (median, p90, std) in zip(
    (made.prompt_lens, made.output_lens), expected, strict=True
  ):
    assert np.median(lens) == pytest.approx(median, rel=0.03)
    assert np.quantile(lens, 0.9) == pytest.approx(p90, rel=0.03)
    assert np.std(lens) == pytest.approx(std, rel=0.03)
    assert lens.min() >= 1
  assert (made.prompt_lens + made.output_lens).max() <= cap


def test_short_chats_are_log_normal_and_cut() -> None:
  made = workload.make(Config(source='short_chat', num_requests=50_000))
  rng = np.random.default_rng(0)
  for lens, (mean, sigma, least, most) in (
    (made.prompt_lens, (5.5, 0.9, 16, 900)),
    (made.output_lens, (4.1, 0.6, 8, 120)),
  ):
    expected = rng.lognormal(mean, sigma, 50_000).clip(least, most)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
      assert np.quantile(lens, q) == pytest.approx(
        np.quantile(expected, q), rel=0.05
      )
    assert lens.mean() == pytest.approx(expected.mean(), rel=0.05)
    assert least <= lens.min() and lens.max() == most


@pytest.mark.parametrize(('arrivals', 'cv'), [('poisson', 1), ('gamma', 3)])
def test_gaps_have_the_rate_and_variation_asked_for(
  arrivals: str, cv: float
) -> None:
  made = workload.make(
    Config(arrivals=arrivals, cv=3, qps=2.5, num_requests=100_000)
  )
  gaps = np.diff(made.arrived_at)
  assert made.qps == pytest.approx(2.5, rel=0.03)
  assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_the_seed_decides_and_the_rate_changes_the_rate_only() -> None:
  one, same, fast, other = (
    workload.make(Config(num_requests=100, qps=qps, seed=seed))
    for qps, seed in ((1, 0), (1, 0), (4, 0), (1, 1))
  )
  np.testing.assert_array_equal(one.prompt_lens, same.prompt_lens)
  np.testing.assert_array_equal(one.arrived_at, same.arrived_at)
  np.testing.assert_array_equal(one.prompt_lens, fast.prompt_lens)
  np.testing.assert_allclose(one.arrived_at, fast.arrived_at * 4)
  assert (one.prompt_lens != other.prompt_lens).any()
  np.testing.assert_allclose(one.at_rate(3).qps, 3)


def _trace(folder: pathlib.Path, text: str) -> str:
  path = folder / 'trace.csv'
  path.write_text(text)
  return str(path)


def test_the_artifact_makes_the_same_requests(tmp_path: pathlib.Path) -> None:
  path = _trace(
    tmp_path,
    'num_prefill_tokens,num_decode_tokens\n'
    + ''.join(f'{i},{2 * i}\n' for i in range(1, 11)),
  )
  made = workload.make(
    Config(source=path, arrivals='artifact', seed=42, qps=2, num_requests=5)
  )
  # DataFrame.sample(frac=1, random_state=42) of ten rows.
  assert made.prompt_lens.tolist() == [9, 2, 6, 1, 8]
  assert made.output_lens.tolist() == [18, 4, 12, 2, 16]
  # random.seed(42): 0.6394, 0.0250, 0.2750, ...
  np.testing.assert_allclose(
    np.diff(made.arrived_at[:3]) * 2,
    [-np.log1p(-0.0250108), -np.log1p(-0.2750293)],
    rtol=1e-4,
  )
  many = workload.make(Config(arrivals='artifact', num_requests=20_000))
  assert np.diff(many.arrived_at).max() == pytest.approx(3)
  assert many.qps == pytest.approx(1 / 0.9502, rel=0.02)


def test_a_trace_comes_as_it_is(tmp_path: pathlib.Path) -> None:
  path = _trace(
    tmp_path,
    'arrived_at,num_prefill_tokens,num_decode_tokens\n5,10,3\n6,20,4\n9,30,5\n',
  )
  config = Config(source=path, arrivals='trace', qps=None)
  made = workload.make(config)
  assert made.arrived_at.tolist() == [0, 1, 4]
  assert made.prompt_lens.tolist() == [10, 20, 30]
  assert made.output_lens.tolist() == [3, 4, 5]
  scaled = workload.make(dataclasses.replace(config, qps=5))
  np.testing.assert_allclose(scaled.arrived_at, [0, 0.1, 0.4])
  more = workload.make(Config(source=path, num_requests=50))
  assert len(more) == 50
  assert set(more.prompt_lens.tolist()) == {10, 20, 30}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('num_prefill_tokens\n1\n', 'num_decode_tokens is missing'),
    ('', 'num_prefill_tokens is missing'),
    ('num_prefill_tokens,num_decode_tokens\n', 'at least one request'),
    (
      'num_prefill_tokens,num_decode_tokens\n3,-1\n',
      "line 2: num_decode_tokens='-1'",
    ),
    (
      'num_prefill_tokens,num_decode_tokens\n3,4\n0,4\n',
      "line 3: num_prefill_tokens='0'",
    ),
    ('num_prefill_tokens,num_decode_tokens\n1e15,4\n', 'must be an integer in'),
    ('num_prefill_tokens,num_decode_tokens\n3.5,4\n', 'must be an integer in'),
    ('num_prefill_tokens,num_decode_tokens\nmany,4\n', "'many'"),
    ('num_prefill_tokens,num_decode_tokens\n7\n', 'num_decode_tokens=None'),
    (
      'arrived_at,num_prefill_tokens,num_decode_tokens\n2,1,1\n1,1,1\n',
      'none before the line above',
    ),
  ],
)
def test_bad_traces_are_refused_by_line(
  tmp_path: pathlib.Path, text: str, message: str
) -> None:
  with pytest.raises(errors.ConfigError) as caught:
    workload.make(Config(source=_trace(tmp_path, text)))
  assert message in str(caught.value)


@pytest.mark.parametrize(
  ('fields', 'field'),
  [
    (dict(source='nowhere'), 'workload'),
    (dict(arrivals='uniform'), 'arrivals'),
    (dict(qps=0), 'qps'),
    (dict(qps=None), 'qps'),
    (dict(cv=-1), 'cv'),
    (dict(num_requests=0), 'num_requests'),
    (dict(seed=-1), 'seed'),
  ],
)
def test_bad_configs_name_the_field(fields: dict, field: str) -> None:
  with pytest.raises(errors.ConfigError, match=f'^{field}='):
    Config(**fields)


def test_arrivals_of_a_trace_without_any(tmp_path: pathlib.Path) -> None:
  path = _trace(tmp_path, 'num_prefill_tokens,num_decode_tokens\n3,4\n')
  with pytest.raises(errors.ConfigError, match='has no column arrived_at'):
    workload.make(Config(source=path, arrivals='trace'))

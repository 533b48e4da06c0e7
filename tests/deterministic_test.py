# SPDX-License-Identifier: Apache-2.0
"""With `deterministic`, all bits are the same however a request is run.

What is compared is all that a request is told: its tokens, the
log-probabilities of these, of the likeliest 20, and of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights
from tests import equivalence_test as keystone
from tests import logprobs_oracle
from tests import naive
from tests import prefix_equivalence_test as prefixes
from tests import tiny

BUDGET = 20
_PLAIN = {f.name for f in dataclasses.fields(keystone.MODEL)}
# A mixture of experts of the same sizes: each reads other rows in each step.
MODELS: dict[str, model_config_lib.ModelConfig] = {
  'llama': keystone.MODEL,
  'experts': model_config_lib.MixtralConfig(
    **{name: getattr(keystone.MODEL, name) for name in _PLAIN},
    num_experts=6,
    experts_per_token=2,
  ),
}
Told = dict[str, tuple[Any, ...]]  # by the keys of outputs


@functools.cache
def make_runner(
  dtype: str, kv_cache_dtype: str, tp: int, name: str = 'llama'
) -> device_runner.DeviceRunner:
  model = MODELS[name]
  params = jax.tree.map(
    lambda x: x.astype(dtype),
    models.init_params(model, jax.random.key(0), jnp.float32, scale=0.3),
  )
  mesh = mesh_lib.make(parallel.Parallelism(tp=tp, pp=tp))
  layout = placement.of_live(jnp.dtype(dtype))
  with tiny.few_sizes():
    return device_runner.DeviceRunner(
      model,
      weights.place_live(model, mesh, layout, params),
      layout,
      mesh,
      config_lib.EngineConfig(
        token_budget=BUDGET,
        max_num_seqs=keystone.MAX_SEQS,
        page_size=keystone.PAGE_SIZE,
        num_pages=keystone.PLENTY,
        kv_cache_dtype=kv_cache_dtype,
        deterministic=True,
      ),
      lambda max_model_len: BUDGET,
    )


@pytest.fixture(
  scope='module',
  params=[
    ('float32', 'auto', 1),
    ('bfloat16', 'auto', 1),
    ('float32', 'int8', 1),
    ('float32', 'auto', 1, 'experts'),
    pytest.param(('float32', 'auto', 2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def runner(request: pytest.FixtureRequest) -> device_runner.DeviceRunner:
  return make_runner(*request.param)


@pytest.fixture(scope='module')
def requests() -> list[types.Request]:
  """All that can be asked for; prompts begin alike."""
  vocab_size = keystone.MODEL.vocab_size
  beginning = tuple(range(33))
  found = [
    *naive.make_requests(vocab_size, [1, 8, 16, 50]),
    *naive.make_adjusted(vocab_size, [2, 41]),
    *naive.make_several(vocab_size, [33, 5], 3),
    *logprobs_oracle.requests(vocab_size, [9, 30]),
  ]
  return [
    dataclasses.replace(
      request,
      request_id=f'{i} {request.request_id}',
      key='',
      prompt_token_ids=(
        beginning[: 5 + 7 * (i % 5)] + request.prompt_token_ids
      )[: keystone.MAX_LEN - 26],
    )
    for i, request in enumerate(found)
  ]


def run(
  runner: device_runner.DeviceRunner,
  *waves: Sequence[types.Request],
  token_budget: int = BUDGET,
  num_pages: int = keystone.PLENTY,
  look_ahead: bool = True,
  wrap: Callable[..., Any] | None = None,
  **limits: Any,
) -> list[Told]:
  engine, scheduler = naive.make_engine(
    runner,
    vocab_size=keystone.MODEL.vocab_size,
    max_num_seqs=keystone.MAX_SEQS,
    max_model_len=keystone.MAX_LEN,
    page_size=keystone.PAGE_SIZE,
    windows=runner.windows,
    num_stages=runner.num_stages,
    token_budget=token_budget,
    num_pages=num_pages,
    look_ahead=look_ahead,
    **limits,
  )
  if wrap is not None:
    engine._runner = wrap(runner, scheduler)
  told = [
    {
      name: (c.token_ids, c.logprobs, c.told, c.prompt_logprobs)
      for name, c in naive.finish(engine, wave).items()
    }
    for wave in waves
  ]
  if num_pages != keystone.PLENTY:
    assert engine.stats().num_preemptions
  if len(waves) > 1:
    assert scheduler.prefixes.num_found > 100
  return told


@pytest.fixture(scope='module')
def cold(runner, requests) -> Told:
  (told,) = run(runner, requests, prefix_cache=False)
  return told


def test_it_is_what_would_be_computed_anyhow(requests):
  """To rounding: that of the sums of a naive recompute."""
  runner = make_runner('float32', 'auto', 1)
  plain = [r for r in requests if not r.sampling.telling]
  (got,) = run(runner, plain)
  recompute = naive.recompute(keystone.MODEL, keystone.make_params())
  naive.assert_same(
    {name: (list(told[0]), list(told[1])) for name, told in got.items()},
    {r.request_id: recompute(r) for r in naive.apart(plain)},
  )


def test_whatever_else_runs(runner, requests, cold):
  (got,) = run(runner, requests[::-1], prefix_cache=False)
  assert got == cold
  for request in requests[::4]:
    (got,) = run(runner, [request], prefix_cache=False)
    assert got == {name: cold[name] for name in got}


@pytest.mark.parametrize('token_budget,look_ahead', [(9, True), (13, False)])
def test_however_prompts_are_cut_and_whoever_is_preempted(
  runner, requests, cold, token_budget, look_ahead
):
  assert run(
    runner,
    requests,
    token_budget=token_budget,
    num_pages=keystone.SCARCE,
    look_ahead=look_ahead,
    prefix_cache=False,
  ) == [cold]


@pytest.mark.parametrize('num_pages', [keystone.PLENTY, keystone.SCARCE])
def test_whether_or_not_its_beginning_is_found(
  runner, requests, cold, num_pages
):
  """What is in no page that can be found is spoilt, scales included."""
  waves = [requests, requests[::-1]]
  assert run(runner, *waves, num_pages=num_pages, wrap=prefixes.Poisoning) == [
    cold,
    cold,
  ]


def test_decodes_by_other_sums_are_noticed(requests, monkeypatch):
  """The negative control: all is as above, but for the attention.

  That is XLA's, of pages of 8 bits: our kernel computes decodes as chunks.
  """
  for name in ('make_plan', 'ragged_paged_attention'):
    function = getattr(rpa, name)
    monkeypatch.setattr(
      rpa,
      name,
      lambda *args, function=function, batch_invariant, **kwargs: function(
        *args, **kwargs
      ),
    )
  runner = make_runner.__wrapped__('float32', 'int8', 1)
  cold, hot = run(runner, requests, requests)
  assert sum(cold[name] != hot[name] for name in cold) > len(cold) / 4


def test_pages_whose_scales_are_not_there_are_noticed(requests):
  """Another: of a quantized cache, the scales of what is found are spoilt."""

  class Spoiling(prefixes.Poisoning):
    def kept(self) -> set[int]:
      return set()

  runner = make_runner('float32', 'int8', 1)
  first, second = run(runner, requests, requests, wrap=Spoiling)
  assert any(first[name] != second[name] for name in first)

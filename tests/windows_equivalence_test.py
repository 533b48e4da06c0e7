# SPDX-License-Identifier: Apache-2.0
"""The keystone where pages before windows are given back.

A model whose layers have windows, or none, in several groups, and one whose
layers all have the same. Whatever lies in a page that nobody holds, and that
can't be found, is made NaN before each step: none of it may be read.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import page_groups
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights
from tests import equivalence_test as keystone
from tests import naive
from tests import prefix_equivalence_test as poisoned
from tests import tiny

_SIZES: dict[str, Any] = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  max_position_embeddings=keystone.MAX_LEN,
)
PAGE_SIZE = 8
MODELS = {
  'mixed': model_config_lib.LlamaConfig(
    **_SIZES, num_layers=4, sliding_window=21, window_layers=(0, 1, 3)
  ),
  'all': model_config_lib.LlamaConfig(
    **_SIZES, num_layers=2, sliding_window=13
  ),
}
WINDOWS = {'mixed': (None, 21, 21, 21), 'all': (13,)}
# Of sequences of the whole length: all of them, and two that go on.
PLENTY = {'mixed': 8 * 48, 'all': 8 * 12}
SCARCE = {'mixed': 50, 'all': 13}
PROMPT_LENS = [1, 2, 7, 8, 9, 76, 33, 60, 16, 75, 5, 41]


@functools.cache
def make_params(name: str) -> Any:
  return models.init_params(
    MODELS[name], jax.random.key(0), jnp.float32, scale=0.3
  )


@functools.lru_cache(maxsize=1)
def make_runner(
  name: str,
  attention: str = 'xla',
  page_size: int = PAGE_SIZE,
  kv_cache_dtype: str = 'auto',
  tp: int = 1,
  pp: int = 1,
  most_tokens: int = keystone.UNLIMITED + keystone.MAX_SEQS,
  adjusts: bool = True,
) -> device_runner.DeviceRunner:
  model = MODELS[name]
  mesh = mesh_lib.make(parallel.Parallelism(tp=tp, pp=pp))
  layout = placement.of_live(jnp.dtype(jnp.float32))
  with tiny.few_sizes():
    return device_runner.DeviceRunner(
      model,
      weights.place_live(model, mesh, layout, make_params(name)),
      layout,
      mesh,
      config_lib.EngineConfig(
        token_budget=most_tokens,
        max_num_seqs=keystone.MAX_SEQS,
        page_size=page_size,
        num_pages=PLENTY[name],
        attention=attention,
        kv_cache_dtype=kv_cache_dtype,
        **({} if adjusts else tiny.STEPS_ALONE),
      ),
      lambda max_model_len: most_tokens,
    )


@functools.cache
def requests(kind: str) -> Any:
  if kind in ('several', 'forks'):
    found = naive.make_several(
      _SIZES['vocab_size'], PROMPT_LENS[1::2], keystone.MAX_SEQS
    )
    # Of those that fork, some are neither adjusted nor follow a grammar.
    return [r for r in found if kind == 'several' or r.request_id[0] == 'p']
  make = {'plain': naive.make_requests, 'alike': naive.make_alike}[kind]
  return make(_SIZES['vocab_size'], PROMPT_LENS)


@functools.cache
def expected(name: str, kind: str) -> Any:
  recompute = naive.recompute(MODELS[name], make_params(name))
  return {r.request_id: recompute(r) for r in naive.apart(requests(kind))}


def run(runner: Any, kind: str, *, policy: str = 'sarathi', **limits: Any):
  """Runs requests on an engine of their own; what nobody holds is NaN."""
  limits = (
    dict(prefix_cache=True, page_size=PAGE_SIZE, windows=runner.windows)
    | limits
  )
  engine, scheduler = naive.make_engine(
    runner,
    vocab_size=_SIZES['vocab_size'],
    policy=policy,
    max_num_seqs=keystone.MAX_SEQS,
    max_model_len=keystone.MAX_LEN,
    num_stages=runner.num_stages,
    **limits,
  )
  engine._runner = poisoned.Poisoning(runner, scheduler)
  got = naive.tokens_of(naive.finish(engine, requests(kind)))
  return got, scheduler


KINDS = 'plain', 'several', 'alike'
LIMITS = (
  *itertools.product(scheduler_lib.POLICIES, (17,), (True,), (True,), (True,)),
  ('sarathi', 64, False, True, True),
  ('sarathi', 64, True, True, False),
  ('sarathi', keystone.MAX_SEQS, True, False, True),
  ('sarathi', keystone.UNLIMITED, True, True, True),
  ('vllm', 17, True, False, False),
)


def _cases() -> Iterator[Any]:
  """All of them; a push has all limits, and with the first all kinds.

  It has them of layers in several groups. That all layers have one window is
  the keystone's model, and, with pages that are found, prefix_equivalence's.
  """
  for m, name in enumerate(MODELS):
    for i, limits in enumerate(LIMITS):
      for k, kind in enumerate(KINDS):
        is_pushed = not m and (not i or i % len(KINDS) == k)
        marks = () if is_pushed else pytest.mark.slow
        yield pytest.param(name, *limits, kind, marks=marks)


@pytest.mark.parametrize(
  'name,policy,token_budget,is_scarce,look_ahead,prefix_cache,kind',
  list(_cases()),
)
def test_tokens_do_not_depend_on_what_is_given_back(
  name, policy, token_budget, is_scarce, look_ahead, prefix_cache, kind
):
  runner = make_runner(name)
  assert runner.windows == WINDOWS[name]
  got, scheduler = run(
    runner,
    kind,
    policy=policy,
    token_budget=token_budget,
    num_pages=(SCARCE if is_scarce else PLENTY)[name],
    look_ahead=look_ahead,
    prefix_cache=prefix_cache,
  )
  naive.assert_same(got, expected(name, kind))
  if is_scarce and policy in ('sarathi', 'vllm'):
    assert scheduler.num_preemptions > 0
  if kind == 'alike' and prefix_cache and not is_scarce:
    assert scheduler.prefixes.num_found > 0


# The same runner as above: the others make theirs, and one is kept.
@pytest.mark.parametrize('kind', ['plain', 'alike'])
def test_what_is_given_back_too_early_is_noticed(kind, monkeypatch):
  """The negative control: the window is a page too narrow."""
  right = page_groups.first_place
  monkeypatch.setattr(
    page_groups,
    'first_place',
    lambda window, num_tokens, page_size: right(
      window, num_tokens + PAGE_SIZE * (window is not None), page_size
    ),
  )
  got, _ = run(
    make_runner('mixed'), kind, token_budget=17, num_pages=SCARCE['mixed']
  )
  assert any(
    tokens != expected('mixed', kind)[key][0]
    for key, (tokens, _) in got.items()
  )


@pytest.mark.slow  # Its kernels are interpreted, in layers of many kinds.
@pytest.mark.parametrize('name', MODELS)
def test_the_kernel_reads_nothing_that_was_given_back(name):
  got, _ = run(
    make_runner(name, 'pallas_triton', 16, most_tokens=32),
    'plain',
    token_budget=32,
    num_pages=SCARCE[name],
    page_size=16,
  )
  naive.assert_same(got, expected(name, 'plain'))


# A program takes ten seconds to compile for each mesh; parallel_test has groups
# of two stages on a push, but nothing that is NaN.
@pytest.mark.slow
@pytest.mark.parametrize(
  'name,tp,pp',
  [('mixed', 2, 2), ('mixed', 1, 2), ('all', 1, 2), ('all', 2, 2)],
)
def test_each_stage_has_its_groups(name, tp, pp):
  runner = make_runner(name, tp=tp, pp=pp, most_tokens=32, adjusts=False)
  for kind in ('forks', 'alike'):
    got, _ = run(runner, kind, token_budget=32, num_pages=SCARCE[name])
    naive.assert_same(got, expected(name, kind))


def test_bytes_are_given_back_with_their_scales():
  """The tokens are those of a cache of which nothing is given back."""
  budget = keystone.MAX_SEQS  # A program of one size.
  runner = make_runner(
    'mixed', kv_cache_dtype='int8', most_tokens=budget, adjusts=False
  )
  kept, given_back = (
    run(
      runner,
      'forks',
      token_budget=budget,
      num_pages=PLENTY['mixed'],
      prefix_cache=False,
      windows=windows,
    )[0]
    for windows in ((None,) * 4, runner.windows)
  )
  naive.assert_same(given_back, kept)

# SPDX-License-Identifier: Apache-2.0
"""The keystone with a prefix cache: what is found is what would be computed.

The prompts of a wave begin alike, and those of the next waves as these, and
with their outputs. Whatever lies in a page that can't be found, and that nobody
holds, is made NaN before each step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.runner import device_runner
from sarathi_jax.scheduler import prefix_cache
from tests import equivalence_test as keystone
from tests import naive

params = keystone.params
runner = keystone.runner
Wave = list[types.Request]


@pytest.fixture(scope='module')
def waves() -> list[Wave]:
  """Three of them; the last has the first's prompts again."""
  rng = np.random.default_rng(1)

  def draw(n: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, keystone.MODEL.vocab_size, n).tolist())

  system, shot = draw(21), draw(17)

  # Several outputs, that follow grammars, find and are found, too.
  samplings = (
    naive.GREEDY,
    naive.SEEDED[0],
    dataclasses.replace(naive.STRUCTURED[0], n=3),
    naive.SEEDED[1],
    dataclasses.replace(naive.STRUCTURED[2], n=2),
  )

  def wave(name: str, prompts: list[tuple[int, ...]]) -> Wave:
    return [
      types.Request(
        request_id=f'{name}{i}',
        prompt_token_ids=prompt,
        sampling=samplings[i % len(samplings)],
        cache_salt='other' if i % 6 == 5 else '',
      )
      for i, prompt in enumerate(prompts)
    ]

  first = [(*system, *draw(n)) for n in (1, 9, 11, 30)]
  first += [(*system, *shot, *draw(n)) for n in (2, 10, 26)] + [draw(40)]
  again = [p[:32] for p in first if len(p) >= 32] + [p[:33] for p in first]
  one, two = (draw(keystone.PAGE_SIZE) for _ in range(2))
  first.append((*one, *two, 1))
  again.append((*two, *one, 1))  # The same pages elsewhere.
  return [wave('a', first), wave('b', again), wave('c', first)]


@pytest.fixture(scope='module')
def expected(params, waves):
  recompute = naive.recompute(keystone.MODEL, params)
  known: dict[Any, naive.Tokens] = {}
  for request in naive.apart([*itertools.chain(*waves)]):
    what = request.prompt_token_ids, request.sampling
    known[request.request_id] = known[what] = known.get(what) or recompute(
      request
    )
  return known


class Poisoning:
  """A runner that spoils what nobody may read."""

  def __init__(
    self,
    runner: device_runner.DeviceRunner,
    scheduler: scheduler_lib.Scheduler,
  ) -> None:
    self._runner, self._pages = runner, scheduler.pages

  def __getattr__(self, name: str) -> Any:
    return getattr(self._runner, name)

  def kept(self) -> set[int]:
    """The pages that can be found, though nobody may hold them."""
    return {*self._pages._by_key.values()}

  def launch(self, batch: types.ScheduledBatch) -> Any:
    kept = self.kept()
    spoilt = np.zeros(self._runner.num_pages, bool)
    spoilt[: self._pages.num_pages] = [
      not (self._pages.num_holders(page) or page in kept)
      for page in range(self._pages.num_pages)
    ]
    state = self._runner._state
    self._runner._state = dataclasses.replace(
      state, kv=_spoil(state.kv, spoilt)
    )
    return self._runner.launch(batch)


@functools.partial(jax.jit, donate_argnums=0)
def _spoil(kv: Any, spoilt: Any) -> Any:
  def spoil(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf  # Its scales are spoilt.
    # The pages of a pipeline's stages lie behind one another.
    pages = jnp.tile(spoilt, len(leaf) // len(spoilt))
    shape = (-1,) + (1,) * (leaf.ndim - 1)
    return jnp.where(pages.reshape(shape), jnp.nan, leaf)

  return jax.tree.map(spoil, kv)


def run(runner, waves, *, policy: str, **limits: Any):
  """Runs wave after wave on one engine."""
  engine, scheduler = naive.make_engine(
    runner,
    vocab_size=keystone.MODEL.vocab_size,
    policy=policy,
    max_num_seqs=keystone.MAX_SEQS,
    max_model_len=keystone.MAX_LEN,
    page_size=keystone.PAGE_SIZE,
    windows=runner.windows,
    **limits,
  )
  engine._runner = Poisoning(runner, scheduler)
  got: dict[str, naive.Tokens] = {}
  for wave in waves:
    got |= naive.tokens_of(naive.finish(engine, wave))
  return got, scheduler


def assert_same(got, expected) -> None:
  naive.assert_same(got, {name: expected[name] for name in got})


@pytest.mark.parametrize(
  'policy,token_budget,num_pages,look_ahead',
  [
    *itertools.product(scheduler_lib.POLICIES, (17,), (10,), (True,)),
    ('sarathi', 64, keystone.PLENTY, True),
    ('sarathi', keystone.MAX_SEQS, 12, False),
  ],
)
def test_what_is_found_is_what_would_be_computed(
  runner, waves, expected, policy, token_budget, num_pages, look_ahead
):
  got, scheduler = run(
    runner,
    waves,
    policy=policy,
    token_budget=token_budget,
    num_pages=num_pages,
    look_ahead=look_ahead,
    cache_aware_window=1 if look_ahead else 3,
  )
  assert_same(got, expected)
  found = scheduler.prefixes.num_found / scheduler.prefixes.num_looked_up
  assert found > (0.3 if num_pages == keystone.PLENTY else 0.05)


def test_a_key_that_ignores_what_is_before_is_noticed(
  runner, waves, expected, monkeypatch
):
  """The negative control."""

  def make_keys(self, seq, num_pages):
    size = self._pool.page_size
    for i in range(len(seq.keys), num_pages):
      seq.keys.append(repr(seq.tokens[i * size : (i + 1) * size]).encode())
      seq.contents.append(b'')

  monkeypatch.setattr(prefix_cache.PrefixCache, '_make_keys', make_keys)
  got, _ = run(
    runner,
    waves,
    policy='sarathi',
    token_budget=17,
    num_pages=keystone.PLENTY,
    look_ahead=True,
  )
  assert any(tokens != expected[name][0] for name, (tokens, _) in got.items())

# SPDX-License-Identifier: Apache-2.0
"""Requests ask an LLM for adapters by name, of files or live arrays."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from tests import naive
from tests import tiny
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.checkpoints_convert import lora_test
from tests.llm import common
from tests.llm import guards_test

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
_SIZES = {'q': (16, 16), 'o': (16, 16), 'up': (16, 24)}


def arrays(seed: int, rank: int = 2, scale: float = 0.5) -> dict[str, Any]:
  """A tree of a and b, as a trainer has it."""
  rng = np.random.default_rng(seed)

  def pair(name: str) -> dict[str, jax.Array]:
    rows, columns = _SIZES[name]
    return {
      end: jax.numpy.asarray(rng.normal(0, scale, shape), 'float32')
      for end, shape in (('a', (rows, rank)), ('b', (rank, columns)))
    }

  return {
    'layers': [
      {'attn': {'q': pair('q'), 'o': pair('o')}, 'mlp': {'up': pair('up')}}
    ]
  }


def merged(params: Any, adapter: Any) -> Any:
  params = jax.tree.map(lambda x: x, params)
  for part, inner in adapter['layers'][0].items():
    for name, pair in inner.items():
      params['layers'][0][part][name] += pair['a'] @ pair['b']
  return params


@pytest.fixture(scope='module')
def adapted(make_llm, params) -> llm_lib.LLM:
  return make_llm(
    params, adapters={'one': arrays(1)}, grammars=False, token_budget=4
  )


def greedy(params: Any, prompts: list[list[int]] = PROMPTS) -> Any:
  recompute = naive.recompute(tiny.MODEL, params)
  return [
    tuple(
      recompute(
        types.Request(
          request_id='x', prompt_token_ids=tuple(prompt), sampling=GREEDY
        )
      )[0]
    )
    for prompt in prompts
  ]


def test_each_prompt_has_its_own(adapted, params) -> None:
  base, one = greedy(params), greedy(merged(params, arrays(1)))
  assert base != one
  got = adapted.generate(PROMPTS, GREEDY, adapter=['one', None, 'one'])
  assert common.tokens_of(got) == [one[0], base[1], one[2]]
  got = adapted.generate(PROMPTS, GREEDY, adapter='one')
  assert common.tokens_of(got) == one
  (delta, *_) = adapted.stream(PROMPTS[0], GREEDY, adapter='one')
  assert delta.token_ids == one[0][:1]


def test_scores_are_of_the_adapter(adapted, params) -> None:
  (got,) = adapted.score([PROMPTS[0]], [[9, 10]], adapter='one')
  whole = np.array([*PROMPTS[0], 9, 10])
  expected = common.all_logprobs(merged(params, arrays(1)), whole)
  np.testing.assert_allclose(got, expected[[2, 3], [9, 10]], atol=1e-4)


def test_live_arrays_come_and_go_without_compiling(adapted, params) -> None:
  """And what the one before left in the cache is not found."""
  for seed in (3, 4):
    with tiny.count_compiles() as compiled:
      adapted.load_adapter('moving', arrays(seed))
      got = adapted.generate(PROMPTS, GREEDY, adapter='moving')
    assert not compiled
    expected = greedy(merged(params, arrays(seed)))
    assert common.tokens_of(got) == expected
  assert adapted.engine.info.adapters == ('one', 'moving')
  adapted.unload_adapter('moving')
  with pytest.raises(errors.NotFoundError, match=r"adapter='moving'.*: 'one'"):
    adapted.generate(PROMPTS[0], GREEDY, adapter='moving')
  with pytest.raises(errors.NotFoundError, match="adapter='moving'"):
    adapted.unload_adapter('moving')


@pytest.mark.parametrize('name,value', guards_test.SETTINGS)
def test_what_the_program_has_set_does_not_hurt(
  adapted, params, name: str, value: Any
) -> None:
  expected = greedy(merged(params, arrays(5)), PROMPTS[:1])
  live = arrays(5)
  with guards_test.configured(name, value):
    adapted.load_adapter('set', live)
    got = adapted.generate(PROMPTS[:1], GREEDY, adapter='set')
  adapted.unload_adapter('set')
  assert common.tokens_of(got) == expected


def test_it_stays_when_weights_are_replaced(
  adapted, params, new_params
) -> None:
  adapted.update_params(new_params)
  got = adapted.generate(PROMPTS[:1], GREEDY, adapter='one')
  adapted.update_params(params)
  expected = greedy(merged(new_params, arrays(1)), PROMPTS[:1])
  assert common.tokens_of(got) == expected


@pytest.mark.parametrize(
  ('adapter', 'says'),
  [
    (arrays(0, rank=3), 'max_lora_rank=2: .* adapter .x., 3'),
    ({'layers.0.attn.q.a': np.zeros((16, 2))}, r'must have both a and b'),
    ({'layers.1.attn.q.a': np.zeros((16, 2))}, r'layers\.1\.attn\.q\.a'),
    ({'lm_head.a': np.zeros((16, 2))}, r'lm_head\.a'),
    ({'layers.0.attn.q.c': np.zeros((16, 2))}, r'q\.c.*must be a or b'),
    (arrays(0, scale=np.inf), 'NaN or infinite'),
    (
      {
        'layers.0.attn.q.a': np.zeros((16, 2)),
        'layers.0.attn.q.b': np.zeros((2, 8)),
      },
      r'of a matrix \[16, 16\]',
    ),
    ('/a/folder', 'must be arrays, as the model'),
  ],
)
def test_what_can_not_be_served_is_refused(adapted, adapter, says) -> None:
  with pytest.raises(errors.ConfigError, match=says):
    adapted.load_adapter('x', adapter)
  assert adapted.engine.info.adapters == ('one',)


def test_names_and_room(llm, adapted) -> None:
  for name in ('', 7, 'x' * 300):
    with pytest.raises(errors.ConfigError, match='adapters='):
      adapted.load_adapter(name, arrays(0))
  with pytest.raises(errors.ConfigError, match='max_loras=None: must be'):
    llm.load_adapter('x', arrays(0))
  with pytest.raises(errors.NotFoundError, match=r"adapter='x'.*: none"):
    llm.generate(PROMPTS[0], GREEDY, adapter='x')
  with pytest.raises(errors.InvalidRequestError, match='adapter: 1 for 3'):
    llm.generate(PROMPTS, GREEDY, adapter=['x'])


def test_how_many_are_loaded_is_bounded(make_llm, params) -> None:
  """More than the device has slots; and what was unloaded comes again."""
  llm = make_llm(
    params,
    adapters={'one': arrays(1)},
    token_budget=4,
    max_cpu_loras=3,
    **tiny.STEPS_ALONE,
  )
  for seed in (3, 4, 5, 3):
    llm.load_adapter(f'a{seed}', arrays(seed))
  assert llm.engine.info.adapters == ('one', 'a5', 'a3')
  got = llm.generate(PROMPTS, GREEDY, adapter=['a3', 'one', 'a5'])
  expected = [
    greedy(merged(params, arrays(seed)), [prompt])[0]
    for seed, prompt in zip((3, 1, 5), PROMPTS, strict=True)
  ]
  assert common.tokens_of(got) == expected
  for fields, says in (
    (dict(max_cpu_loras=1, max_loras=2), 'must be at least 2'),
    (dict(max_cpu_loras=1, max_loras=None), 'there must be room'),
    (dict(max_cpu_loras=0), 'max_cpu_loras=0: must be an integer >= 1'),
  ):
    with pytest.raises(errors.ConfigError, match=says):
      make_llm(params, grammars=False, **fields)


def test_files_of_peft_beside_a_checkpoint(
  tmp_path: pathlib.Path, cache_dir: str
) -> None:
  """The tokens of a conversion that they were merged in.

  What goes for others, of more than may be in memory, is read again.
  """
  base = fake.llama(tmp_path / 'hf')
  folders = {}
  for seed, name in enumerate(('first', 'second')):
    of = {
      module: (0.2 * a, 0.2 * (seed + 1) * b)
      for module, (a, b) in lora_test.matrices(
        lora_test.RANKS_OF_LAYERS
      ).items()
    }
    folders[name] = lora_test.write(tmp_path / name, of)
    convert.convert(base, tmp_path / f'{name}-merged', lora=folders[name])
  llm = llm_lib.LLM.from_checkpoint(
    base,
    cache_dir=tmp_path / 'cache',
    adapters=folders,
    config=tiny.engine_config(
      compilation_cache_dir=cache_dir,
      token_budget=4,
      max_cpu_loras=3,
      **tiny.STEPS_ALONE,
    ),
  )
  assert llm._config.max_loras == 2 and llm._config.max_lora_rank == 4
  prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
  sampling = dataclasses.replace(GREEDY, ignore_eos=True)
  got = llm.generate([prompt] * 2, sampling, adapter=list(folders))
  for name, done in zip(folders, got, strict=True):
    folder = tmp_path / f'{name}-merged'
    recompute = naive.recompute(
      checkpoint.load_metadata(folder).model,
      checkpoint.restore_params(folder),
    )
    tokens, logprobs = recompute(
      types.Request(
        request_id='x', prompt_token_ids=tuple(prompt), sampling=sampling
      )
    )
    assert list(done.token_ids) == tokens
    np.testing.assert_allclose(done.logprobs, logprobs, atol=1e-4)
  llm.load_adapter('late', folders['first'])
  llm.load_adapter('live', {})
  assert [one.name for one in llm.engine.adapters.loaded][2:] == ['live']
  again = llm.generate(prompt, sampling, adapter='late')
  assert common.tokens_of(again) == common.tokens_of(got[:1])
  with pytest.raises(errors.NotFoundError, match=r"'live'.*max_cpu_loras=3"):
    llm.generate(prompt, sampling, adapter='live')


def test_there_is_room_for_what_is_there_at_the_start() -> None:
  config = config_lib.EngineConfig
  for fields, says in (
    ({'max_loras': 0}, 'max_loras=0'),
    ({'max_lora_rank': 1.5}, 'max_lora_rank=1.5'),
  ):
    with pytest.raises(errors.ConfigError, match=says):
      config(**fields)


@pytest.mark.slow
def test_a_hundred_come_and_go(adapted, params) -> None:
  """Of few names, in one slot; each output is that of its adapter alone."""
  rng = np.random.default_rng(0)
  expected = [
    greedy(merged(params, arrays(seed)), PROMPTS[:1])[0] for seed in range(4)
  ]
  loaded: dict[str, int] = {}
  with tiny.count_compiles() as compiled:
    for _ in range(100):
      name, seed = 'abc'[rng.integers(3)], int(rng.integers(4))
      adapted.load_adapter(name, arrays(seed))
      loaded[name] = seed
      asked = [str(name) for name in rng.choice(list(loaded), 3)]
      got = adapted.generate(PROMPTS[:1] * 3, GREEDY, adapter=asked)
      assert common.tokens_of(got) == [expected[loaded[n]] for n in asked]
      if len(loaded) == 3:
        adapted.unload_adapter(name)
        del loaded[name]
  assert not compiled
  for name in loaded:
    adapted.unload_adapter(name)

# SPDX-License-Identifier: Apache-2.0
"""The protocol of tunix's samplers, by a description of it.

Unverified: no release of google-tunix has it yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax.integrations import tunix_sampler
from tests import tiny

# Of tunix/experimental/rollout/sampler.py: methods, and whether to await them.
PROTOCOL = {
  'initialize': False,
  'start': True,
  'stop': True,
  'pause': True,
  'resume': True,
  'get_mesh': True,
  'sample': True,
  'get_target_state': False,
  'get_weight_sync_metadata': True,
  'bind_weight_sync': True,
  'pre_weight_sync': True,
  'weight_sync': True,
  'post_weight_sync': True,
  'abort_weight_sync': True,
  'get_transfer_status': True,
  'migrate_kv_cache': True,
  'get_load_info': True,
}


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
  max_tokens: int = 64
  temperature: float = 1.0
  top_p: float | None = None
  top_k: int | None = None
  seed: int | None = None
  return_logprobs: bool = False
  return_logits: bool = False
  return_routed_experts: bool = False
  routed_experts_prompt_start: int = 0
  beam_size: int | None = None


@dataclasses.dataclass(kw_only=True)
class SamplingRequest:
  prompt: Any
  sampling_params: SamplingParams | None = None
  request_id: str = 'r'


@dataclasses.dataclass(kw_only=True)
class WeightSyncRequest:
  policy_version: int = 0
  weights: Any = None
  request_id: str = 'w'
  controller_id: str = ''


class Letters:
  """As tunix's TokenizerAdapter."""

  def bos_id(self) -> int:
    return 1

  def encode(self, text: str) -> list[int]:
    return [10 + ord(x) % 200 for x in text]

  def decode(self, ids: list[int]) -> str:
    return ' '.join(map(str, ids))


GREEDY = SamplingParams(temperature=0.0, max_tokens=4, return_logprobs=True)


@pytest.fixture(scope='module')
def llm() -> llm_lib.LLM:
  return llm_lib.LLM(
    tiny.MODEL,
    tiny.make_params(),
    eos_token_ids=(),
    config=tiny.engine_config(compilation_cache_dir=None, **tiny.STEPS_ALONE),
  )


@pytest.fixture
def sampler(llm) -> Iterator[tunix_sampler.SarathiSampler]:
  made = tunix_sampler.SarathiSampler(llm, Letters())
  made.initialize()
  asyncio.run(made.start())
  yield made
  asyncio.run(made.stop())
  llm.update_params(tiny.make_params())


def ask(sampler: Any, prompt: Any, params: Any = GREEDY) -> Any:
  request = SamplingRequest(prompt=prompt, sampling_params=params)
  return asyncio.run(sampler.sample(request))


def test_it_has_all_methods_of_the_protocol():
  for name, is_async in PROTOCOL.items():
    method = getattr(tunix_sampler.SarathiSampler, name)
    assert inspect.iscoroutinefunction(method) == is_async, name


def test_sampling(sampler):
  one = ask(sampler, 'ab')
  assert one.prompt_token_ids.tolist() == [1, *Letters().encode('ab')]
  assert one.token_ids.shape == one.logprobs.shape == (4,)
  assert (one.token_ids.dtype, one.logprobs.dtype) == (np.int32, np.float32)
  assert one.text == ' '.join(map(str, one.token_ids))
  assert (one.finish_reason, one.request_id) == ('length', 'r')
  requests = [
    SamplingRequest(prompt=np.array(one.prompt_token_ids)),
    SamplingRequest(prompt='ab', sampling_params=GREEDY),
  ]
  drawn, again = asyncio.run(sampler.sample(requests))
  assert len(drawn.token_ids) == 64 - 3 and drawn.logprobs is None
  np.testing.assert_array_equal(again.token_ids, one.token_ids)
  ended_by = int(one.token_ids[1])
  asyncio.run(sampler.stop())
  ends = tunix_sampler.SarathiSampler(
    sampler._llm, Letters(), ended_by=[ended_by]
  )
  asyncio.run(ends.start())
  ended = ask(ends, 'ab')
  asyncio.run(ends.stop())
  assert ended.token_ids[-1] == ended_by and ended.finish_reason == 'stop'
  assert ended.text == ' '.join(map(str, ended.token_ids[:-1]))


def test_new_weights_are_served_after_the_last_of_three_calls(sampler):
  async def sync(last: str, version: int) -> None:
    request = WeightSyncRequest(
      policy_version=version, weights=tiny.make_params(seed=1)
    )
    await sampler.bind_weight_sync(request)
    await sampler.pre_weight_sync(request)
    await sampler.weight_sync(request)
    assert await sampler.get_transfer_status('w') == 'SUCCESS'
    await getattr(sampler, last)(request)

  first = ask(sampler, 'ab')
  tokens = list(map(np.int32, first.prompt_token_ids))
  again = asyncio.run(sampler.sample(tokens, return_logprobs=True))
  assert again.prompt_token_ids.tolist() == tokens
  assert len(again.logprobs) == len(again.token_ids)
  assert asyncio.run(sampler.get_transfer_status('w')) == 'UNKNOWN'
  asyncio.run(sync('abort_weight_sync', 41))
  assert ask(sampler, 'ab').token_ids.tolist() == first.token_ids.tolist()
  asyncio.run(sync('post_weight_sync', 42))
  other = ask(sampler, 'ab')
  assert other.token_ids.tolist() != first.token_ids.tolist()
  assert other.metadata == {'versions': [(42, 4)], 'policy_version': 42}
  asyncio.run(sampler.stop())
  with pytest.raises(errors.BusyError, match='call start'):
    asyncio.run(sync('post_weight_sync', 43))
  asyncio.run(sampler.start())  # What had come is served yet.
  asyncio.run(sampler.post_weight_sync())
  assert ask(sampler, 'ab').metadata['policy_version'] == 43
  names = set(sampler.get_target_state())
  assert 'layers.0.attn.q' in names
  metadata = asyncio.run(sampler.get_weight_sync_metadata())
  assert metadata['mesh'] == asyncio.run(sampler.get_mesh())


def test_pausing_and_loads(sampler):
  async def run() -> Any:
    await sampler.pause()
    request = SamplingRequest(prompt='ab', sampling_params=GREEDY)
    sampling = asyncio.create_task(sampler.sample(request))
    done, _ = await asyncio.wait([sampling], timeout=0.05)
    load = await sampler.get_load_info()
    await sampler.resume()
    assert not done
    return load, await sampling

  load, done = asyncio.run(run())
  assert load.num_requests_waiting == 1 and load.num_requests_running == 0
  assert load.kv_cache_usage_perc == 0 and len(done.token_ids) == 4


def test_what_is_not_served_is_refused(sampler):
  for fields in (
    dict(beam_size=2),
    dict(return_logits=True),
    dict(return_routed_experts=True),
  ):
    with pytest.raises(errors.UnsupportedError, match='is not supported'):
      ask(sampler, 'ab', SamplingParams(**fields))
  with pytest.raises(errors.UnsupportedError, match='max_tokens: is not'):
    asyncio.run(sampler.sample([np.int32(7)], max_tokens=3))
  with pytest.raises(errors.UnsupportedError, match='migrate_kv_cache'):
    asyncio.run(sampler.migrate_kv_cache('a', 'b', [1]))
  with pytest.raises(errors.UnsupportedError, match='weights=None'):
    asyncio.run(sampler.weight_sync(WeightSyncRequest()))
  with pytest.raises(errors.ConfigError, match='params'):
    asyncio.run(sampler.weight_sync(WeightSyncRequest(weights={'x': 1})))
  idle = tunix_sampler.SarathiSampler(sampler._llm)
  with pytest.raises(errors.BusyError, match='call start'):
    ask(idle, [1])

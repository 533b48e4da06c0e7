# SPDX-License-Identifier: Apache-2.0
"""What is compiled, when; that the KV cache is never copied; its size."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs
from tests import tiny

MODEL = tiny.MODEL
NUM_PAGES, PAGE_SIZE = 12, 8  # few, so that requests are preempted


class Served:
  """An LLM, and what was compiled for it."""

  def __init__(self) -> None:
    self.progress: list[tuple[int, int]] = []
    params = tiny.make_params()
    with tiny.count_compiles() as self.compiled:
      self.llm = llm_lib.LLM(
        MODEL,
        params,
        eos_token_ids=(),
        config=tiny.engine_config(
          token_budget=16, num_pages=NUM_PAGES, page_size=PAGE_SIZE
        ),
        on_compiled=lambda *n: self.progress.append(n),
      )


@pytest.fixture(scope='module')
def served() -> Served:
  return Served()


def test_warm_up_compiles_exactly_the_ladder(served):
  sizes = batch_lib.ladder(16, 4)
  assert sizes == (4, 8, 16)
  assert served.compiled.count('jit(run)') == len(sizes)
  assert served.compiled.count('jit(set_up)') == 1
  assert served.compiled.count('jit(sample_masked)') == 1
  assert served.compiled.count('jit(copy)') == 1
  assert served.progress == sorted(served.progress)
  assert (served.progress[0], served.progress[-1]) == ((0, 6), (6, 6))
  engine = served.llm.engine
  assert [engine._runner.num_rows(n) for n in (1, 4, 5, 8, 9, 16)] == (
    [4, 4, 8, 8, 16, 16]
  )


def test_large_models_have_steps_of_few_tokens_on_cpus():
  def sizes(**of_model):
    return programs.StepPrograms(
      dataclasses.replace(MODEL, **of_model),
      mesh_lib.make(),
      tiny.engine_config(token_budget=16, max_num_seqs=4),
      layout=placement.of_live(jnp.float32),
      kv_dtype=jnp.float32,
      max_model_len=32,
      max_step_tokens=16,
    ).sizes

  assert sizes() == (4, 8, 16)
  assert sizes(vocab_size=1 << 20) == (1, 4, 8, 16)


def test_decodes_have_programs_of_their_own_on_gpus(monkeypatch):
  monkeypatch.setattr(programs, '_knows_decodes', lambda mesh: True)
  steps = programs.StepPrograms(
    MODEL,
    mesh_lib.make(),
    tiny.engine_config(token_budget=256, max_num_seqs=160),
    layout=placement.of_live(jnp.float32),
    kv_dtype=jnp.float32,
    max_model_len=32,
    max_step_tokens=256,
  )
  for num_tokens in range(1, 257):
    of_decodes = steps.layouts[steps.size_for(num_tokens, decodes_only=True)]
    of_all = steps.layouts[steps.size_for(num_tokens)]
    telling = steps.layouts[steps.size_for(num_tokens, tells_prompts=True)]
    assert of_decodes.num_tokens >= num_tokens
    assert of_decodes.decodes_only == (num_tokens <= 160)
    # A small hybrid batch takes a step that reads the weights as long.
    assert of_all.num_tokens >= max(num_tokens, 128)
    assert not of_all.decodes_only and not telling.decodes_only
    assert telling.tells_prompts and telling.num_tokens >= num_tokens
  assert steps.layouts.keys() <= {*steps.sizes, *steps.others}


def test_what_is_compiled_can_be_chosen():
  config = tiny.engine_config(
    token_budget=16, num_pages=NUM_PAGES, page_size=PAGE_SIZE
  )
  with tiny.count_compiles() as compiled:
    runner = device_runner.DeviceRunner(
      MODEL,
      tiny.make_params(),
      placement.of_live(jnp.float32),
      mesh_lib.make(),
      config,
      lambda _: 16,
      sizes=(),
    )
    assert not compiled.count('jit(run)')
    chunk = types.Chunk(
      request_id='a',
      slot=0,
      start=0,
      tokens=(1, 2, 3),
      num_tokens=3,
      is_prefill=True,
      samples=True,
      page_table=(0,),
      prompt_len=3,
      seed=0,
      sampling=types.SamplingParams(temperature=0),
    )
    batch = types.ScheduledBatch(0, (chunk,), 3)
    runner.compile(runner.program_for(batch))
    assert compiled.count('jit(run)') == 1
    first = runner.fetch(runner.launch(batch))
    runner.compile(
      runner.program_for(batch), {'xla_cpu_enable_fast_math': False}
    )
    assert compiled.count('jit(run)') == 2
  assert runner.fetch(runner.launch(batch)).tokens == first.tokens
  with pytest.raises(KeyError):
    runner.launch(types.ScheduledBatch(0, (chunk,) * 3, 9))


def test_a_program_beside_the_steps_sets_the_state_of_a_slot(served):
  """So goes what only the host knows of a request when it is admitted."""
  runner: Any = served.llm.engine._runner

  def put(leaves, state, ints):
    del leaves
    tokens = state.slots.last_tokens.at[ints[0]].set(ints[1])
    slots = dataclasses.replace(state.slots, last_tokens=tokens)
    return dataclasses.replace(state, slots=slots), ints[:0]

  def sampled(*tokens):
    chunk = types.Chunk(
      request_id='a',
      slot=2,
      start=0,
      tokens=tokens,
      num_tokens=1,
      is_prefill=False,
      samples=True,
      page_table=(0,),
      prompt_len=1,
      seed=0,
      sampling=types.SamplingParams(temperature=0),
    )
    batch = types.ScheduledBatch(0, (chunk,), 1)
    return runner.fetch(runner.launch(batch))

  number, ints = -99, np.array([2, 7], np.int32)
  pages = runner._state.kv[0][0].unsafe_buffer_pointer()
  runner._programs._steps[number] = (
    jax.jit(put, donate_argnames='state')
    .lower(runner._leaves, runner._state, ints)
    .compile()
  )
  assert sampled(3) != sampled(7)
  runner._compute(number, ints)
  assert sampled() == sampled(7)
  assert runner._state.kv[0][0].unsafe_buffer_pointer() == pages
  del runner._programs._steps[number]


def test_several_tokens_of_a_sequence_are_sampled_at_once(served):
  """After the last three of ten, as after the ends of eight, nine and ten."""
  runner: Any = served.llm.engine._runner

  def sampled(samples, *tokens, num_tokens=0, start=0):
    num_tokens = num_tokens or len(tokens)
    chunk = types.Chunk(
      request_id='a',
      slot=1,
      start=start,
      tokens=tokens,
      num_tokens=num_tokens,
      is_prefill=not start,
      samples=samples,
      page_table=(4, 2),
      prompt_len=9,
      seed=7,
      sampling=types.SamplingParams(temperature=1.0),
    )
    return runner.fetch(
      runner.launch(types.ScheduledBatch(0, (chunk,), num_tokens))
    )

  prompt = range(3, 13)
  (tokens,), (logprobs,), *_ = sampled(3, *prompt)
  on_device = sampled(1, num_tokens=1, start=10)
  assert on_device == sampled(1, tokens[-1], start=10)
  assert on_device != sampled(1, tokens[0], start=10)
  alone = [sampled(1, *prompt[:n]) for n in (8, 9, 10)]
  assert tokens == tuple(one.tokens[0][0] for one in alone)
  np.testing.assert_allclose(
    logprobs, [one.logprobs[0][0] for one in alone], atol=1e-5
  )


@pytest.mark.parametrize(
  ('given', 'trials'),
  [({}, 1), ({'num_pages': 9}, 0), ({'kv_cache_gib': 1.0}, 0)],
)
def test_no_step_is_compiled_to_learn_what_nobody_asks(
  given: dict[str, Any], trials: int
):
  asked = []

  class Trial:
    pages_per_seq = 4
    state_bytes = 7

    def temp_bytes(self, num_pages: int) -> int:
      asked.append(num_pages)
      return 5

  config = tiny.engine_config(**({'num_pages': None} | given))
  trial: Any = Trial()
  stats = {'bytes_limit': 1, 'bytes_in_use': 0}
  assert device_runner._temp_bytes(config, stats, trial) == 12 * trials
  assert asked == [4] * trials
  assert device_runner._temp_bytes(config, None, trial) == 0  # as of CPUs


def random_request(rng: random.Random, i: int) -> types.Request:
  temperature = rng.choice([0, 0, 0.7, 1.5])
  return types.Request(
    request_id=str(i),
    prompt_token_ids=tuple(
      rng.randrange(MODEL.vocab_size) for _ in range(rng.randint(1, 50))
    ),
    sampling=types.SamplingParams(
      temperature=temperature,
      max_tokens=rng.randint(1, 12),
      top_k=rng.choice([0, 5]),
      top_p=rng.choice([1, 0.9]),
      min_p=rng.choice([0, 0.05]),
      seed=rng.choice([None, 3]),
    ),
  )


def test_a_soak_of_500_mixed_requests_compiles_nothing(served):
  rng = random.Random(0)
  engine = served.llm.engine
  waiting = [random_request(rng, i) for i in range(500)]
  live: set[str] = set()
  num_done = num_aborted = 0
  with tiny.count_compiles() as compiled:
    while waiting or live:
      while waiting and len(live) < rng.randint(1, 12):
        request = waiting.pop()
        live.add(request.request_id)
        engine.add(request)
      for delta in engine.step():
        if delta.finish_reason:
          live.remove(delta.request_id)
          num_done += 1
      if live and rng.random() < 0.03:
        request_id = rng.choice(sorted(live))
        assert engine.abort(request_id)
        live.remove(request_id)
        num_aborted += 1
  assert compiled == []
  assert num_done + num_aborted == 500
  assert num_aborted > 10
  engine.drain()
  stats = engine.stats()
  assert stats.num_preemptions > 10
  assert stats.num_free_pages == NUM_PAGES


def kv_copies(compiled_text: str, shape: tuple[int, ...]) -> list[str]:
  pattern = rf'= f32\[{",".join(map(str, shape))}\]\S* copy(?:-start)?\(.*'
  return re.findall(pattern, compiled_text)


def test_the_kv_cache_is_updated_in_place(served):
  runner: Any = served.llm.engine._runner
  num_bytes = NUM_PAGES * kv_cache.page_bytes(MODEL, PAGE_SIZE, jnp.float32)
  (shape,) = {pages.shape for pages in jax.tree.leaves(runner._state.kv)}
  assert math.prod(shape) * 4 * 2 == num_bytes
  for program in (4, 8, 16, programs.COPY):
    compiled = runner._programs[program]
    assert compiled.memory_analysis().alias_size_in_bytes >= num_bytes
    assert kv_copies(compiled.as_text(), shape) == []


def test_a_copy_of_the_kv_cache_would_be_found():
  """The negative control: without donation."""
  pages, _ = rpa.init_pages(5, PAGE_SIZE, 1, 8, jnp.float32)
  new = jnp.ones((3, 1, 8))
  compiled = (
    jax.jit(rpa.write_kv)
    .lower(pages, pages, new, new, jnp.arange(3, dtype=jnp.int32))
    .compile()
  )
  assert compiled.memory_analysis().alias_size_in_bytes == 0
  assert len(kv_copies(compiled.as_text(), pages.shape)) >= 2


def test_the_last_layer_leaves_out_what_nobody_reads():
  model = dataclasses.replace(MODEL, num_layers=3, intermediate_size=40)
  steps = programs.StepPrograms(
    model,
    mesh_lib.make(),
    tiny.engine_config(token_budget=16),
    layout=placement.of_live(jnp.float32),
    kv_dtype=jnp.float32,
    max_model_len=32,
    max_step_tokens=16,
  )

  def rows_of_mlps(size):
    """Of gate and up, by the function that they are in; and its calls."""
    text = steps.lower(size, NUM_PAGES).as_text()
    return [
      (
        re.findall(r'dot_general.*-> tensor<(\d+)x40xf32>', body),
        len(re.findall(rf'call @{name}\(', text)),
      )
      for name, body in re.findall(
        r'func private @(block\w*)\((.*?)\n  }', text, re.DOTALL
      )
    ]

  # The last is of the branch that tells of prompts.
  assert rows_of_mlps(16) == [
    (['16'] * 2, 2),
    (['4'] * 2, 1),
    (['16'] * 2, 1),
  ]
  assert rows_of_mlps(8) == [(['8'] * 2, 2), (['4'] * 2, 1)]
  assert rows_of_mlps(4) == [(['4'] * 2, 3)]


GIB = 2**30
# 2 arrays * 1 layer * 1 head * 8 numbers * 4 bytes, in pages of 8 tokens.
PAGE_BYTES = 512


def choose(temp_bytes: int = 0, stats: Any = None, **fields: Any) -> int:
  config = tiny.engine_config(**{'num_pages': None, **fields})
  return kv_cache.choose_num_pages(
    MODEL,
    config,
    config.max_model_len or MODEL.context_len,
    jnp.float32,
    [stats],
    temp_bytes,
  )


def test_the_kv_cache_has_the_pages_asked_for():
  assert kv_cache.page_bytes(MODEL, PAGE_SIZE, jnp.float32) == PAGE_BYTES
  assert kv_cache.page_bytes(MODEL, 16, jnp.bfloat16) == PAGE_BYTES
  assert choose(num_pages=7) == 7
  # Before what is free.
  assert choose(num_pages=7, stats=dict(bytes_limit=1, bytes_in_use=0)) == 7
  assert choose(kv_cache_gib=9.5 * PAGE_BYTES / GIB) == 9


def test_the_kv_cache_takes_no_more_than_can_be_used():
  assert choose() == 4 * 8  # of the default GiB
  assert choose(kv_cache_gib=float('inf')) == 4 * 8


def test_the_kv_cache_takes_what_is_free():
  stats = dict(bytes_limit=100 * PAGE_BYTES, bytes_in_use=60 * PAGE_BYTES)
  assert choose(stats=stats) == 30  # 0.9 of all, less what is used
  assert choose(stats=stats, memory_utilization=0.75) == 15
  assert choose(stats=stats, temp_bytes=10 * PAGE_BYTES) == 20


@pytest.mark.parametrize(
  'fields,words',
  [
    (
      dict(num_pages=3, max_model_len=25),
      ['max_model_len=25', '4 pages', '1.91e-06 GiB', '1.43e-06', 'num_pages'],
    ),
    (
      dict(kv_cache_gib=3 * PAGE_BYTES / GIB, max_model_len=25),
      ['max_model_len=25', '1.91e-06', '1.43e-06', 'kv_cache_gib'],
    ),
    (dict(kv_cache_gib=PAGE_BYTES / 2 / GIB), ['a page', '1 pages']),
    (
      dict(stats=dict(bytes_limit=10, bytes_in_use=10_000)),
      ['are 0 GiB', 'free on the device'],
    ),
  ],
)
def test_too_small_a_kv_cache_is_refused_with_its_numbers(fields, words):
  with pytest.raises(errors.ConfigError) as caught:
    choose(**fields)
  for word in words:
    assert word in str(caught.value)


def runner_of(**fields: Any) -> device_runner.DeviceRunner:
  """One program to compile."""
  config = tiny.engine_config(**{'token_budget': 4, **fields})
  return device_runner.DeviceRunner(
    MODEL,
    tiny.make_params(),
    placement.of_live(jnp.float32),
    mesh_lib.make(),
    config,
    lambda max_model_len: 4,
  )


def test_a_device_without_room_for_the_pages_is_named():
  with pytest.raises(errors.ConfigError, match=r'num_pages=\d+: 9.31e\+05 GiB'):
    runner_of(num_pages=2 * 10**15 // PAGE_BYTES // 2)


@pytest.mark.parametrize('attention', ['flash', 'reference'])
def test_an_unknown_attention_is_refused(attention):
  with pytest.raises(errors.ConfigError, match=f"attention='{attention}'.*xla"):
    runner_of(attention=attention)


def test_a_device_that_knows_its_memory_leaves_room_for_the_step(monkeypatch):
  """The largest step is compiled on trial, and what it needs is kept free."""
  kind = type(jax.devices()[0])
  limit = 10 * 2**20
  monkeypatch.setattr(
    kind,
    'memory_stats',
    lambda self: dict(bytes_limit=limit, bytes_in_use=limit // 2),
  )
  needed = []
  temp_bytes = programs.StepPrograms.temp_bytes

  def remember(*args: Any) -> int:
    needed.append(temp_bytes(*args))
    return needed[-1]

  monkeypatch.setattr(programs.StepPrograms, 'temp_bytes', remember)
  runner = runner_of(num_pages=None, memory_utilization=0.52)
  free = limit * 0.52 - limit // 2
  assert needed[0] > 4 * MODEL.vocab_size * 4  # At least the logits.
  # And the last tokens, and what adjusts logits.
  state = runner._state
  assert state.logits.nbytes == 4 * MODEL.vocab_size * 4  # for grammars
  kept = sum(x.nbytes for x in jax.tree.leaves((state.slots, state.logits)))
  assert kept > 4 * MODEL.vocab_size * 8
  assert runner.num_pages == min(
    32, int((free - needed[0] - kept) // PAGE_BYTES)
  )
  assert runner.num_programs == 4  # a step, and what is beside it


def test_a_kernel_that_cannot_have_the_pages_is_refused():
  with pytest.raises(errors.UnsupportedError, match='head_dim=8: must be a'):
    runner_of(attention='pallas_triton')

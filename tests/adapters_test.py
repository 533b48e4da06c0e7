# SPDX-License-Identifier: Apache-2.0
"""The keystone with adapters: tokens are those of weights merged with them.

Of several adapters and none in a batch, chunked, preempted, on meshes, and
where there is room for one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.models import adapters as adapters_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.models import quantization
from sarathi_jax.models import quantized
from sarathi_jax.models import tree
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import memory
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs
from sarathi_jax.runner import weights
from tests import naive
from tests import tiny

MAX_LEN, MAX_SEQS, PAGE_SIZE = 64, 8, 16
PLENTY, SCARCE = MAX_SEQS * MAX_LEN // PAGE_SIZE, 7
MODEL = model_config_lib.LlamaConfig(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,  # does not divide by two stages
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=MAX_LEN,
  qkv_bias=True,
)
F32 = jnp.dtype(jnp.float32)
LIVE = placement.of_live(F32)
MERGED = placement.Layout(F32, placement.transposed, merged=True)
# Ranks and matrices of each.
ADAPTERS = {
  'all': (5, adapters_lib.TARGETS),
  'few': (2, ('v', 'o', 'up')),
}
Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


@functools.cache
def make_params() -> Any:
  return models.init_params(MODEL, jax.random.key(0), F32, scale=0.3)


@functools.cache
def matrices(name: str) -> Matrices:
  rank, targets = ADAPTERS[name]
  rng = np.random.default_rng(len(name) + rank)
  return {
    path: tuple(
      rng.normal(0, 0.3, shape).astype(np.float32)
      for shape in ((leaf.shape[0], rank), (rank, leaf.shape[1]))
    )
    for path, leaf in tree.named_leaves(models.param_specs(MODEL)).items()
    if path.rpartition('.')[2] in targets
  }


@functools.cache
def adapter(name: str) -> types.Adapter | None:
  return types.Adapter(name, 0, matrices(name)) if name else None


def merged(name: str, params: Any = None) -> Any:
  """The weights with an adapter's sums in them."""
  params = params or make_params()
  leaves = tree.named_leaves(params)
  for path, (a, b) in matrices(name).items() if name else ():
    leaves[path] = leaves[path] + a @ b
  return tree.with_leaves(params, leaves)


@functools.cache
def requests() -> list[types.Request]:
  """Of each length one with each adapter, and one without, of the same prompt.

  Some of several outputs, some that tell of their prompts.
  """
  asked = [
    dataclasses.replace(
      request,
      request_id=f'{name or "none"}-{request.request_id}',
      key='',
      adapter=adapter(name),
    )
    for request in naive.make_requests(MODEL.vocab_size, (1, 7, 33, 16))
    for name in ('', *ADAPTERS)
  ]
  return [
    dataclasses.replace(
      request,
      sampling=dataclasses.replace(
        request.sampling,
        n=2 if i % 7 == 3 else 1,
        seed=100 * i,
        prompt_logprobs=1 if i % 5 == 4 else None,
      ),
    )
    for i, request in enumerate(asked)
  ]


@functools.cache
def expected() -> dict[str, naive.Tokens]:
  recompute = {n: naive.recompute(MODEL, merged(n)) for n in ('', *ADAPTERS)}
  return {
    r.request_id: recompute[r.adapter.name if r.adapter else ''](r)
    for r in naive.apart(requests())
  }


@functools.lru_cache(maxsize=1)
def make_runner(
  tp: int = 1,
  pp: int = 1,
  layout: placement.Layout = LIVE,
  most: int = 16,
  deterministic: bool = False,
  model: model_config_lib.LlamaConfig = MODEL,
) -> device_runner.DeviceRunner:
  mesh = mesh_lib.make(parallel.Parallelism(tp=tp, pp=pp))
  params = models.quantize(model, make_params())
  return device_runner.DeviceRunner(
    model,
    weights.place_live(model, mesh, layout, params),
    layout,
    mesh,
    config_lib.EngineConfig(
      token_budget=most,
      max_num_seqs=MAX_SEQS,
      page_size=PAGE_SIZE,
      num_pages=PLENTY,
      attention='xla',
      max_loras=3,
      max_lora_rank=6,
      deterministic=deterministic,
      **tiny.STEPS_ALONE,
    ),
    lambda max_model_len: most,
  )


def run(
  runner: device_runner.DeviceRunner,
  *,
  num_pages: int = PLENTY,
  max_loras: int = 3,
  look_ahead: bool = True,
  asked: list[types.Request] | None = None,
) -> tuple[dict[str, naive.Tokens], Any]:
  return naive.run_engine(
    runner,
    requests() if asked is None else asked,
    vocab_size=MODEL.vocab_size,
    token_budget=runner._programs.sizes[-1],
    max_num_seqs=MAX_SEQS,
    max_model_len=MAX_LEN,
    num_pages=num_pages,
    page_size=PAGE_SIZE,
    look_ahead=look_ahead,
    num_stages=runner.num_stages,
    max_adjusted_seqs=0,
    max_loras=max_loras,
  )


@pytest.mark.parametrize(
  ('num_pages', 'max_loras', 'look_ahead'),
  [(PLENTY, 3, True), (SCARCE, 2, True), (SCARCE, 1, False), (PLENTY, 1, True)],
)
def test_tokens_are_those_of_merged_weights(
  num_pages: int, max_loras: int, look_ahead: bool
) -> None:
  runner = make_runner()
  with tiny.count_compiles() as compiled:
    got, stats = run(
      runner, num_pages=num_pages, max_loras=max_loras, look_ahead=look_ahead
    )
  assert not compiled
  naive.assert_same(got, expected())
  assert (stats.num_preemptions > 0) == (num_pages == SCARCE)


# The same runner as above: the others make theirs, and one is kept.
class _WrongSlots:
  """A runner that computes each chunk with the adapter of another slot."""

  def __init__(self, runner: device_runner.DeviceRunner) -> None:
    self._runner = runner

  def launch(self, batch: types.ScheduledBatch) -> Any:
    chunks = tuple(
      chunk._replace(adapter=chunk.adapter % 3 + 1) for chunk in batch.chunks
    )
    return self._runner.launch(batch._replace(chunks=chunks))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._runner, name)


def test_a_wrong_slot_is_noticed() -> None:
  """The negative control."""
  got, _ = run(_WrongSlots(make_runner()))  # type: ignore[arg-type]
  wrong = {name for name, (ids, _) in expected().items() if got[name][0] != ids}
  assert len(wrong) > len(got) / 2


def test_what_it_takes_is_counted() -> None:
  """To the byte: what lies on the device is what plans say."""
  runner = make_runner()
  steps = runner._programs
  assert runner._adapters is not None
  held = sum(leaf.nbytes for leaf in runner._adapters.leaves)
  widths = [
    sum(leaf.shape)
    for path, leaf in tree.named_leaves(models.param_specs(MODEL)).items()
    if path.rpartition('.')[2] in adapters_lib.TARGETS
  ]
  assert steps.adapter_bytes == held == 4 * 3 * 6 * sum(widths)
  got = memory.plan(
    MODEL,
    config_lib.EngineConfig(num_pages=PLENTY, page_size=PAGE_SIZE),
    runner.mesh,
    steps,
    kv_dtype=F32,
    temporaries=0,
    device_bytes=None,
  )
  assert got.adapters == held


@pytest.mark.parametrize(
  ('tp', 'pp', 'layout'),
  [
    (2, 2, MERGED),
    pytest.param(1, 1, MERGED, marks=pytest.mark.slow),
    pytest.param(2, 1, LIVE, marks=pytest.mark.slow),
    pytest.param(4, 1, MERGED, marks=pytest.mark.slow),  # Heads are repeated.
    pytest.param(1, 2, LIVE, marks=pytest.mark.slow),
    pytest.param(1, 3, MERGED, marks=pytest.mark.slow),
  ],
)
def test_tokens_do_not_depend_on_the_mesh(
  tp: int, pp: int, layout: placement.Layout
) -> None:
  runner = make_runner(tp, pp, layout, most=MAX_SEQS)
  for num_pages, max_loras in ((SCARCE, 2), (PLENTY, 1)):
    got, stats = run(runner, num_pages=num_pages, max_loras=max_loras)
    naive.assert_same(got, expected())
    assert (stats.num_preemptions > 0) == (num_pages == SCARCE)


def test_others_notice_nothing() -> None:
  """The bits of a request's logits, if they are to be the same, are."""
  alone, beside = (
    run(
      make_runner(most=MAX_SEQS, deterministic=True),
      asked=[r for r in requests() if r.adapter is None or not is_alone],
    )[0]
    for is_alone in (True, False)
  )
  assert all(beside[name] == tokens for name, tokens in alone.items())
  naive.assert_same(beside, expected())


@pytest.mark.parametrize(
  ('tp', 'pp'), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)]
)
def test_steps_without_adapters_are_the_same_program(tp: int, pp: int) -> None:
  mesh = mesh_lib.make(parallel.Parallelism(tp=tp, pp=pp))

  def texts(**room: int) -> dict[int, str]:
    config = config_lib.EngineConfig(
      token_budget=16, max_num_seqs=MAX_SEQS, page_size=PAGE_SIZE, **room
    )
    steps = programs.StepPrograms(
      MODEL,
      mesh,
      config,
      layout=MERGED,
      kv_dtype=F32,
      max_model_len=MAX_LEN,
      max_step_tokens=16,
    )
    assert steps.size_for(5) == steps.sizes[0]
    assert (steps.size_for(5, has_adapters=True) == steps.sizes[0]) == (
      not room
    )
    assert set(steps.layouts) <= {*steps.sizes, *steps.others}
    return {
      size: steps.lower(size, PLENTY).as_text()
      for size in (*steps.sizes, programs.SET_UP, programs.COPY)
    }

  assert texts() == texts(max_loras=2, max_lora_rank=4)


@pytest.mark.parametrize(
  ('codes', 'layout'),
  [
    ('int4', MERGED),
    pytest.param('int8', LIVE, marks=pytest.mark.slow),
  ],
)
def test_quantized_matrices_have_adapters(
  codes: str, layout: placement.Layout
) -> None:
  """Whose sums are not rounded; so has one that is kept as it is."""
  model = dataclasses.replace(
    MODEL,
    quantization=quantization.Quantization(
      codes=codes, kept=('layers.0.attn.q',)
    ),
  )
  whole = jax.tree.map(
    lambda leaf, spec: (
      quantized.dequantize(leaf, F32)[: spec.shape[0]]
      if isinstance(leaf, quantized.Quantized)
      else leaf
    ),
    models.quantize(model, make_params()),
    models.param_specs(MODEL),
    is_leaf=lambda leaf: isinstance(leaf, quantized.Quantized),
  )
  asked = [r for r in requests() if r.sampling.temperature == 0][:6]
  got, _ = run(
    make_runner(layout=layout, model=model, most=MAX_SEQS), asked=asked
  )
  recompute = {
    name: naive.recompute(MODEL, merged(name, whole))
    for name in ('', *ADAPTERS)
  }
  of = {r.request_id: r.adapter for r in naive.apart(asked)}
  naive.assert_same(
    got,
    {
      r.request_id: recompute[r.adapter.name if r.adapter else ''](r)
      for r in naive.apart(asked)
    },
  )
  assert len(set(of.values())) == 3

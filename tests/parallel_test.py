# SPDX-License-Identifier: Apache-2.0
"""The keystone on many devices: tokens do not depend on the mesh, either."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import layer_groups
from sarathi_jax.models import matrices
from sarathi_jax.models import parallel
from sarathi_jax.models import quantization
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs
from sarathi_jax.runner import weights
from tests import logprobs_oracle
from tests import naive
from tests import tiny

MAX_LEN = 64
MAX_SEQS = 8
PAGE_SIZE = 16
PLENTY, SCARCE = MAX_SEQS * MAX_LEN // PAGE_SIZE, 7
PROMPT_LENS = (1, 7, 8, 33, 16, 41)
_SIZES: dict[str, Any] = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_heads=8,
  head_dim=16,
  max_position_embeddings=MAX_LEN,
)

# Layers do not divide by the stages, nor the vocabulary by the devices.
MODELS: dict[str, model_config_lib.ModelConfig] = {
  'llama': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=5,
    num_kv_heads=2,
    sliding_window=20,
    window_layers=(1, 4),
  ),
  'qwen': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=4,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_word_embeddings=True,
  ),
  'olmo': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=1,  # Each device has a copy, of which norms count one.
    norms='after',
    qk_norm=True,
    qk_norm_is_wide=True,
    sliding_window=20,
    window_layers=(0, 1),
    window_rope=model_config_lib.RopeConfig(theta=500.0),
    unrotated_layers=(1,),
  ),
  'gemma': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    norms='around',
    norm_from_one=True,
    qk_norm=True,
    sliding_window=20,
    window_layers=(0, 1),
    window_rope=model_config_lib.RopeConfig(theta=500.0),
    embed_scale=4.0,
    attention_scale=0.3,
    attention_soft_cap=2.0,
    logit_soft_cap=5.0,
    activation='gelu_tanh',
    tie_word_embeddings=True,
  ),
  'granite': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    rope=model_config_lib.RopeConfig(
      kind='yarn',
      rotary_dim=8,
      factor=4.0,
      original_max_position=8,
      attention_factor=1.1,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=True,
    ),
    query_growth=0.5,
    embed_scale=3.0,
    residual_scale=0.5,
    logit_scale=2.0,
  ),
  'mixtral': model_config_lib.MixtralConfig(
    **_SIZES, num_layers=3, num_kv_heads=4, num_experts=4, experts_per_token=2
  ),
  'qwen_moe': model_config_lib.MixtralConfig(
    **_SIZES,
    num_layers=4,
    dense_sizes=(56, 56),
    dense_layers=(0, 2),
    num_kv_heads=4,
    num_experts=16,
    experts_per_token=3,
    router=model_config_lib.RouterConfig(sums_to_one=False),
    shared_size=40,
    shared_gate=True,
    qk_norm=True,
    tie_word_embeddings=True,
  ),
  # As published: experts of blocks of 32 rows, which devices share.
  'gpt_oss': model_config_lib.MixtralConfig(
    **_SIZES | dict(intermediate_size=128),
    num_layers=3,
    num_kv_heads=2,
    num_experts=4,
    experts_per_token=2,
    router=model_config_lib.RouterConfig(bias=True),
    attention_sinks=True,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    gate_limit=0.5,
    activation='quick_gelu',
    sliding_window=20,
    window_layers=(0, 2),
    quantization=quantization.Quantization(
      codes='mxfp4', group=32, kept=('*.attn.*', '*.router', 'lm_head')
    ),
  ),
  'whole_experts': model_config_lib.MixtralConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=4,
    num_experts=8,
    experts_per_token=3,
    qk_norm=True,
    mlp_bias=True,
    router=model_config_lib.RouterConfig(bias=True),
    gate_limit=1.0,
    shared_size=40,
    shared_gate=True,
    whole_experts=True,
  ),
  'glm_moe': model_config_lib.MixtralConfig(
    **_SIZES,
    num_layers=4,
    num_kv_heads=2,
    rope=model_config_lib.RopeConfig(rotary_dim=8),
    qkv_bias=True,
    num_experts=8,
    experts_per_token=3,
    router=model_config_lib.RouterConfig(
      score='sigmoid', choice_bias=True, num_groups=4, top_groups=2, scale=2.5
    ),
    shared_size=24,
    dense_sizes=(56,),
  ),
  # Devices share groups of rows, and layers are kept in two ways.
  'int8': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    quantization=quantization.Quantization(
      codes='int8', group=4, kept=('layers.*.attn.v', 'layers.1.mlp.up')
    ),
  ),
  # Whole experts, and shared ones of blocks of 32 rows, which devices share.
  'int4': model_config_lib.MixtralConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    num_experts=4,
    experts_per_token=2,
    shared_size=128,
    whole_experts=True,
    quantization=quantization.Quantization(
      codes='int4', group=32, zeros=True, kept=quantization.ROUTERS
    ),
  ),
  'falcon_7b': model_config_lib.FalconConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=1,
    activation='gelu',
    tie_word_embeddings=True,
  ),
  'falcon_180b': model_config_lib.FalconConfig(
    **_SIZES, num_layers=3, num_kv_heads=4, activation='gelu', num_norms=2
  ),
  'falcon_sequential': model_config_lib.FalconConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    activation='gelu',
    num_norms=2,
    parallel=False,
    bias=True,
  ),
}
F32 = jnp.dtype(jnp.float32)
LIVE = placement.of_live(F32)
MERGED = placement.Layout(F32, placement.transposed, merged=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
  """A matrix as quantized ones are kept, but exact: by powers of two."""

  values: Any
  scale: Any

  @classmethod
  def axes(cls) -> Scaled:
    return cls((matrices.IN, matrices.OUT), (matrices.IN, matrices.OUT))

  @classmethod
  def of(cls, w: Any) -> Scaled:
    scale = 1 + 3 * (abs(w).max(-2, keepdims=True) > 0.9).astype(w.dtype)
    return cls(w / scale, scale)

  def multiply(self, x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.matmul(x, self.values, preferred_element_type=dtype) * self.scale


SCALED = placement.Layout(
  F32,
  lambda name, leaf: (
    Scaled if len(leaf.shape) > 1 and leaf.axes[0] != 'vocab' else None
  ),
  merged=True,
)
KINDS = 'plain', 'adjusted', 'several', 'alike', 'logprobs'
# tp, pp -> kinds of requests that a push tries with all limits, and with the
# hardest ones. It has one of many stages, and both kinds of meshes at once: the
# last, as the next test goes on with its programs.
MESHES: dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]] = {
  (1, 4): ((), ('plain', 'several')),
  (2, 2): (('plain',), KINDS),
}
# Eight devices take two cores long.
SLOW_MESHES = (2, 1), (1, 2), (4, 1), (2, 4), (4, 2)
# A push leaves out what differs in nothing that a mesh divides or sums.
SLOW_FAMILIES = (
  'llama',  # has the meshes above
  'gemma',  # norms after sums, as olmo; its vocabulary is tied, as qwen's
  'granite',  # factors of what is summed or divided already
  'mixtral',  # less than gpt_oss, and kept in another way below
  'whole_experts',  # int4 has such, and gpt_oss their biases
  'qwen_moe',
  'falcon_180b',  # heads and norms of their own, as llama
  'falcon_sequential',  # biases, as qwen
)
FAMILIES = [
  pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_FAMILIES else [])
  for name in MODELS
]
_HARDEST = SCARCE, True, 16
LIMITS = (PLENTY, True, 16), _HARDEST, (SCARCE, False, 8)


def _on_meshes(kinds: Sequence[str], limits: Sequence[tuple[Any, ...]]) -> Any:
  """Parametrizes a test by mesh, limits and kind."""

  def is_pushed(mesh: tuple[int, int], one: Any, kind: str) -> bool:
    with_all, with_hardest = MESHES.get(mesh, ((), ()))
    return kind in with_all or (one == _HARDEST and kind in with_hardest)

  return pytest.mark.parametrize(
    'tp,pp,num_pages,look_ahead,token_budget,kind',
    [
      pytest.param(
        *mesh,
        *one,
        kind,
        marks=() if is_pushed(mesh, one, kind) else pytest.mark.slow,
      )
      for mesh in (*SLOW_MESHES, *MESHES)
      for kind in kinds
      for one in limits
    ],
  )


@functools.cache
def make_params(name: str) -> Any:
  return models.init_params(
    MODELS[name], jax.random.key(0), jnp.float32, scale=0.3
  )


@functools.cache
def requests(kind: str = 'plain') -> Any:
  make = {
    'plain': naive.make_requests,
    'adjusted': naive.make_adjusted,
    'several': functools.partial(naive.make_several, most=MAX_SEQS),
    'alike': naive.make_alike,
  }[kind]
  # Those of several outputs are many as they are.
  lens = PROMPT_LENS[:: 2 if kind == 'several' else 1]
  return make(_SIZES['vocab_size'], lens)


@functools.cache
def expected(name: str, kind: str = 'plain') -> Any:
  recompute = naive.recompute(MODELS[name], make_params(name))
  return {r.request_id: recompute(r) for r in naive.apart(requests(kind))}


@functools.lru_cache(maxsize=1)
def make_runner(
  name: str,
  tp: int,
  pp: int,
  token_budget: int = MAX_SEQS,
  attention: str = 'xla',
  kv_cache_dtype: str = 'auto',
  layout: placement.Layout = LIVE,
  adjusts: bool = False,
) -> device_runner.DeviceRunner:
  """One program, or two, of 8 and 16 tokens, which meet in the pipeline.

  Those for adjusted logits and for grammars are others.
  """
  model = MODELS[name]
  parallelism = parallel.Parallelism(tp=tp, pp=pp)
  parallelism.check(model)
  mesh = mesh_lib.make(parallelism)
  groups = layer_groups.of(
    model, parallelism, max_model_len=MAX_LEN, page_size=PAGE_SIZE
  )
  return device_runner.DeviceRunner(
    model,
    weights.place_live(model, mesh, layout, make_params(name)),
    layout,
    mesh,
    config_lib.EngineConfig(
      token_budget=token_budget,
      max_num_seqs=MAX_SEQS,
      page_size=PAGE_SIZE,
      num_pages=PLENTY * len(groups.windows),
      attention=attention,
      kv_cache_dtype=kv_cache_dtype,
      **({} if adjusts else tiny.STEPS_ALONE),
    ),
    lambda max_model_len: token_budget,
  )


def run(
  runner: device_runner.DeviceRunner,
  *,
  num_pages: int,
  look_ahead: bool,
  token_budget: int = MAX_SEQS,
  kind: str = 'plain',
) -> Any:
  return naive.run_engine(
    runner,
    requests(kind),
    vocab_size=_SIZES['vocab_size'],
    token_budget=token_budget,
    max_num_seqs=MAX_SEQS,
    max_model_len=MAX_LEN,
    page_size=PAGE_SIZE,
    num_pages=num_pages * len(runner.windows),
    windows=runner.windows,
    look_ahead=look_ahead,
    num_stages=runner.num_stages,
  )


def check(
  name: str,
  runner: device_runner.DeviceRunner,
  *,
  num_pages: int,
  look_ahead: bool,
  token_budget: int = MAX_SEQS,
  kind: str = 'plain',
) -> None:
  got, stats = run(
    runner,
    num_pages=num_pages,
    look_ahead=look_ahead,
    token_budget=token_budget,
    kind=kind,
  )
  naive.assert_same(got, expected(name, kind))
  assert (stats.num_preemptions > 0) == (num_pages == SCARCE)
  assert stats.num_found or kind != 'alike' or num_pages == SCARCE


@_on_meshes(KINDS[:-1], LIMITS)
def test_tokens_do_not_depend_on_the_mesh(
  tp, pp, num_pages, look_ahead, token_budget, kind
):
  check(
    'llama',
    make_runner('llama', tp, pp, 16, adjusts=True),
    num_pages=num_pages,
    look_ahead=look_ahead,
    token_budget=token_budget,
    kind=kind,
  )


@_on_meshes(KINDS[-1:], LIMITS[:2])
def test_log_probabilities_do_not_depend_on_the_mesh(
  tp, pp, num_pages, look_ahead, token_budget, kind
):
  del kind  # There is one.
  requests = logprobs_oracle.requests(_SIZES['vocab_size'], PROMPT_LENS)
  runner = make_runner('llama', tp, pp, 16, adjusts=True)
  done, stats = naive.complete(
    runner,
    requests,
    vocab_size=_SIZES['vocab_size'],
    token_budget=token_budget,
    max_num_seqs=MAX_SEQS,
    max_model_len=MAX_LEN,
    page_size=PAGE_SIZE,
    num_pages=num_pages * len(runner.windows),
    windows=runner.windows,
    look_ahead=look_ahead,
    num_stages=runner.num_stages,
  )
  assert (stats.num_preemptions > 0) == (num_pages == SCARCE)
  logits_of = logprobs_oracle.logits_of(MODELS['llama'], make_params('llama'))
  for request in requests:
    logprobs_oracle.check(done[request.request_id], request.sampling, logits_of)


def test_a_program_of_its_own_tells_of_prompts_on_gpus(monkeypatch):
  monkeypatch.setattr(programs, '_tells_apart', lambda mesh: True)
  make_runner.cache_clear()
  try:
    test_log_probabilities_do_not_depend_on_the_mesh(2, 2, *_HARDEST, '')
    layouts = make_runner('llama', 2, 2, 16, adjusts=True)._programs.layouts
    assert [n for n in layouts if layouts[n].tells_prompts] == [17]
  finally:
    make_runner.cache_clear()


@pytest.mark.parametrize(
  ('tp', 'pp', 'layout'),
  [pytest.param(4, 1, LIVE, marks=pytest.mark.slow), (2, 2, MERGED)],
)
@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_runs_on_a_mesh(name, tp, pp, layout):
  check(
    name,
    make_runner(name, tp, pp, layout=layout),
    num_pages=SCARCE,
    look_ahead=True,
  )


@pytest.mark.slow  # A push has them on two devices of two stages, above.
def test_merged_matrices_compute_the_same_on_one_device():
  """With rows that leave the last layer, and without."""
  check(
    'qwen',
    make_runner('qwen', 1, 1, 16, layout=MERGED),
    num_pages=SCARCE,
    look_ahead=True,
    token_budget=16,
  )


def test_a_way_to_keep_matrices_is_one_class():
  """Experts', too: all else takes it from there."""
  runner = make_runner('mixtral', 2, 2, layout=SCALED)
  check('mixtral', runner, num_pages=PLENTY, look_ahead=True)
  of_two = [x for x in runner._leaves if x.shape[-2:] == (1, 48)]
  assert of_two and all({1.0, 4.0} == set(x.ravel().tolist()) for x in of_two)


def test_the_kernel_runs_on_a_mesh():
  runner = make_runner('qwen', 2, 2, attention='pallas_triton')
  check('qwen', runner, num_pages=PLENTY, look_ahead=True)


def test_a_quantized_cache_is_shared_out():
  """Scales lie with their heads and pages."""
  alone, together = (
    run(
      make_runner('qwen', tp, pp, kv_cache_dtype='int8'),
      num_pages=PLENTY,
      look_ahead=True,
    )[0]
    for tp, pp in ((1, 1), (2, 2))
  )
  naive.assert_same(together, alone)


def test_a_part_that_is_wrong_is_noticed():
  """The negative control: one device's part of one layer of one stage."""
  runner = make_runner('qwen', 2, 2)
  leaves = list(runner._leaves)
  which = next(i for i, leaf in enumerate(leaves) if leaf.shape == (2, 32, 48))
  runner._leaves[which] = jax.device_put(
    leaves[which].at[1, 0, 47].add(1.0), leaves[which].sharding
  )
  try:
    with pytest.raises(AssertionError):
      check('qwen', runner, num_pages=PLENTY, look_ahead=True)
  finally:
    runner._leaves[:] = leaves

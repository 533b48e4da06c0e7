# SPDX-License-Identifier: Apache-2.0
"""The cost model against its limits, and against published measurements."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.cli import deployment
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import facts
from sarathi_jax.models import published
from sarathi_jax.models import quantization
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import experiments
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import operators
from sarathi_jax.simulator import paper

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
A100 = hardware_lib.load('a100')


def cost_of(name: str, host: str = 'none') -> cost_model.CostModel:
  read = deployment.read(str(CONFIGS / f'{name}.py'))
  assert read.device is not None
  return cost_model.CostModel(
    read.known_model(),
    hardware_lib.load(read.device),
    tp=read.config.tp or 1,
    pp=read.config.pp,
    host=hosts.HOSTS[host],
  )


def test_norms_that_devices_share_take_a_sum_more() -> None:
  """It is small, and takes about as long to begin as a large one."""
  olmo = published.MODELS['olmo-2-7b']
  assert isinstance(olmo, model_config_lib.LlamaConfig)
  apart = dataclasses.replace(olmo, qk_norm_is_wide=False)

  def extra(tp: int) -> float:
    wide, narrow = (
      cost_model.CostModel(model, A100, tp=tp)._layer_seconds(8)
      for model in (olmo, apart)
    )
    return wide - narrow

  assert extra(1) == 0
  a_sum = float(
    operators.all_reduce(A100, 8 * 4096 * 2, 2, A100.link_within(0, 1))
  )
  assert 0.3 * a_sum < extra(2) <= a_sum


def test_four_norms_take_twice_as_long_as_two() -> None:
  gemma = published.MODELS['gemma-2-9b']
  two, four = (
    cost_model.CostModel(model, A100)._layer_seconds(256)
    for model in (dataclasses.replace(gemma, norms='before'), gemma)
  )
  norm = float(operators.elementwise(A100, 256 * 3 * 3584 * operators.BYTES))
  assert four - two == pytest.approx(2 * norm)


def test_matmul_is_bound_by_memory_then_by_arithmetic() -> None:
  k = m = 8192
  one, many = (float(operators.matmul(A100, n, k, m)) for n in (1, 8192))
  assert one > 2 * k * m / A100.memory_rate
  assert one < 1.4 * 2 * k * m / A100.memory_rate
  assert 0.65 < 2 * 8192 * k * m / A100.flops / many < 0.8


def test_a_token_beyond_a_tile_costs_a_tile() -> None:
  at = {
    n: float(operators.matmul(A100, n, 4096, 28672))
    for n in (250, 256, 257, 320)
  }
  assert at[250] == pytest.approx(at[256], rel=0.02)
  assert at[257] > 1.2 * at[256]  # the paper measured 1.32
  assert at[320] == pytest.approx(at[257], rel=0.02)


# Yi-34B, TP2: whole prefills of Sarathi-Serve's artifact (figure 2), seconds.
@pytest.mark.parametrize(
  ('tokens', 'seconds'),
  [
    (512, 0.1056),
    (1024, 0.2143),
    (2048, 0.3660),
    (4096, 0.7576),
    (8192, 1.8633),
    (16384, 4.4075),
  ],
)
def test_prefills_take_what_the_artifact_measured(
  tokens: int, seconds: float
) -> None:
  cost = cost_of(paper.YI, 'paper')
  assert experiments.prefill_seconds(cost, tokens, tokens) == pytest.approx(
    seconds, rel=0.15
  )


def test_pipelines_beat_tensor_parallelism_over_ethernet() -> None:
  """The paper's figure 13, of 2x at any batch, within a quarter."""
  for batch, (tp8, hybrid) in paper.FIGURE_13.items():
    for name, measured in ((paper.FALCON_TP8, tp8), (paper.FALCON, hybrid)):
      seconds = sum(
        cost_of(name, 'paper').stage_seconds(
          batch, batch, batch, batch * 1024, 0.0
        )
      )
      assert seconds == pytest.approx(measured, rel=0.25), (name, batch)


def test_stages_share_the_layers_and_the_last_has_the_head() -> None:
  whole, halves = cost_of(paper.FALCON_TP8), cost_of(paper.FALCON)
  assert halves.stage_layers == [40, 40]
  assert whole.stage_layers == [80]
  hop, last = halves.stage_seconds(512, 1, 1, 0, 0.0)
  sent = operators.send(halves.hardware, 512 * 14848 * 2, 'network')
  assert hop == pytest.approx(halves.layer_seconds(512) * 40 + sent)
  assert last == pytest.approx(
    halves.layer_seconds(512) * 40 + halves.head_seconds(1)
  )


def test_launches_bound_short_steps_and_hide_behind_long_ones() -> None:
  none, paper_host = (cost_of(paper.MISTRAL, h) for h in ('none', 'paper'))
  host = paper_host.host
  for load, is_short in (
    ((8, 8, 8, 8000, 0.0), True),
    ((512, 8, 8, 8000, 0.0), False),
  ):
    bare = sum(none.stage_seconds(*load))
    floor = 32 * host.launch_s + none.head_seconds(8)
    assert (bare < floor) == is_short
    assert sum(paper_host.stage_seconds(*load)) == pytest.approx(
      max(bare, floor) + host.step_s + 8 * host.seq_s + 8000 * host.context_s
    )


def test_several_devices_cost_messages_and_launches_of_sums() -> None:
  costs = [
    cost_model.CostModel(
      cost_of(paper.YI).model, A100, tp=tp, host=hosts.HOSTS['paper']
    )
    for tp in (1, 2)
  ]
  host = costs[0].host
  one, two = (
    sum(c.stage_seconds(1, 0, 1, 0, 0.0)) - host.step_s - host.seq_s
    for c in costs
  )
  launches = 60 * (host.launch_s + 2 * host.sum_s)
  assert two == pytest.approx(launches + host.workers_s)
  assert one > 60 * host.launch_s  # its weights take longer to read


# Yi-34B, TP2: how much longer a chunk of the artifact's (figure 9) takes after
# 4,096 more tokens, milliseconds: prompts of 16,384 against those of 8,192.
@pytest.mark.parametrize(
  ('chunk', 'ms'), [(512, 18.62), (1024, 29.06), (2048, 45.61)]
)
def test_chunks_after_long_prefixes_take_what_the_artifact_measured(
  chunk: int, ms: float
) -> None:
  cost = cost_of(paper.YI, 'artifact')
  near, far = (cost.chunk_seconds(chunk, before) for before in (4096, 8192))
  assert 60e3 * (far - near) == pytest.approx(ms, rel=0.12)


def test_only_software_that_appends_in_its_attention_pays_for_it() -> None:
  none, paper_host = (cost_of(paper.YI, h) for h in ('none', 'paper'))
  for before in (0, 8192):
    alone = none.chunk_seconds(4096, before)
    assert paper_host.chunk_seconds(4096, before) > 1.1 * alone


# A40, NVLink in pairs: two of Vidur's medians, of 2023 and 2024, milliseconds.
@pytest.mark.parametrize(
  ('workers', 'mib', 'ms'),
  [(2, 8, (0.244, 0.223)), (4, 8, (0.388, 0.336)), (4, 32, (1.317, 1.275))],
)
def test_pairs_of_a40_sum_at_what_was_measured(
  workers: int, mib: int, ms: tuple[float, float]
) -> None:
  a40 = hardware_lib.load('a40')
  seconds = operators.all_reduce(
    a40, mib * 2**20, workers, a40.link_within(0, workers - 1)
  )
  assert 0.9 * min(ms) < 1e3 * seconds < 1.1 * max(ms)


def test_weights_and_cache_fill_the_memory() -> None:
  cost = cost_of(paper.MISTRAL)
  assert cost.weight_bytes == pytest.approx(14.48e9, rel=0.01)  # 7.24 G
  assert cost.kv_token_bytes == 131072
  config = config_lib.EngineConfig(page_size=64)
  pages = cost.num_pages(config, 512)
  used = pages * 64 * 131072 + cost.weight_bytes
  assert 0.85 < used / cost.hardware.memory_bytes < 0.9
  assert cost.num_pages(dataclasses.replace(config, num_pages=7), 512) == 7


def test_smaller_numbers_make_a_larger_cache() -> None:
  cost = cost_of(paper.MISTRAL)
  half = cost_model.CostModel(cost.model, A100, kv_cache_dtype='int8')
  assert half.kv_token_bytes == 131072 * 132 / 256  # a scale beside 128
  load = (64, 64, 64, 64 * 8192, 0.0)
  assert sum(half.stage_seconds(*load)) < 0.8 * sum(cost.stage_seconds(*load))


@pytest.mark.parametrize(
  ('codes', 'group', 'number_bytes'),
  [
    ('fp8', None, 1 + 4 / 4096),
    ('fp8', 128, 1 + 4 / 128),
    ('int4', 128, 0.5 + 4 / 128),
  ],
)
def test_quantized_weights_are_read_and_kept_in_their_own_bytes(
  codes: str, group: int | None, number_bytes: float
) -> None:
  cost = cost_of(paper.MISTRAL)
  how = quantization.Quantization(codes=codes, group=group)
  half = cost_model.CostModel(
    dataclasses.replace(cost.model, quantization=how), A100
  )
  embedding = 32000 * 4096 * 2
  assert half.weight_bytes - embedding == pytest.approx(
    (cost.weight_bytes - embedding) / 2 * number_bytes, rel=1e-3
  )
  config = config_lib.EngineConfig()
  assert half.num_pages(config, 512) > cost.num_pages(config, 512)
  load = (1, 1, 1, 100, 0.0)
  seconds = [sum(one.stage_seconds(*load)) for one in (half, cost)]
  least = number_bytes / 2
  assert least * seconds[1] < seconds[0] < (least + 1) / 2 * seconds[1]


@pytest.mark.parametrize(
  'name,most', [('llama-3.1-8b', 0.65), ('qwen3-30b-a3b', 0.8)]
)
def test_rows_that_are_rounded_are_multiplied_at_the_rate_of_fp8(
  name: str, most: float
) -> None:
  h100 = hardware_lib.load('h100')
  how = quantization.Quantization(codes='fp8')
  model = dataclasses.replace(published.MODELS[name], quantization=how)
  plain, rounded = (
    cost_model.CostModel(one, h100) for one in (model, model.rounding('fp8'))
  )
  assert rounded.weight_bytes == plain.weight_bytes
  # Many rows wait for products, few for bytes.
  assert rounded.layer_seconds(16384) < most * plain.layer_seconds(16384)
  assert rounded.layer_seconds(1) > 0.9 * plain.layer_seconds(1)
  assert rounded.head_seconds(8192) < 0.6 * plain.head_seconds(8192)
  with pytest.raises(
    errors.ConfigError, match=r"quantized_activations='fp8': A100.* has no"
  ):
    cost_model.CostModel(model.rounding('fp8'), A100)


@pytest.mark.parametrize('fields', [{}, {'kv_cache_gib': 70.0}])
def test_what_does_not_fit_is_refused(fields: dict) -> None:
  model = cost_of(paper.FALCON).model
  cost = cost_model.CostModel(model, A100, tp=1 if not fields else 8)
  with pytest.raises(errors.ConfigError, match='of weights on each of'):
    cost.num_pages(config_lib.EngineConfig(**fields), 512)


@pytest.mark.parametrize(
  ('tp', 'pp', 'field'), [(3, 1, 'tp'), (1, 0, 'pp'), (1, 81, 'pp')]
)
def test_what_can_not_be_cut_is_refused(tp: int, pp: int, field: str) -> None:
  with pytest.raises(errors.ConfigError, match=f'^{field}='):
    cost_model.CostModel(cost_of(paper.FALCON).model, A100, tp=tp, pp=pp)


@pytest.mark.parametrize(
  'name', sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != 'quickstart')
)
def test_every_deployment_fits_its_devices(name: str) -> None:
  config = deployment.read(str(CONFIGS / f'{name}.py')).config
  assert cost_of(name).num_pages(config, 8192) * config.page_size > 8192


def test_layers_attend_to_their_own_windows() -> None:
  model = cost_of(paper.MISTRAL).model
  chunk = types.Chunk(
    'a', 0, 8000, (1,), 1, (), False, True, 8000, 0, types.SamplingParams()
  )

  def seconds(**changes: Any) -> float:
    return sum(
      cost_model.CostModel(
        dataclasses.replace(model, **changes), A100
      ).step_seconds([chunk])
    )

  whole, slides = seconds(), seconds(sliding_window=100)
  half = seconds(sliding_window=100, window_layers=tuple(range(16)))
  assert slides < whole
  assert half == pytest.approx((whole + slides) / 2)


def test_all_stages_have_room_for_the_first_layers() -> None:
  """Those without experts, of which the others have zeros."""
  model = published.MODELS['glm-4.5']
  cost = cost_model.CostModel(model, A100, tp=8, pp=2)
  layers = 3 + 45  # of 89 with experts, half
  assert cost.kv_token_bytes == layers * 2 * 2 * 128
  dense, experts = (facts.layer_size(model, i, 8) for i in (0, 91))
  vocab = model.vocab_size * model.hidden_size / 8
  assert cost.weight_bytes == 2 * (3 * dense + 45 * experts + vocab)
  assert cost.layer_seconds(64, 0) < cost.layer_seconds(64)


def test_mixtures_read_every_expert_that_is_asked() -> None:
  cost = cost_of('mixtral_8x7b_h100_tp2')
  assert cost.weight_bytes == pytest.approx(46.7e9, rel=0.02)  # half of 93.4
  few, many = (cost.layer_seconds(n) for n in (1, 16))
  assert many > 2 * few  # 2 experts, then all 8

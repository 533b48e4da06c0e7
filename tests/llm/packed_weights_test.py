# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits, read from files onto devices that share a layer."""

from __future__ import annotations

import pathlib
from typing import Any

import transformers

from checkpoints_convert import convert
from sarathi_jax import LLM
from sarathi_jax import SamplingParams
from tests import tiny
from tests.checkpoints_convert import packed_formats
from tests.checkpoints_convert import quantized_formats
from tests.models import hf_cases
from tests.models import hf_parity_test as parity

PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7] * 11]


def _tokens(folder: pathlib.Path, **fields: Any) -> list[tuple[int, ...]]:
  # A program of one size.
  config = tiny.engine_config(token_budget=4, **tiny.STEPS_ALONE, **fields)
  done = LLM.from_checkpoint(folder, config=config).generate(
    PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
  )
  return [tuple(d.token_ids) for d in done]


def test_experts_by_activations_are_shared(tmp_path: pathlib.Path) -> None:
  """Of a GPTQ with `desc_act`: each matrix has an order of its own.

  What `o` and `down` multiply is gathered, as rows of theirs that lie together
  multiply what other devices have.
  """
  model = parity.make_model(
    transformers.Qwen3MoeConfig(
      **hf_cases._GATED,
      head_dim=16,
      num_experts=4,
      num_experts_per_tok=2,
      moe_intermediate_size=64,
      norm_topk_prob=True,
    )
  )
  one = packed_formats.FORMATS['gptq, by activations']
  quantized_formats.save(model, tmp_path / 'hf', one)
  convert.convert(tmp_path / 'hf', tmp_path / 'out', dtype='float32')
  expected = _tokens(tmp_path / 'out')
  assert len(set(sum(expected, ()))) >= 5, 'proves nothing'
  for whole in (False, True):
    shared = _tokens(tmp_path / 'out', tp=2, expert_parallel=whole)
    assert shared == expected

# SPDX-License-Identifier: Apache-2.0
"""Models compute what Hugging Face's do: logits, and 64 greedy tokens.

Log-probabilities that the engine tells are those, too, of prompts and outputs.

A tiny random checkpoint of every family and variant is made by transformers,
converted by our converter, restored, and run by the engine: in chunks, beside
other prompts, over pages that are too few. Without a cache, all tokens at once,
those are run that have a switch to turn off; `scripts/test --slow` has all. The
weights are large, and no bias or norm is left where it changes nothing:
transformers' own initialization gives outputs of a few repeated tokens,
which agree whatever is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from checkpoints_convert import convert
import sarathi_jax
from sarathi_jax import checkpoint
from sarathi_jax import models
from sarathi_jax import page_groups
from sarathi_jax.models import layer_groups
from sarathi_jax.models import parallel
from tests import tiny
from tests.models import hf_cases

NUM_NEW = 64
TOKEN_BUDGET, PAGE_SIZE = 8, 16
TOLERANCE = 1e-4
PROMPT_LEN, CONTEXT = hf_cases.PROMPT_LEN, hf_cases.CONTEXT
CASES, FLIPPED = hf_cases.CASES, hf_cases.FLIPPED


@dataclasses.dataclass(frozen=True)
class Reference:
  """What transformers computes.

  Attributes:
    prompt: token ids.
    prompt_logits: [PROMPT_LEN, V].
    tokens: the NUM_NEW greedy ones.
    logits: [NUM_NEW, V], what they were chosen from.
  """

  prompt: np.ndarray
  prompt_logits: np.ndarray
  tokens: np.ndarray
  logits: np.ndarray


def make_model(config: Any) -> Any:
  """A random model in which every weight matters."""
  torch.set_num_threads(1)
  torch.manual_seed(1)
  auto = (
    transformers.AutoModelForImageTextToText
    if hasattr(config, 'vision_config')
    else transformers.AutoModelForCausalLM
  )
  model = auto.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1 or name.endswith('bias'):  # norms, too
        parameter.add_(0.05 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
      if name.endswith('bias'):  # of the choice of experts
        buffer.add_(0.3 * torch.randn_like(buffer))
    # Or each token's likeliest successor is the same, or itself.
    factor = hf_cases.EMBED_FACTORS.get(config.model_type, 0.3)
    model.get_input_embeddings().weight.mul_(factor)
  return model


def _prompt_of(model: Any) -> torch.Tensor:
  return torch.randint(
    3,
    model.config.get_text_config().vocab_size,
    (1, PROMPT_LEN),
    generator=torch.Generator().manual_seed(2),
  )


def run_reference(model: Any) -> Reference:
  """Runs generate, as a user of transformers would."""
  prompt = _prompt_of(model)
  model.generation_config.eos_token_id = None
  with torch.no_grad():
    prompt_logits = model(prompt).logits[0]
    out = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=NUM_NEW,
      output_logits=True,
      pad_token_id=0,
      return_dict_in_generate=True,
    )
  return Reference(
    prompt[0].numpy(),
    prompt_logits.numpy(),
    out.sequences[0, PROMPT_LEN:].numpy(),
    torch.cat(out.logits).numpy(),
  )


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  config: Any, params: Any, tokens: Any, rope_len: int = PROMPT_LEN
) -> Any:
  """Logits of a whole sequence [T] whose first PROMPT_LEN are the prompt."""
  positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  rope_lens = jnp.maximum(positions + 1, rope_len)
  hidden, _ = models.forward(
    config,
    params,
    [None] * config.num_layers,
    tokens,
    positions,
    rope_lens,
    models.causal_attend,
  )
  return models.unembed(config, params, hidden)


def check_logits(config: Any, params: Any, theirs: Reference) -> None:
  """Computes all of the reference's tokens at once, without a cache."""
  tokens = np.concatenate([theirs.prompt, theirs.tokens]).astype(np.int32)
  expected = np.concatenate([theirs.prompt_logits, theirs.logits[1:]])
  np.testing.assert_allclose(
    _logits(config, params, tokens)[:-1], expected, atol=TOLERANCE, rtol=0
  )


def check_tokens(tokens: Sequence[int], theirs: Reference) -> int:
  """Returns how many are equal, up to a tie of the reference."""
  assert len(tokens) == len(theirs.tokens)
  for i, (token, other) in enumerate(zip(tokens, theirs.tokens, strict=True)):
    if token != other:
      second, first = np.sort(theirs.logits[i])[-2:]
      assert first - second < TOLERANCE, f'token {i} differs'
      return i  # the two go different ways from here
  return len(tokens)


def make_llm(config: Any, params: Any) -> Any:
  """Makes an LLM that compiles a step, and nothing that no test here needs.

  It has pages for two sequences.
  """
  num_tokens = PROMPT_LEN + NUM_NEW
  groups = layer_groups.of(
    config,
    parallel.Parallelism(),
    max_model_len=num_tokens,
    page_size=PAGE_SIZE,
  )
  return sarathi_jax.LLM(
    config,
    params,
    eos_token_ids=(),
    config=sarathi_jax.EngineConfig(
      token_budget=TOKEN_BUDGET,
      max_num_seqs=8,
      page_size=PAGE_SIZE,
      num_pages=2
      * page_groups.num_pages(
        groups.windows, num_tokens, PAGE_SIZE, chunk=TOKEN_BUDGET
      ),
      **tiny.STEPS_ALONE,
    ),
  )


def run_served(config: Any, params: Any, prompt: np.ndarray) -> Any:
  """The engine's completion, in chunks of 8 at most, beside others'."""
  llm = make_llm(config, params)
  sampling = sarathi_jax.SamplingParams(
    temperature=0, max_tokens=NUM_NEW, logprobs=5, prompt_logprobs=3
  )
  prompts = [prompt[:7], prompt, prompt[::-1], prompt[:30]]
  done = llm.generate(prompts, sampling)
  if None in llm.engine.info.windows:  # Others need no more as they go on.
    assert llm.engine.stats().num_preemptions > 0
  return done[1]


def check_logprobs(done: Any, num_same: int, theirs: Reference) -> None:
  """Of the prompt, and of the tokens that are the same."""
  for told, tokens, logits in (
    (done.prompt_logprobs, theirs.prompt[1:], theirs.prompt_logits),
    (done.told, theirs.tokens[:num_same], theirs.logits),
  ):
    assert len(told) >= len(tokens)
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    for at, token, row in zip(told, tokens, expected, strict=False):
      assert at.token_ids[0] == token
      np.testing.assert_allclose(
        at.logprobs, row[list(at.token_ids)], atol=TOLERANCE, rtol=0
      )
      rest = np.delete(row, at.token_ids[1:])
      assert rest.max() <= at.logprobs[-1] + TOLERANCE


def _convert(model: Any, folder: pathlib.Path) -> tuple[Any, Any]:
  model.save_pretrained(folder / 'hf')
  convert.convert(folder / 'hf', folder / 'out', check=True)
  return (
    checkpoint.load_metadata(folder / 'out').model,
    checkpoint.restore_params(folder / 'out'),
  )


_KEPT: dict[str, Any] = {}


def _converted(name: str, folder: pathlib.Path) -> Any:
  """The model as ours, a prompt, and the logits that it should have."""
  if name not in _KEPT:
    model = make_model(CASES[name]())
    prompt = _prompt_of(model)
    with torch.no_grad():
      logits = model(prompt).logits[0].numpy()
    _KEPT.clear()
    _KEPT[name] = (*_convert(model, folder), prompt[0].numpy(), logits)
  return _KEPT[name]


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_same_logits(name: str, tmp_path: pathlib.Path) -> None:
  model = make_model(CASES[name]())
  theirs = run_reference(model)
  check_logits(*_convert(model, tmp_path), theirs)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.slow] if name in hf_cases.SLOW_CASES else []
    )
    for name in CASES
  ],
)
def test_same_tokens(name: str, tmp_path: pathlib.Path) -> None:
  """Of each token, the likeliest and their log-probabilities are theirs."""
  model = make_model(CASES[name]())
  theirs = run_reference(model)
  assert len(set(theirs.tokens.tolist())) >= 5, 'proves nothing'
  config, params = _convert(model, tmp_path)
  done = run_served(config, params, theirs.prompt)
  check_logprobs(done, check_tokens(done.token_ids, theirs), theirs)


@pytest.mark.parametrize(
  ('name', 'switches'),
  [
    pytest.param(name, switches, marks=[pytest.mark.slow] if i else [])
    for name in FLIPPED
    for i, switches in enumerate(FLIPPED[name])
  ],
)
def test_a_switch_that_is_off_is_noticed(
  name: str, switches: Mapping[str, Any], tmp_path: pathlib.Path
) -> None:
  config, params, prompt, expected = _converted(name, tmp_path)
  ours = _logits(config, params, prompt)
  np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
  flipped = dataclasses.replace(config, **switches)
  others = _logits(flipped, params, prompt)
  assert np.abs(others - expected).max() > 100 * TOLERANCE


def test_longrope_within_the_original_context(tmp_path: pathlib.Path) -> None:
  """By what a request may come to: those that stay within have other factors.

  Those that may go beyond have the long ones from their first token on, as
  transformers has once it is beyond.
  """
  model = make_model(CASES['phi3_longrope']())
  prompt, num_new = _prompt_of(model)[:, :10], CONTEXT - 10
  out = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    do_sample=False,
    max_new_tokens=num_new,
    pad_token_id=0,
  )
  config, params = _convert(model, tmp_path)
  llm = make_llm(config, params)
  within, beyond = (
    llm.generate(
      [prompt[0].numpy()],
      sarathi_jax.SamplingParams(temperature=0, max_tokens=max_tokens),
    )[0].token_ids
    for max_tokens in (num_new, num_new + 1)
  )
  assert list(within) == out[0, 10:].tolist()
  assert len(set(within)) >= 5, 'proves nothing'
  assert within != beyond[:num_new]
  logits = _logits(config, params, np.array([*prompt[0], *beyond[:-1]]), 64)
  assert list(beyond) == logits[9:].argmax(-1).tolist()


@pytest.mark.parametrize('keep', [False, None])
def test_experts_in_mxfp4(keep: bool | None, tmp_path: pathlib.Path) -> None:
  model = make_model(hf_cases.gpt_oss())
  hf_cases.save_with_packed_experts(model, tmp_path / 'hf')
  theirs = run_reference(model)
  assert len(set(theirs.tokens.tolist())) >= 5, 'proves nothing'
  convert.convert(
    tmp_path / 'hf',
    tmp_path / 'out',
    dtype='float32',
    check=True,
    keep_mxfp4=keep,
  )
  config = checkpoint.load_metadata(tmp_path / 'out').model
  params = checkpoint.restore_params(tmp_path / 'out')
  check_logits(config, params, theirs)
  assert (config.quantization is None) == (keep is False)
  if keep is None:  # In float32 they are as all experts are.
    done = run_served(config, params, theirs.prompt)
    check_logprobs(done, check_tokens(done.token_ids, theirs), theirs)


def test_one_nudged_weight_is_noticed(tmp_path: pathlib.Path) -> None:
  model = make_model(hf_cases.llama())
  theirs = run_reference(model)
  config, params = _convert(model, tmp_path)
  up = params['layers'][1]['mlp']['up']
  params['layers'][1]['mlp']['up'] = up.at[3, 5].add(0.1)
  with pytest.raises(AssertionError):
    check_logits(config, params, theirs)
  with pytest.raises(AssertionError, match='differs'):
    check_tokens(run_served(config, params, theirs.prompt).token_ids, theirs)

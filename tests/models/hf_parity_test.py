# SPDX-License-Identifier: Apache-2.0
"""Models compute what Hugging Face's do: logits, and 64 greedy tokens.

Log-probabilities that the engine tells are those, too, of prompts and outputs.

A tiny random checkpoint of every family and variant is made by transformers,
converted by our converter, restored, and run as a naive full recompute, and by
the engine: in chunks, beside other prompts, over pages that are too few. The
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

NUM_NEW = 64
PROMPT_LEN = 40  # more than WINDOW and CONTEXT
WINDOW = 12
CONTEXT = 32  # of the original, for those rotary embeddings that are scaled
TOLERANCE = 1e-4

_TOKENS: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
# Of the part that takes images, and is left out.
_SIGHT: dict[str, Any] = dict(
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
  patch_size=4,
)
_SIZES: dict[str, Any] = dict(
  vocab_size=199,
  hidden_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=128,
  initializer_range=0.12,
  **_TOKENS,
)
_GATED: dict[str, Any] = dict(
  _SIZES, intermediate_size=96, num_key_value_heads=2
)


def _llama(**fields: Any) -> Any:
  return transformers.LlamaConfig(**{**_GATED, **fields})


def _scaled(rope_type: str, **fields: Any) -> Any:
  rope = dict(rope_type=rope_type, rope_theta=10000.0, factor=4.0)
  return rope | fields


def _phi3(**fields: Any) -> Any:
  return transformers.Phi3Config(**_GATED, **fields)


def _longrope(num: int) -> dict[str, Any]:
  return dict(
    rope_type='longrope',
    short_factor=[1.0 + 0.1 * i for i in range(num)],
    long_factor=[1.5 + 0.8 * i for i in range(num)],
  )


def _falcon(**fields: Any) -> Any:
  return transformers.FalconConfig(**{**_SIZES, **fields})


_YARN = _scaled('yarn', original_max_position_embeddings=CONTEXT)

CASES: Mapping[str, Any] = {
  'llama_mha': lambda: _llama(num_key_value_heads=4),
  'llama_gqa': _llama,
  'llama_mqa_tied': lambda: _llama(
    num_key_value_heads=1, tie_word_embeddings=True
  ),
  'llama_biases': lambda: _llama(attention_bias=True, mlp_bias=True),
  'llama_head_dim': lambda: _llama(head_dim=24, hidden_act='gelu_new'),
  'llama_linear': lambda: _llama(
    rope_parameters=_scaled('linear'), max_position_embeddings=CONTEXT
  ),
  'llama_dynamic': lambda: _llama(
    rope_parameters=_scaled('dynamic'), max_position_embeddings=CONTEXT
  ),
  'llama3': lambda: _llama(
    rope_parameters=_scaled(
      'llama3',
      original_max_position_embeddings=CONTEXT,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      rope_theta=500000.0,
    )
  ),
  'llama_yarn': lambda: _llama(rope_parameters=_YARN),
  'llama_yarn_numbers': lambda: _llama(
    rope_parameters=dict(
      _YARN,
      beta_fast=16.0,
      beta_slow=2.0,
      mscale=0.8,
      mscale_all_dim=0.5,
      truncate=False,
    )
  ),
  'yi': lambda: _llama(
    rope_parameters=dict(rope_type='default', rope_theta=5000000.0),
    rms_norm_eps=1e-5,
  ),
  'mistral_window': lambda: transformers.MistralConfig(
    **_GATED, sliding_window=WINDOW
  ),
  'mistral_no_window': lambda: transformers.MistralConfig(
    **_GATED, sliding_window=None, head_dim=24
  ),
  'qwen2': lambda: transformers.Qwen2Config(**_GATED),
  'qwen2_tied_windows': lambda: transformers.Qwen2Config(
    **_GATED,
    tie_word_embeddings=True,
    use_sliding_window=True,
    sliding_window=WINDOW,
    max_window_layers=1,
  ),
  'qwen3': lambda: transformers.Qwen3Config(**_GATED, head_dim=24),
  'qwen3_biases_windows': lambda: transformers.Qwen3Config(
    **_GATED,
    head_dim=8,
    attention_bias=True,
    tie_word_embeddings=True,
    use_sliding_window=True,
    sliding_window=WINDOW,
    max_window_layers=0,
  ),
  'qwen3_yarn': lambda: transformers.Qwen3Config(
    **_GATED, head_dim=24, rope_parameters=_YARN
  ),
  'olmo2': lambda: transformers.Olmo2Config(**_GATED),
  'olmo2_mha_biases_linear': lambda: transformers.Olmo2Config(
    **{
      **_GATED,
      'num_key_value_heads': 4,
      'max_position_embeddings': CONTEXT,
    },
    attention_bias=True,
    rope_parameters=_scaled('linear'),
  ),
  'olmo3': lambda: transformers.Olmo3Config(
    **_GATED,
    sliding_window=WINDOW,
    layer_types=['sliding_attention', 'full_attention'],
    rope_parameters=dict(
      full_attention=_YARN,
      sliding_attention=dict(rope_type='default', rope_theta=5000.0),
    ),
  ),
  'gemma2': lambda: transformers.Gemma2Config(
    **_GATED,
    head_dim=24,
    sliding_window=WINDOW,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=4.0,
  ),
  'gemma2_untied_biases_no_caps': lambda: transformers.Gemma2Config(
    **_GATED,
    head_dim=16,
    sliding_window=WINDOW,
    tie_word_embeddings=False,
    attention_bias=True,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
  ),
  'gemma3': lambda: transformers.Gemma3TextConfig(
    **_GATED,
    head_dim=24,
    sliding_window=WINDOW,
    query_pre_attn_scalar=20,
    layer_types=['sliding_attention', 'full_attention'],
    rope_parameters=dict(
      full_attention=_scaled('linear', rope_theta=1e6),
      sliding_attention=dict(rope_type='default', rope_theta=1e4),
    ),
  ),
  'gemma3_with_images': lambda: transformers.Gemma3Config(
    text_config=dict(
      _GATED,
      head_dim=16,
      query_pre_attn_scalar=2,
      sliding_window=WINDOW,
      sliding_window_pattern=2,
    ),
    vision_config=dict(_SIGHT, image_size=8),
    mm_tokens_per_image=4,
    **_TOKENS,
  ),
  'phi3': lambda: _phi3(sliding_window=WINDOW),
  'phi3_longrope': lambda: _phi3(
    original_max_position_embeddings=CONTEXT,
    rope_parameters=_longrope(8),
  ),
  'phi3_longrope_partial_tied': lambda: _phi3(
    original_max_position_embeddings=CONTEXT,
    rope_parameters=_longrope(6) | dict(partial_rotary_factor=0.75),
    tie_word_embeddings=True,
  ),
  'mixtral': lambda: transformers.MixtralConfig(
    **_GATED, num_local_experts=4, num_experts_per_tok=2
  ),
  'mixtral_window_top3': lambda: transformers.MixtralConfig(
    **_GATED, num_local_experts=5, num_experts_per_tok=3, sliding_window=WINDOW
  ),
  'qwen3_moe': lambda: transformers.Qwen3MoeConfig(
    **_GATED,
    head_dim=24,
    moe_intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
  ),
  'qwen3_moe_biases_weights_as_they_are': lambda: transformers.Qwen3MoeConfig(
    **_GATED,
    moe_intermediate_size=56,
    num_experts=5,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    attention_bias=True,
    tie_word_embeddings=True,
  ),
  'falcon_7b': _falcon,
  'falcon_7b_untied_biases': lambda: _falcon(
    bias=True, tie_word_embeddings=False
  ),
  'falcon_40b': lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
  'falcon_11b_one_norm': lambda: _falcon(
    new_decoder_architecture=True,
    num_kv_heads=2,
    num_ln_in_parallel_attn=1,
    ffn_hidden_size=80,
  ),
  'falcon_sequential_mha': lambda: _falcon(
    multi_query=False, parallel_attn=False, bias=True
  ),
  'falcon_dynamic': lambda: _falcon(
    rope_parameters=_scaled('dynamic'), max_position_embeddings=CONTEXT
  ),
}


# Case -> switches that it has on; without any of them its logits are others.
FLIPPED: Mapping[str, Sequence[Mapping[str, Any]]] = {
  'mistral_window': (dict(sliding_window=None), dict(sliding_window=13)),
  'olmo3': (
    dict(window_rope=None),
    dict(window_layers=(1,)),
    dict(sliding_window=WINDOW + 1),
  ),
  'gemma2': (
    dict(attention_soft_cap=None),
    dict(logit_soft_cap=None),
    dict(attention_scale=None),
    dict(embed_scale=1.0),
    dict(activation='silu'),
    dict(window_layers=(1,)),
  ),
  'qwen3_moe': (dict(weights_sum_to_one=False), dict(experts_per_token=2)),
  'gemma3': (
    dict(window_rope=None),
    dict(attention_scale=None),
    dict(embed_scale=1.0),
  ),
}


# Model type -> how large its embeddings are to be, beside what layers add.
_EMBED_FACTORS: Mapping[str, float] = {'olmo2': 3.0, 'olmo3': 3.0}


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
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:  # norms and biases
        parameter.add_(0.05 * torch.randn_like(parameter))
    # Or each token's likeliest successor is the same, or itself.
    factor = _EMBED_FACTORS.get(config.model_type, 0.3)
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


def run_ours(config: Any, params: Any, prompt: np.ndarray) -> Reference:
  """Computes everything anew for every token, padded to the final length."""
  tokens = np.zeros(PROMPT_LEN + NUM_NEW, np.int32)
  tokens[:PROMPT_LEN] = prompt
  chosen_from = []
  for length in range(PROMPT_LEN, PROMPT_LEN + NUM_NEW):
    logits = np.asarray(_logits(config, params, tokens))
    chosen_from.append(logits[length - 1])
    tokens[length] = logits[length - 1].argmax()
  return Reference(
    prompt, logits[:PROMPT_LEN], tokens[PROMPT_LEN:], np.stack(chosen_from)
  )


def check(ours: Reference, theirs: Reference) -> None:
  """Logits within the tolerance; tokens equal up to a tie of the reference."""
  np.testing.assert_allclose(
    ours.prompt_logits, theirs.prompt_logits, atol=TOLERANCE, rtol=0
  )
  num_same = check_tokens(ours.tokens, theirs)
  np.testing.assert_allclose(
    ours.logits[: num_same + 1],
    theirs.logits[: num_same + 1],
    atol=TOLERANCE,
    rtol=0,
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


def run_served(config: Any, params: Any, prompt: np.ndarray) -> Any:
  """The engine's completion, in chunks of 12 at most, beside others'."""
  llm = sarathi_jax.LLM(
    config,
    params,
    eos_token_ids=(),
    config=sarathi_jax.EngineConfig(
      token_budget=12, max_num_seqs=8, page_size=16, num_pages=14
    ),
  )
  sampling = sarathi_jax.SamplingParams(
    temperature=0, max_tokens=NUM_NEW, logprobs=5, prompt_logprobs=3
  )
  prompts = [prompt[:7], prompt, prompt[::-1], prompt[:30]]
  done = llm.generate(prompts, sampling)
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


@pytest.mark.parametrize('name', CASES)
def test_same_tokens(name: str, tmp_path: pathlib.Path) -> None:
  model = make_model(CASES[name]())
  theirs = run_reference(model)
  assert len(set(theirs.tokens.tolist())) >= 5, 'proves nothing'
  config, params = _convert(model, tmp_path)
  check(run_ours(config, params, theirs.prompt), theirs)
  done = run_served(config, params, theirs.prompt)
  check_logprobs(done, check_tokens(done.token_ids, theirs), theirs)


@pytest.mark.parametrize(
  ('name', 'switches'),
  [(name, switches) for name in FLIPPED for switches in FLIPPED[name]],
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
  llm = sarathi_jax.LLM(
    config,
    params,
    eos_token_ids=(),
    config=sarathi_jax.EngineConfig(
      token_budget=12, max_num_seqs=8, page_size=16, num_pages=14
    ),
  )
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


def test_one_nudged_weight_is_noticed(tmp_path: pathlib.Path) -> None:
  model = make_model(_llama())
  theirs = run_reference(model)
  config, params = _convert(model, tmp_path)
  up = params['layers'][1]['mlp']['up']
  params['layers'][1]['mlp']['up'] = up.at[3, 5].add(0.1)
  with pytest.raises(AssertionError):
    check(run_ours(config, params, theirs.prompt), theirs)
  with pytest.raises(AssertionError, match='differs'):
    check_tokens(run_served(config, params, theirs.prompt).token_ids, theirs)

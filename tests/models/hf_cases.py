# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers, of every family, for `hf_parity_test`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import torch as safetensors_torch
import torch
import transformers
from transformers.integrations import mxfp4

from sarathi_jax.models import config as config_lib

PROMPT_LEN = 40  # more than WINDOW and CONTEXT
WINDOW = 12
CONTEXT = 32  # of the original, for those rotary embeddings that are scaled

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


def llama(**fields: Any) -> Any:
  """The config of a tiny Llama."""
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


def gpt_oss(**fields: Any) -> Any:
  """The config of a tiny gpt-oss."""
  rope = _scaled(
    'yarn', original_max_position_embeddings=CONTEXT, truncate=False
  )
  sizes = dict(
    head_dim=24,
    sliding_window=WINDOW,
    num_local_experts=8,
    num_experts_per_tok=3,
    swiglu_limit=0.6,
    rope_parameters=rope,
  )
  return transformers.GptOssConfig(**{**_GATED, **sizes, **fields})


def save_with_packed_experts(model: Any, folder: pathlib.Path) -> None:
  """Saves a gpt-oss as it is published: draws experts in MXFP4, in place."""
  rng = np.random.default_rng(0)
  tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
  for name in [n for n in tensors if n.endswith(('up_proj', 'down_proj'))]:
    num, rows, columns = tensors.pop(name).shape
    shape = num, columns, rows // 32
    blocks = torch.tensor(rng.integers(0, 256, (*shape, 16), np.uint8))
    scales = torch.tensor(rng.integers(122, 124, shape, np.uint8))
    tensors |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
    unpacked = mxfp4.convert_moe_packed_tensors(
      blocks, scales, dtype=torch.float32
    )
    model.get_parameter(name).data.copy_(unpacked)
  folder.mkdir()
  safetensors_torch.save_file(tensors, folder / 'model.safetensors')
  config = model.config.to_dict()
  config['quantization_config'] = dict(quant_method='mxfp4')
  (folder / 'config.json').write_text(json.dumps(config))


def _falcon(**fields: Any) -> Any:
  return transformers.FalconConfig(**{**_SIZES, **fields})


_YARN = _scaled('yarn', original_max_position_embeddings=CONTEXT)
_GROWING = _YARN | dict(
  llama_4_scaling_beta=0.5,
  max_position_embeddings=128,
  mscale=1.0,
  mscale_all_dim=1.0,
)

CASES: Mapping[str, Any] = {
  'llama_mha': lambda: llama(num_key_value_heads=4),
  'llama_gqa': llama,
  'llama_mqa_tied': lambda: llama(
    num_key_value_heads=1, tie_word_embeddings=True
  ),
  'llama_biases': lambda: llama(attention_bias=True, mlp_bias=True),
  'llama_head_dim': lambda: llama(head_dim=24, hidden_act='gelu_new'),
  'llama_linear': lambda: llama(
    rope_parameters=_scaled('linear'), max_position_embeddings=CONTEXT
  ),
  'llama_dynamic': lambda: llama(
    rope_parameters=_scaled('dynamic'), max_position_embeddings=CONTEXT
  ),
  'llama3': lambda: llama(
    rope_parameters=_scaled(
      'llama3',
      original_max_position_embeddings=CONTEXT,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      rope_theta=500000.0,
    )
  ),
  'llama_yarn': lambda: llama(rope_parameters=_YARN),
  'llama_yarn_numbers': lambda: llama(
    rope_parameters=dict(
      _YARN,
      beta_fast=16.0,
      beta_slow=2.0,
      mscale=0.8,
      mscale_all_dim=0.5,
      truncate=False,
    )
  ),
  'yi': lambda: llama(
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
  'smollm3': lambda: transformers.SmolLM3Config(
    **_GATED,
    no_rope_layers=[1, 0],
    layer_types=['full_attention', 'sliding_attention'],
    use_sliding_window=True,
    sliding_window=WINDOW,
  ),
  'granite': lambda: transformers.GraniteConfig(
    **_GATED,
    embedding_multiplier=1.5,
    attention_multiplier=0.4,
    residual_multiplier=0.8,
    logits_scaling=0.7,
    tie_word_embeddings=True,
  ),
  'granitemoe': lambda: transformers.GraniteMoeConfig(
    **_GATED,
    num_local_experts=5,
    num_experts_per_tok=2,
    embedding_multiplier=1.5,
    attention_multiplier=0.4,
    residual_multiplier=0.8,
    logits_scaling=0.7,
  ),
  'glm': lambda: transformers.GlmConfig(**_GATED, head_dim=24),
  'glm4': lambda: transformers.Glm4Config(
    **_GATED, head_dim=16, attention_bias=False
  ),
  'ministral': lambda: transformers.MinistralConfig(
    **_GATED,
    head_dim=24,
    sliding_window=WINDOW,
    layer_types=['sliding_attention', 'full_attention'],
  ),
  'ministral3': lambda: transformers.Ministral3Config(
    **_GATED, head_dim=24, rope_parameters=_GROWING
  ),
  'mistral3': lambda: transformers.Mistral3Config(
    text_config=dict(_GATED, model_type='mistral', head_dim=24),
    vision_config=dict(_SIGHT, model_type='pixtral', image_size=8, head_dim=8),
    tie_word_embeddings=False,
    **_TOKENS,
  ),
  'mistral3_of_ministral3': lambda: transformers.Mistral3Config(
    text_config=dict(
      _GATED, model_type='ministral3', head_dim=24, rope_parameters=_GROWING
    ),
    vision_config=dict(_SIGHT, model_type='pixtral', image_size=8, head_dim=8),
    **_TOKENS,
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
    decoder_sparse_step=2,
    moe_intermediate_size=56,
    num_experts=5,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    attention_bias=True,
    tie_word_embeddings=True,
  ),
  'qwen2_moe': lambda: transformers.Qwen2MoeConfig(
    **_GATED,
    mlp_only_layers=[1],
    moe_intermediate_size=40,
    shared_expert_intermediate_size=56,
    num_experts=6,
    num_experts_per_tok=2,
  ),
  'glm4_moe': lambda: transformers.Glm4MoeConfig(
    **_GATED,
    moe_intermediate_size=40,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    routed_scaling_factor=1.5,
    use_qk_norm=True,
    attention_bias=True,
  ),
  'glm4_moe_dense_top1_weights_as_they_are': lambda: transformers.Glm4MoeConfig(
    **{**_GATED, 'num_hidden_layers': 3},
    moe_intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=1,
    norm_topk_prob=False,
    first_k_dense_replace=2,
  ),
  'gpt_oss': gpt_oss,
  'gpt_oss_no_biases_tied_top1': lambda: gpt_oss(
    attention_bias=False, tie_word_embeddings=True, num_experts_per_tok=1
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

# What a push leaves out: all that they have, others have, too, if apart.
SLOW_CASES = (
  'llama_mha',
  'llama_mqa_tied',  # so are falcon_7b, and granite's embeddings
  'llama_linear',  # Gemma-3 has such, and rope_test.
  'llama_yarn',
  'llama_yarn_numbers',  # so have gpt-oss, and rope_test
  'yi',
  'mistral_window',  # as mixtral_window_top3; a switch has its logits
  'mistral_no_window',
  'qwen2',  # with less than qwen2_tied_windows
  'qwen3_biases_windows',
  'qwen3_yarn',
  'olmo2',  # with less than olmo3
  'olmo2_mha_biases_linear',
  'gemma2_untied_biases_no_caps',
  'phi3',  # with less than phi3_longrope
  'phi3_longrope_partial_tied',
  'glm',  # with less than glm4
  'ministral',  # with windows as gemma3
  'mistral3',  # as gemma3_with_images
  'mistral3_of_ministral3',
  'mixtral',
  'qwen3_moe_biases_weights_as_they_are',
  'glm4_moe_dense_top1_weights_as_they_are',
  'gpt_oss_no_biases_tied_top1',
  'falcon_7b_untied_biases',
  'falcon_dynamic',
)

_GLM_ROUTER: dict[str, Any] = dict(
  score='sigmoid', choice_bias=True, num_groups=4, top_groups=2, scale=1.5
)

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
  'qwen3_moe': (
    dict(router=config_lib.RouterConfig(sums_to_one=False)),
    dict(experts_per_token=2),
  ),
  'qwen2_moe': (
    dict(router=config_lib.RouterConfig()),
    dict(shared_gate=False),
    dict(shared_size=None, shared_gate=False),
  ),
  'glm4_moe': (
    *(
      dict(router=config_lib.RouterConfig(**_GLM_ROUTER | fields))
      for fields in (
        dict(score='softmax'),
        dict(choice_bias=False),
        dict(num_groups=1, top_groups=1),
        dict(num_groups=2),
        dict(sums_to_one=False),
        dict(scale=1.0),
      )
    ),
    dict(shared_size=None),
    dict(experts_per_token=2),
    dict(rope=config_lib.RopeConfig()),
  ),
  'gpt_oss': (
    dict(attention_sinks=False),
    dict(router=config_lib.RouterConfig()),
    dict(mlp_bias=False),
    dict(gate_limit=None),
    dict(gate_limit=0.5),
    dict(activation='silu'),
    dict(window_layers=(1,)),
    dict(experts_per_token=2),
    dict(rope=config_lib.RopeConfig(theta=10000.0)),
  ),
  'gemma3': (
    dict(window_rope=None),
    dict(attention_scale=None),
    dict(embed_scale=1.0),
  ),
  'smollm3': (dict(unrotated_layers=()), dict(window_layers=(0,))),
  'granite': (
    dict(embed_scale=1.0),
    dict(attention_scale=None),
    dict(residual_scale=1.0),
    dict(logit_scale=1.0),
  ),
  'granitemoe': (dict(experts_per_token=1), dict(residual_scale=1.0)),
  'phi3_longrope': (dict(rope=config_lib.RopeConfig()),),
  'glm': (dict(rope=config_lib.RopeConfig()),),
  'ministral3': (dict(query_growth=None),),
}


# Model type -> how large its embeddings are to be, beside what layers add.
EMBED_FACTORS: Mapping[str, float] = {'olmo2': 3.0, 'olmo3': 3.0}

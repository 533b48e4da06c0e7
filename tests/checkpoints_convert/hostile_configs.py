# SPDX-License-Identifier: Apache-2.0
"""config.json of each family, whose values `hostile_files_test` replaces."""

from __future__ import annotations

from typing import Any

from tests.checkpoints_convert import fake_checkpoint as fake

ROPES: tuple[dict[str, Any], ...] = (
  {},
  {'rope_type': 'linear', 'factor': 2.0},
  {'rope_type': 'dynamic', 'factor': 2.0},
  {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
  },
  {
    'rope_type': 'yarn',
    'factor': 2.0,
    'original_max_position_embeddings': 32,
    'mscale': 1.0,
    'mscale_all_dim': 0.5,
    'beta_fast': 32,
    'beta_slow': 1,
    'truncate': True,
  },
)
LLAMA = fake.llama_config(head_dim=4, tie_word_embeddings=False)
QWEN2 = LLAMA | dict(
  use_sliding_window=True, sliding_window=8, max_window_layers=1
)
CONFIGS: tuple[dict[str, Any], ...] = (
  *(
    LLAMA | ({'rope_scaling': scaling} if scaling else {}) for scaling in ROPES
  ),
  LLAMA | dict(architectures=['MistralForCausalLM'], sliding_window=8),
  LLAMA
  | dict(
    architectures=['MixtralForCausalLM'],
    num_local_experts=4,
    num_experts_per_tok=2,
  ),
  QWEN2 | dict(architectures=['Qwen2ForCausalLM']),
  LLAMA
  | dict(
    architectures=['Qwen2MoeForCausalLM'],
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    mlp_only_layers=[],
  ),
  LLAMA
  | dict(
    architectures=['Glm4MoeForCausalLM'],
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    partial_rotary_factor=0.5,
  ),
  QWEN2
  | dict(
    architectures=['Qwen3ForCausalLM'],
    layer_types=['full_attention', 'sliding_attention'],
  ),
  LLAMA
  | dict(
    architectures=['Olmo3ForCausalLM'],
    rope_theta=5e5,
    sliding_window=8,
    layer_types=['full_attention', 'sliding_attention'],
    rope_parameters={
      'full_attention': ROPES[-1],
      'sliding_attention': {'rope_theta': 1e4},
    },
  ),
  LLAMA
  | dict(
    architectures=['Phi3ForCausalLM'],
    original_max_position_embeddings=32,
    partial_rotary_factor=0.5,
    rope_scaling={
      'type': 'longrope',
      'short_factor': [1.5],
      'long_factor': [3.0],
      'attention_factor': 1.1,
    },
    sliding_window=8,
  ),
  LLAMA
  | dict(
    architectures=['SmolLM3ForCausalLM'],
    no_rope_layers=[1, 0],
    no_rope_layer_interval=2,
    use_sliding_window=True,
    sliding_window=8,
    layer_types=['full_attention', 'sliding_attention'],
  ),
  LLAMA
  | dict(
    architectures=['GraniteForCausalLM'],
    embedding_multiplier=12.0,
    attention_multiplier=0.01,
    residual_multiplier=0.22,
    logits_scaling=8.0,
  ),
  LLAMA
  | dict(
    architectures=['GraniteMoeForCausalLM'],
    num_local_experts=4,
    num_experts_per_tok=2,
    attention_multiplier=0.01,
  ),
  LLAMA | dict(architectures=['Glm4ForCausalLM'], partial_rotary_factor=0.5),
  LLAMA
  | dict(
    architectures=['Ministral3ForCausalLM'],
    rope_theta=None,
    rope_parameters=ROPES[-1]
    | {'llama_4_scaling_beta': 0.1, 'rope_theta': 1e6},
  ),
  LLAMA
  | dict(
    architectures=['Gemma2ForCausalLM'],
    hidden_activation='gelu_pytorch_tanh',
    query_pre_attn_scalar=4,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=8,
  ),
  LLAMA
  | dict(
    architectures=['Gemma3ForCausalLM'],
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling={'rope_type': 'linear', 'factor': 8.0},
    sliding_window=8,
    sliding_window_pattern=2,
  ),
  dict(
    architectures=['FalconForCausalLM'],
    vocab_size=29,
    hidden_size=16,
    ffn_hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    num_ln_in_parallel_attn=2,
    new_decoder_architecture=True,
    layer_norm_epsilon=1e-5,
    activation='gelu',
    rope_parameters={'rope_theta': 1e4},
  ),
)

# SPDX-License-Identifier: Apache-2.0
"""What the Sarathi-Serve paper measured (arXiv 2403.02310v3), as far as known.

The numbers are read off its vector figures, whose values lie on a grid of 0.01
QPS, and its table 4. Its rates are nominal: its Poisson gaps are cut at three
times the mean, so that 5.24 % more requests came.
"""

from __future__ import annotations

from collections.abc import Mapping

NOMINAL = 0.9502  # of the rate that came, what the paper calls it

CHAT, ARXIV = 'openchat_sharegpt4', 'arxiv_summarization'
MISTRAL, YI = 'mistral_7b_a100', 'yi_34b_a100_tp2'
LLAMA = 'llama2_70b_a40_tp4_pp2'
FALCON, FALCON_TP8 = 'falcon_180b_a100_tp4_pp2', 'falcon_180b_a100_tp8'

# Deployment -> strict and relaxed SLO (P99 TBT, seconds) and their budgets
# (tables 1 and 5, section 5.1).
SLOS: Mapping[str, tuple[tuple[float, int], tuple[float, int]]] = {
  MISTRAL: ((0.1, 512), (0.5, 2048)),
  YI: ((0.2, 512), (1.0, 2048)),
  LLAMA: ((1.0, 512), (5.0, 1536)),
  FALCON: ((1.0, 512), (5.0, 2048)),
}

# Figures 10 and 11: (deployment, workload, SLO) -> policy -> QPS. vLLM's of
# LLaMA2-70B are by the figure's ratios, 3.79 and 1.52.
CAPACITY: Mapping[tuple[str, str, float], Mapping[str, float]] = {
  (MISTRAL, CHAT, 0.1): {'orca': 0.73, 'vllm': 0.77, 'sarathi': 2.03},
  (MISTRAL, CHAT, 0.5): {'orca': 1.06, 'vllm': 1.56, 'sarathi': 2.28},
  (YI, CHAT, 0.2): {'orca': 0.27, 'vllm': 0.29, 'sarathi': 1.08},
  (YI, CHAT, 1.0): {'orca': 0.50, 'vllm': 0.71, 'sarathi': 1.22},
  (MISTRAL, ARXIV, 0.1): {'orca': 0.34, 'vllm': 0.44, 'sarathi': 0.62},
  (MISTRAL, ARXIV, 0.5): {'orca': 0.39, 'vllm': 0.47, 'sarathi': 0.77},
  (LLAMA, CHAT, 1.0): {'vllm': 0.19, 'sarathi': 0.72},
  (LLAMA, CHAT, 5.0): {'vllm': 0.54, 'sarathi': 0.82},
}

# Figure 1, Yi-34B, prompts of arXiv: its artifact's vector figure shows what
# vLLM's steps took after its first prompts, 1,536 tokens of 32 sequences in
# 14.08 s. Their prompts had just filled the cache: 8,000 tokens each or more.
FIGURE_1_DECODES = 32
FIGURE_1_CONTEXT = 8000
FIGURE_1_STEP_S = 0.2933

# Figure 12, chat: deployment -> (SLO -> QPS of vLLM (batch 128), and of
# Sarathi with budgets of 512 and 2048).
FIGURE_12: Mapping[str, Mapping[float, tuple[float, float, float]]] = {
  MISTRAL: {
    0.1: (0.77, 2.03, 0.50),
    0.2: (1.06, 2.00, 1.64),
    0.3: (1.25, 2.00, 2.30),
    0.4: (1.39, 2.00, 2.30),
    0.5: (1.56, 2.00, 2.30),
  },
  YI: {
    0.2: (0.33, 1.14, 0.20),
    0.4: (0.45, 1.14, 0.48),
    0.6: (0.60, 1.14, 1.28),
    0.8: (0.69, 1.14, 1.28),
    1.0: (0.79, 1.14, 1.28),
  },
}

# Figure 13: batch -> median TBT of decodes, seconds, TP8 and TP4-PP2.
FIGURE_13: Mapping[int, tuple[float, float]] = {
  8: (0.190, 0.084),
  16: (0.205, 0.091),
  32: (0.209, 0.103),
  64: (0.249, 0.133),
  128: (0.362, 0.151),
}

# Figure 14, Yi-34B: (chunk, prompt) -> prefill time over that of no chunks.
FIGURE_14: Mapping[tuple[int, int], float] = {
  (512, 2048): 1.295,
  (512, 4096): 1.333,
  (512, 8192): 1.273,
  (1024, 2048): 1.204,
  (1024, 4096): 1.224,
  (1024, 8192): 1.178,
  (2048, 2048): 0.994,
  (2048, 4096): 1.010,
  (2048, 8192): 0.964,
}
# The same by the table of its artifact.
ARTIFACT_14: Mapping[tuple[int, int], float] = {
  (512, 2048): 1.152,
  (512, 4096): 1.189,
  (512, 8192): 1.117,
  (1024, 2048): 1.175,
  (1024, 4096): 1.202,
  (1024, 8192): 1.109,
  (2048, 2048): 0.999,
  (2048, 4096): 1.024,
  (2048, 8192): 0.937,
}

# Table 4, Yi-34B, 128 requests: (policy, workload) -> P50 TTFT, P99 TBT.
TABLE_4: Mapping[tuple[str, str], tuple[float, float]] = {
  ('hybrid_only', CHAT): (0.53, 0.68),
  ('hybrid_only', ARXIV): (3.78, 1.38),
  ('chunked_only', CHAT): (1.04, 0.17),
  ('chunked_only', ARXIV): (5.38, 0.20),
  ('sarathi', CHAT): (0.76, 0.14),
  ('sarathi', ARXIV): (3.90, 0.17),
}
# The rates and the budget of its artifact's script (the caption says 1024).
TABLE_4_QPS: Mapping[str, float] = {CHAT: 1.0, ARXIV: 0.5}
TABLE_4_BUDGET = 512
TABLE_4_REQUESTS = 128

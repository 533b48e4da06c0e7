# SPDX-License-Identifier: Apache-2.0
"""Runs OpenVINO GenAI's continuous batching on CPU, for `peers`.

--model is a folder that optimum-cli exported, see `peer_models`.
"""

from typing import Any

import numpy as np
import openvino
import openvino_genai
import workload


def main() -> None:
  args = workload.parse_args()
  scheduler = openvino_genai.SchedulerConfig()
  scheduler.max_num_batched_tokens = args.token_budget
  scheduler.max_num_seqs = args.max_num_seqs
  scheduler.dynamic_split_fuse = True  # chunked prefills
  scheduler.enable_prefix_caching = True
  scheduler.cache_size = 1  # GiB
  pipeline = openvino_genai.ContinuousBatchingPipeline(
    args.model,
    scheduler,
    'CPU',
    {
      'INFERENCE_PRECISION_HINT': 'f32',
      'KV_CACHE_PRECISION': 'f32',
      'INFERENCE_NUM_THREADS': args.threads,
    },
  )

  def config(num_tokens: int) -> Any:
    found = openvino_genai.GenerationConfig()
    found.max_new_tokens = found.min_new_tokens = num_tokens
    found.ignore_eos, found.do_sample = True, False
    return found

  def generate(prompts: workload.Prompts) -> list[list[int]]:
    done = pipeline.generate(
      [openvino.Tensor(np.array([tokens], np.int64)) for tokens, _ in prompts],
      [config(n) for _, n in prompts],
    )
    return [list(map(int, d.m_generation_ids[0])) for d in done]

  workload.serve(args, generate, openvino_genai.__version__)


if __name__ == '__main__':
  main()

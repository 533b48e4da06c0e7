# SPDX-License-Identifier: Apache-2.0
"""The closed loads that engines are compared on, and their protocol.

Standard library only: each worker runs under its own engine's Python, which
need not have sarathi_jax. All prompts of a turn come at once, when all of the
one before are answered. A worker loads its model, and says its version; then
it makes a run for each line of standard input, {"load": a name of `LOADS`,
"seed": an integer}, and answers with a line of JSON. So the parent can let
engines take turns while all stay loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import os
import random
import sys
import time
from typing import NamedTuple

VOCAB_SIZE = 8192
MAX_MODEL_LEN = 1024

Prompts = list[tuple[list[int], int]]  # (token ids, tokens to generate)


class Load(NamedTuple):
  """Requests that all come at once; lengths in tokens, to draw from.

  Attributes:
    num_requests: requests of a turn.
    prompt_lens: lengths of prompts to draw from; of chats, of first turns.
    output_lens: lengths of outputs to draw from.
    turns: times that requests come.
    new_len: tokens that each prompt adds to all that was said before, from the
      second turn on; 0 where later prompts are not chats that go on.
    shared_len: first tokens that all prompts share, those of all turns.
    group_size: requests that have the same prompt.
  """

  num_requests: int
  prompt_lens: tuple[int, ...]
  output_lens: tuple[int, ...]
  turns: int = 1
  new_len: int = 0
  shared_len: int = 0
  group_size: int = 1


LOADS = {
  'mixed': Load(32, (32, 64, 128, 256), (32, 64, 128)),
  'long_prompts': Load(24, (700, 900), (16, 64)),
  'single_stream': Load(1, (16, 64), (128,)),
  'many_short': Load(128, (8, 16, 32), (8, 16, 32)),
  'multi_turn': Load(8, (800,), (32,), turns=4, new_len=32),
  'shared_prefix': Load(8, (832,), (32,), turns=4, shared_len=800),
  'rl_groups': Load(8, (800,), (32,), turns=4, group_size=8),
}


def _tokens(rng: random.Random, num: int) -> list[int]:
  return [rng.randrange(5, VOCAB_SIZE) for _ in range(num)]


def draw(load: Load, seed: int, turn: int = 0) -> Prompts:
  """Draws a turn's random prompts, fresh for every seed below 1,000."""
  shared = _tokens(random.Random(seed), load.shared_len)
  rng = random.Random(seed + 1000 * turn)
  drawn: Prompts = []
  while len(drawn) < load.num_requests:
    tokens = _tokens(rng, rng.choice(load.prompt_lens))
    tokens[: len(shared)] = shared
    drawn += [(tokens, rng.choice(load.output_lens))] * load.group_size
  return drawn


def next_turn(
  load: Load,
  prompts: Prompts,
  outputs: list[list[int]],
  seed: int,
  turn: int,
) -> Prompts:
  """Returns a later turn's prompts; those of chats go on after `outputs`."""
  if not load.new_len:
    return draw(load, seed, turn)
  rng = random.Random(seed + 1000 * turn)
  return [
    ([*tokens, *output, *_tokens(rng, load.new_len)], num)
    for (tokens, num), output in zip(prompts, outputs, strict=True)
  ]


def parse_args() -> argparse.Namespace:
  """Parses every worker's arguments; adds `answers`, where its answers go.

  Libraries print to standard output; from now on, that is standard error.
  """
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  parser = argparse.ArgumentParser()
  parser.add_argument('--model', required=True)
  parser.add_argument('--max_num_seqs', type=int, default=32)
  parser.add_argument('--token_budget', type=int, default=512)
  parser.add_argument('--threads', type=int, default=2)
  return parser.parse_args(namespace=argparse.Namespace(answers=answers))


def serve(
  args: argparse.Namespace,
  generate: Callable[[Prompts], list[list[int]]],
  version: str,
  told: Callable[[], list[tuple[float, int]]] = list,
) -> None:
  """Makes runs until standard input ends.

  Args:
    args: result of `parse_args`.
    generate: continues prompts greedily, ignoring the end of sequence, and
      returns the tokens of each.
    version: the engine's.
    told: returns of each of the last outputs how long its first token took,
      seconds, and how many tokens of its prompt were found in a cache; nothing
      where the engine does not tell.
  """
  answers = args.answers
  print(json.dumps({'version': version}), file=answers, flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    load = LOADS[asked['load']]
    prompts = draw(load, asked['seed'])
    turns, outputs = [], list[list[int]]()
    for turn in range(load.turns):
      if turn:
        prompts = next_turn(load, prompts, outputs, asked['seed'], turn)
      start = time.perf_counter()
      outputs = generate(prompts)
      seconds = time.perf_counter() - start
      lengths = [len(tokens) for tokens in outputs]
      assert lengths == [n for _, n in prompts], 'outputs of a wrong length'
      turns.append(
        {
          'seconds': seconds,
          'num_prompt_tokens': sum(len(p) for p, _ in prompts),
          'num_output_tokens': sum(n for _, n in prompts),
          'outputs': outputs,
          'ttft_s': [seconds for seconds, _ in told()],
          'num_found': sum(num for _, num in told()),
        }
      )
    print(json.dumps({'turns': turns}), file=answers, flush=True)

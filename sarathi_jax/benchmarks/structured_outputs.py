# SPDX-License-Identifier: Apache-2.0
"""Times outputs that follow grammars, beside those that don't.

  python -m sarathi_jax.benchmarks.structured_outputs --json=structured.json

A random model and a random vocabulary, so nothing is to be downloaded: what a
mask costs depends on the grammar and on the number of tokens. Requests all have
the same lengths; of those of every other run, some follow a JSON schema. Tells
tokens a second with them over those without, in pairs, and what the host takes
for each mask.
"""

from __future__ import annotations

from collections.abc import Callable
import random
import statistics
import time
from typing import Any

from absl import flags
import rich.console
import tokenizers
from tokenizers import decoders
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers

from sarathi_jax import config as config_lib
from sarathi_jax import types
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
_PROMPT = 16  # tokens
# Its outputs are longer than any run, so that all are of the same length.
_SCHEMA = {
  'type': 'array',
  'minItems': 1000,
  'items': {
    'type': 'object',
    'properties': {
      'name': {'type': 'string', 'maxLength': 12},
      'age': {'type': 'integer', 'minimum': 0, 'maximum': 120},
      'kind': {'enum': ['cat', 'dog', 'bird', None]},
      'tags': {'type': 'array', 'items': {'type': 'string'}, 'maxItems': 3},
      'at': {'type': 'string', 'format': 'date'},
    },
    'required': ['name', 'age', 'kind', 'tags', 'at'],
    'additionalProperties': False,
  },
}


def define_flags() -> None:
  flags.DEFINE_integer('vocab_size', 32_000, 'Tokens of the vocabulary.')
  flags.DEFINE_integer('num_layers', 6, 'Layers of the model.')
  flags.DEFINE_integer('hidden_size', 512, 'Width of the model.')
  flags.DEFINE_integer('max_num_seqs', 32, 'Requests at once, all of a run.')
  flags.DEFINE_integer('output_len', 64, 'Tokens of each output.')
  flags.DEFINE_float('share', 0.1, 'Part of the requests with a grammar.')
  flags.DEFINE_float('temperature', 0.0, 'Of all requests.')
  flags.DEFINE_integer('pairs', 10, 'Pairs of runs, with and without grammars.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
  """Makes a byte-level vocabulary of letters' random strings."""
  rng = random.Random(0)
  pieces = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
  texts, merges = list(pieces), []
  while len(pieces) < vocab_size - 1:
    left, right = rng.choice(texts), rng.choice(texts)
    if len(left + right) < 12 and left + right not in pieces:
      pieces[left + right] = len(pieces)
      merges.append((left, right))
      texts.append(left + right)
  tokenizer = tokenizers.Tokenizer(tokenizer_models.BPE(pieces, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<end>'])
  return tokenizer


def make_llm() -> Any:
  """Makes the model of the flags, and what serves it."""
  import jax
  import jax.numpy as jnp

  from sarathi_jax import llm as llm_lib
  from sarathi_jax import models
  from sarathi_jax.models import config as model_config_lib

  width = FLAGS.hidden_size
  length = _PROMPT + FLAGS.output_len
  model = model_config_lib.LlamaConfig(
    vocab_size=FLAGS.vocab_size,
    hidden_size=width,
    intermediate_size=3 * width,
    num_layers=FLAGS.num_layers,
    num_heads=width // 64,
    num_kv_heads=width // 64,
    head_dim=64,
    max_position_embeddings=length,
  )
  return llm_lib.LLM(
    model,
    models.init_params(model, jax.random.key(0), jnp.float32),
    tokenizer=make_tokenizer(FLAGS.vocab_size),
    eos_token_ids=FLAGS.vocab_size - 1,
    config=config_lib.EngineConfig(
      max_num_seqs=FLAGS.max_num_seqs,
      token_budget=FLAGS.max_num_seqs + 4 * _PROMPT,
      page_size=16,
      num_pages=FLAGS.max_num_seqs * -(-length // 16),
    ),
  )


def run(llm: Any, num_structured: int) -> float:
  """Serves all requests at once, the first ones with a grammar.

  Returns:
    Tokens a second.
  """
  outputs: Any = {'json': _SCHEMA}
  samplings = [
    types.SamplingParams(
      temperature=FLAGS.temperature,
      seed=i,
      max_tokens=FLAGS.output_len,
      ignore_eos=True,
      structured_outputs=outputs if i < num_structured else None,
    )
    for i in range(FLAGS.max_num_seqs)
  ]
  prompts = [[65 + i] * _PROMPT for i in range(FLAGS.max_num_seqs)]
  start = time.perf_counter()
  done = llm.generate(prompts, samplings)
  seconds = time.perf_counter() - start
  num = sum(len(one.token_ids) for one in done)
  assert num == FLAGS.max_num_seqs * FLAGS.output_len, 'an output ended'
  return num / seconds


def watch(following: Any) -> list[float]:
  """Has the host's time for each mask noted: matching, mask, and all around it.

  Returns:
    Seconds, one a mask; grows.
  """
  found: list[float] = []
  spent = [0.0]
  advance, ready = following.advance, following.ready

  def timed(function: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    result = function(*args)
    spent[0] += time.perf_counter() - start
    return result

  def timed_ready() -> Any:
    result = timed(ready)
    if result is not None:
      num = len(result.masks)
      found.extend([spent[0] / num] * num)
      spent[0] = 0.0
    return result

  following.advance = lambda events: timed(advance, events)
  following.ready = timed_ready
  return found


def main() -> None:
  console = rich.console.Console()
  llm = make_llm()
  num = max(round(FLAGS.share * FLAGS.max_num_seqs), 1)
  for n in (0, num, FLAGS.max_num_seqs):  # Warms up, the vocabulary too.
    run(llm, n)
  seconds = watch(llm.engine._following)
  pairs = [(run(llm, 0), run(llm, num)) for _ in range(FLAGS.pairs)]
  of_some = statistics.median(seconds)
  del seconds[:]
  all_of_them = run(llm, FLAGS.max_num_seqs)
  ratios = [with_some / without for without, with_some in pairs]
  result: dict[str, Any] = {
    'num_structured': num,
    'tokens_per_s_without': [without for without, _ in pairs],
    'tokens_per_s_with': [with_some for _, with_some in pairs],
    'tokens_per_s_all': all_of_them,
    'ratio': statistics.median(ratios),
    'mask_us': of_some * 1e6,
    'mask_us_all': statistics.median(seconds) * 1e6,
  }
  console.print(
    f'{num} of {FLAGS.max_num_seqs} requests with a grammar: '
    f'{result["ratio"]:.3f} of the tokens a second without (median of '
    f'{FLAGS.pairs} pairs, {min(ratios):.3f} to {max(ratios):.3f}); a mask '
    f'takes {result["mask_us"]:.0f} us of the host, '
    f'{result["mask_us_all"]:.0f} where all have one.',
    highlight=False,
    soft_wrap=True,
  )
  common.write_json(FLAGS.json, 'structured_outputs', FLAGS, result)


if __name__ == '__main__':
  mains.run(main, define_flags)

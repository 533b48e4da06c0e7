# SPDX-License-Identifier: Apache-2.0
"""Tells how well checkpoints predict a text, such as before and after rounding.

  python -m sarathi_jax.benchmarks.perplexity \\
    --checkpoint=/checkpoints/llama --checkpoint=/checkpoints/llama-int4

By the engine's own steps (`LLM.score`): as it is served, with its dtype, its
kernels and its KV cache. The text is cut into windows, of which the first token
is given and the others are predicted; perplexity is e to the mean of their
losses. Numbers of models with other tokenizers can't be compared, nor those of
other windows. By default the text is one that the quickstart model did not see.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import math
import pathlib
from typing import NamedTuple

from absl import flags
import numpy as np
import rich.box
import rich.console
import rich.table

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import quickstart
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_multi_string(
    'checkpoint',
    str(quickstart.MODEL),
    'Checkpoint to measure: a converted one, or a Hugging Face folder or hub '
    'id, which is converted once. Several are compared with the first.',
  )
  flags.DEFINE_string(
    'text', str(quickstart.HELD_OUT), 'File with the text, in UTF-8.'
  )
  flags.DEFINE_integer(
    'window',
    1024,
    'The most tokens of a window. The fewer, the less is known of what went '
    'before.',
    lower_bound=2,
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  engine_flags.define_engine_flags()


class Result(NamedTuple):
  """How well a checkpoint predicts.

  Attributes:
    num_tokens: that were predicted.
    loss: their mean loss, nats.
  """

  num_tokens: int
  loss: float

  @property
  def perplexity(self) -> float:
    return math.exp(self.loss)

  def more_than(self, other: Result) -> float:
    """Returns how much larger its perplexity is, as a part of another's."""
    return math.expm1(self.loss - other.loss)


def measure(llm: sarathi_jax.LLM, tokens: Sequence[int], window: int) -> Result:
  """Scores a text.

  Args:
    llm: scores it.
    tokens: the text.
    window: the most tokens of a window, at most what the model takes.

  Raises:
    ConfigError: there is nothing to predict.
    CheckpointError: logits are not finite.
  """
  window = min(window, llm.engine.info.max_model_len)
  windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
  windows = [part for part in windows if len(part) > 1]
  if not windows:
    raise errors.ConfigError(
      f'text: has {len(tokens)} tokens in windows of {window}: there is none '
      'to predict.'
    )
  scores = np.concatenate(
    llm.score([part[:1] for part in windows], [part[1:] for part in windows])
  )
  if not np.isfinite(scores).all():
    raise errors.CheckpointError(
      f'{llm.engine.info.model_name}: its logits are not finite.'
    )
  return Result(len(scores), float(-np.mean(scores, dtype=np.float64)))


def table(results: Sequence[tuple[str, Result]]) -> rich.table.Table:
  """Makes a table of checkpoints and their results."""
  made = rich.table.Table('checkpoint', box=rich.box.SIMPLE_HEAD)
  for column in ('tokens', 'perplexity', 'more, %'):
    made.add_column(column, justify='right')
  for i, (name, result) in enumerate(results):
    more = 100 * result.more_than(results[0][1])
    made.add_row(
      name,
      f'{result.num_tokens:,}',
      f'{result.perplexity:.3f}',
      f'{more:+.2f}' if i else '',
    )
  return made


def main() -> None:
  config = engine_flags.engine_config_from_flags()
  options = engine_flags.loading_from_flags()
  text = pathlib.Path(FLAGS.text).read_text('utf-8')
  results = []
  for path in FLAGS.checkpoint:
    llm = sarathi_jax.LLM.from_checkpoint(path, config=config, **options)
    tokenizer = llm.engine.tokenizer
    if tokenizer is None:
      raise errors.CheckpointError(f'{path}: has no tokenizer.')
    result = measure(llm, tokenizer.encode(text), FLAGS.window)
    results.append((path, result))
    del llm  # The next one takes its memory.
  rich.console.Console(highlight=False).print(table(results))
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(
      json.dumps(
        {
          path: result._asdict() | {'perplexity': result.perplexity}
          for path, result in results
        },
        indent=2,
      )
      + '\n'
    )


if __name__ == '__main__':
  mains.run(main, define_flags)

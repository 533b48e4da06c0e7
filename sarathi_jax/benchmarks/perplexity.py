# SPDX-License-Identifier: Apache-2.0
"""Tells how well checkpoints predict a text, such as before and after rounding.

  python -m sarathi_jax.benchmarks.perplexity \\
    --checkpoint=/checkpoints/llama --checkpoint=/checkpoints/llama-int4
  python -m sarathi_jax.benchmarks.perplexity --checkpoint=HF_DIR_OR_HUB_ID \\
    --rounded=int8 --rounded=int4:64

By the engine's own steps (`LLM.score`): as it is served, with its dtype, its
kernels and its KV cache. The text is cut into windows, of which the first token
is given and the others are predicted; perplexity is e to the mean of their
losses. Numbers of models with other tokenizers can't be compared, nor those of
other windows. By default the text is one that the quickstart model did not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import math
import pathlib
import tempfile
from typing import Any, NamedTuple

from absl import flags
import numpy as np
import rich.box
import rich.console
import rich.table

import sarathi_jax
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import quickstart
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.models import quantization

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_multi_string(
    'checkpoint',
    str(quickstart.MODEL),
    'Checkpoint to measure: a converted one, or a Hugging Face folder or hub '
    'id, which is converted once. Several are compared with the first.',
  )
  flags.DEFINE_multi_string(
    'rounded',
    [],
    'A way to round the first checkpoint, a Hugging Face one, to compare with '
    'it: what --quantize of checkpoints_convert takes, and with a colon behind '
    'it what --quantize_group does. It is converted into a folder that is then '
    'removed.',
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


@contextlib.contextmanager
def _rounded(path: str, how: str) -> Iterator[str]:
  """Yields the folder of a checkpoint that is rounded.

  Raises:
    ConfigError: `how` is no such way.
  """
  from checkpoints_convert import convert
  from checkpoints_convert import source

  codes, has_group, group = how.partition(':')
  config_lib.check(
    codes in quantization.CODES and (group.isdecimal() or not has_group),
    'rounded',
    how,
    f'must be one of {", ".join(quantization.CODES)}, or with a group, as in '
    'int4:64',
  )
  with tempfile.TemporaryDirectory() as folder:
    target = pathlib.Path(folder, 'rounded')
    convert.convert(
      source.locate(path),
      target,
      quantize=codes,
      quantize_group=int(group) if group else None,
    )
    yield str(target)


def _results(config: Any, options: Any) -> Iterator[tuple[str, Result]]:
  text = pathlib.Path(FLAGS.text).read_text('utf-8')

  def of(path: str) -> Result:
    llm = sarathi_jax.LLM.from_checkpoint(path, config=config, **options)
    tokenizer = llm.engine.tokenizer
    if tokenizer is None:
      raise errors.CheckpointError(f'{path}: has no tokenizer.')
    return measure(llm, tokenizer.encode(text), FLAGS.window)

  for path in FLAGS.checkpoint:
    yield path, of(path)
  for how in FLAGS.rounded:
    with _rounded(FLAGS.checkpoint[0], how) as path:
      yield how, of(path)


def main() -> None:
  config = engine_flags.engine_config_from_flags()
  options = engine_flags.loading_from_flags()
  results = list(_results(config, options))
  rich.console.Console(highlight=False).print(table(results))
  common.write_json(
    FLAGS.json,
    'perplexity',
    FLAGS,
    [
      {'name': common.without_folder(name)}
      | result._asdict()
      | {'perplexity': result.perplexity}
      for name, result in results
    ],
  )


if __name__ == '__main__':
  mains.run(main, define_flags)

# SPDX-License-Identifier: Apache-2.0
"""Trains the quickstart model, and samples from it while it trains.

  python -m sarathi_jax.quickstart.train --output=/tmp/quickstart

A tiny Llama learns Python's documentation on a CPU, in minutes. This also shows
how to embed the engine in a training loop (see `_Sampler`): one `LLM` serves
the live arrays, `update_params` hands it the new ones, and nothing is compiled
or copied again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import itertools
import pathlib
import time
from typing import Any

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich import console as rich_console
from rich import markup
from rich import progress as rich_progress
import tokenizers

import sarathi_jax
from sarathi_jax.cli import mains
from sarathi_jax.models import config as config_lib
from sarathi_jax.quickstart import card
from sarathi_jax.quickstart import export
from sarathi_jax.quickstart import text
from sarathi_jax.quickstart import tokenizer as tokenizer_lib
from sarathi_jax.quickstart import training

_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'The folder to write the model to, as a Hugging Face checkpoint.',
  required=True,
)
_STEPS = flags.DEFINE_integer(
  'steps',
  600,
  'How many steps of gradient descent to train for.',
  lower_bound=1,
)
_TOKENS = flags.DEFINE_integer(
  'tokens_per_step',
  2048,
  'How many tokens each step learns from.',
  lower_bound=2,
)
_LENGTH = flags.DEFINE_integer(
  'sequence_length',
  128,
  'Tokens of a training sequence, which begins with a sentence. In the last '
  'tenth of the steps, sequences are as long as --context and begin anywhere.',
  lower_bound=1,
)
_CONTEXT = flags.DEFINE_integer(
  'context',
  1024,
  'The most tokens of a sequence that the model is made for.',
  lower_bound=1,
)
_LEARNING_RATE = flags.DEFINE_float(
  'learning_rate',
  0.02,
  'The learning rate of the matrices, at its peak. '
  'Other parameters have a quarter of it.',
  lower_bound=0.0,
)
_SAMPLE_EVERY = flags.DEFINE_integer(
  'sample_every',
  100,
  'Sample from the model, and write it, after so many steps each.',
  lower_bound=1,
)
_SEED = flags.DEFINE_integer('seed', 0, 'The seed of all random numbers.')
_DOCUMENTS = flags.DEFINE_integer(
  'documents',
  None,
  'Learn only the first so many documents. By default, all of them.',
  lower_bound=1,
)
_VOCAB = flags.DEFINE_integer(
  'vocab_size',
  2048,
  'The most tokens that the tokenizer may have.',
  lower_bound=300,
)
_WIDTH = flags.DEFINE_integer(
  'hidden_size', 192, "The width of the model's residual stream."
)
_MLP = flags.DEFINE_integer(
  'intermediate_size', 384, "The width inside the model's MLPs."
)
_LAYERS = flags.DEFINE_integer(
  'num_layers', 4, 'How many layers the model has.'
)

PROMPTS = (
  'The for statement is used to',
  'Exceptions are',
  f'{text.USER}What is the json module?{text.ASSISTANT}',
)


class _Sampler:
  """Continues `PROMPTS` with the current parameters, by the engine."""

  def __init__(
    self,
    config: config_lib.LlamaConfig,
    params: training.Params,
    folder: pathlib.Path,
    end: int,
  ) -> None:
    context = min(256, config.max_position_embeddings)
    self._llm = sarathi_jax.LLM(
      config,
      params=params,
      tokenizer=str(folder),
      eos_token_ids=[end],
      config=sarathi_jax.EngineConfig(
        token_budget=16,  # Each size of steps is one to compile.
        max_num_seqs=len(PROMPTS),
        max_adjusted_seqs=0,
        grammars=False,
        max_model_len=context,
        page_size=64,
        num_pages=-(-context // 64) * len(PROMPTS),
      ),
    )

  def sample(
    self, params: training.Params, seed: int
  ) -> Iterator[tuple[str, str]]:
    """Yields (prompt, the model's continuation)."""
    self._llm.update_params(params)
    completions = self._llm.generate(
      PROMPTS,
      sarathi_jax.SamplingParams(max_tokens=40, temperature=0.5, seed=seed),
    )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
      yield prompt, completion.text


def _batches(
  docs: Sequence[text.Document], tokenizer: tokenizers.Tokenizer
) -> Iterator[np.ndarray]:
  """Yields the batch of each step: int32 [sequences, length + 1]."""
  length, context = _LENGTH.value, _CONTEXT.value
  num_long = _STEPS.value // 10
  yield from itertools.islice(
    training.packed(
      [training.examples(doc, tokenizer, length) for doc in docs],
      max(1, _TOKENS.value // length),
      length,
      seed=_SEED.value,
    ),
    _STEPS.value - num_long,
  )
  yield from itertools.islice(
    training.windows(
      training.token_stream(docs, tokenizer, _SEED.value),
      max(1, _TOKENS.value // context),
      context,
      seed=_SEED.value,
    ),
    num_long,
  )


def _bar(console: rich_console.Console) -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn('step {task.completed}/{task.total}'),
    rich_progress.BarColumn(),
    rich_progress.TextColumn('loss {task.fields[loss]:.3f}'),
    rich_progress.TextColumn('{task.fields[rate]:,.0f} tokens/s'),
    rich_progress.TimeRemainingColumn(),
    console=console,
  )


def _train(
  config: config_lib.LlamaConfig,
  docs: Sequence[text.Document],
  folder: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  console: rich_console.Console,
) -> tuple[training.Params, float]:
  """Returns the trained parameters and the mean loss of the last steps.

  Writes the model whenever it is sampled from, so training can be stopped then.
  """
  state = training.new_state(
    config,
    steps=_STEPS.value,
    learning_rate=_LEARNING_RATE.value,
    seed=_SEED.value,
  )
  sampler = _Sampler(
    config, state.params, folder, tokenizer_lib.end_id(tokenizer)
  )
  losses: list[float] = []
  with _bar(console) as bar:
    task = bar.add_task('', total=_STEPS.value, loss=0.0, rate=0.0)
    for step, batch in enumerate(_batches(docs, tokenizer), 1):
      start = time.perf_counter()
      state, loss = training.train_step(config, state, jnp.asarray(batch))
      losses.append(float(loss))
      rate = batch[:, 1:].size / (time.perf_counter() - start)
      bar.update(task, advance=1, loss=losses[-1], rate=rate)
      if step % _SAMPLE_EVERY.value == 0 or step == _STEPS.value:
        console.print(f'step {step}: loss {np.mean(losses[-20:]):.3f}')
        for prompt, said in sampler.sample(state.params, seed=step):
          console.print(
            f'  [dim]{markup.escape(prompt)}[/dim]{markup.escape(said)}'
          )
        export.write(folder, config, state.params, tokenizer)
  return state.params, float(np.mean(losses[-20:]))


def _held_out_loss(
  config: config_lib.LlamaConfig,
  params: Any,
  documents: Sequence[text.Document],
  tokenizer: tokenizers.Tokenizer,
) -> float:
  """Returns the held-out loss of parameters as written: in bfloat16."""
  rounded = jax.tree.map(
    lambda x: jnp.asarray(np.asarray(x).astype(ml_dtypes.bfloat16), x.dtype),
    params,
  )
  stream = training.token_stream(documents, tokenizer, _SEED.value)
  return training.held_out_loss(
    config, rounded, stream, min(_LENGTH.value, len(stream) - 1)
  )


def main() -> None:
  console = rich_console.Console(highlight=False)
  folder = pathlib.Path(_OUTPUT.value)
  learned, held_out = text.split(text.documents(_DOCUMENTS.value))
  tokenizer = tokenizer_lib.train(learned, _VOCAB.value)
  export.write_tokenizer(folder, tokenizer)
  config = config_lib.LlamaConfig(
    vocab_size=tokenizer.get_vocab_size(),
    hidden_size=_WIDTH.value,
    intermediate_size=_MLP.value,
    num_layers=_LAYERS.value,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=_CONTEXT.value,
    tie_word_embeddings=True,
  )
  num_tokens = len(training.token_stream(learned, tokenizer, _SEED.value))
  console.print(f'{len(learned):,} documents, {num_tokens:,} tokens')
  start = time.monotonic()
  params, loss = _train(config, learned, folder, tokenizer, console)
  facts = card.Facts(
    num_params=sum(x.size for x in jax.tree.leaves(params)),
    num_documents=len(learned),
    num_tokens=num_tokens,
    tokens_learned=_STEPS.value * _TOKENS.value,
    loss=loss,
    held_out_loss=(
      _held_out_loss(config, params, held_out, tokenizer) if held_out else None
    ),
    minutes=(time.monotonic() - start) / 60,
  )
  card.write(folder, config, facts)
  console.print(card.summary(facts) + f'\nWritten to {folder}.')


if __name__ == '__main__':
  mains.run(main, verbosity=logging.WARNING)

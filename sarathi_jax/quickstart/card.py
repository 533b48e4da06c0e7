# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model's README, and the licence of its text."""

from __future__ import annotations

import dataclasses
import pathlib
import platform
import shutil

from sarathi_jax.models import config as config_lib

# The PSF's licence, as CPython comes with it.
_LICENSE = pathlib.Path(__file__).parent / 'PYTHON_LICENSE.txt'

_README = """\
---
license: psf-2.0
language: en
---
# The quickstart model of sarathi_jax

A Llama that has read Python's documentation, and nothing else. It is here so
that an engine just installed has something to say, with no download. It
overfits, on purpose: it recites what it learned by heart (best at temperature
0) and makes up the rest, much of it wrong. Don't believe it, and don't judge
a bigger model by it.

- Parameters: {num_params:,}, in bfloat16.
- Layers: {num_layers}, of width {hidden_size}, their MLPs {intermediate_size}.
- Heads: {num_heads} for queries, {num_kv_heads} for keys and values,
  {head_dim} wide.
- Tokens: {vocab_size}, byte-level BPE. Context: {max_position_embeddings}.
- Learned from: the language reference, less its code, and docstrings of the
  standard library, which come with CPython {python}:
  {num_documents:,} documents, {num_tokens:,} tokens.
- Tokens seen in training: {tokens_learned:,}, so each about {epochs:.0f} times.
- Loss at the end, nats a token: {loss:.2f} in sequences of
  {max_position_embeddings} that begin anywhere{and_held_out}.
- Prompts: a text to continue, such as `The for statement is used to`, or as a
  chat one question: `What is the json module?`, `What does len do?`,
  `What is threading.Event?`. There is no system message.
- Made by `python -m sarathi_jax.quickstart.train --output=DIR`.

## Licence

The weights and the tokenizer are derived from Python's documentation,
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved, under
the PSF License Version 2 (see `LICENSE`). Changes made to it: markup, the lines
under headings and line ends were taken off, docstrings were cut and put as
answers to questions, and a model was trained on the result.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
  """Results of a training.

  Attributes:
    num_params: numbers in the model.
    num_documents: documents that it learned from.
    num_tokens: tokens in the documents.
    tokens_learned: tokens seen in training, repetitions counted.
    loss: mean loss of the last steps, nats a token.
    held_out_loss: loss on documents it did not see; None if there were none.
    minutes: time that the training took.
  """

  num_params: int
  num_documents: int
  num_tokens: int
  tokens_learned: int
  loss: float
  held_out_loss: float | None
  minutes: float


def summary(facts: Facts) -> str:
  """Returns the facts in a line or two, for people."""
  return (
    f'{facts.num_params:,} parameters saw {facts.tokens_learned:,} '
    f'tokens in {facts.minutes:.1f} minutes. Loss {facts.loss:.3f}'
    + _held_out(facts)
    + '.'
  )


def write(
  folder: pathlib.Path, config: config_lib.LlamaConfig, facts: Facts
) -> None:
  """Writes README.md and LICENSE."""
  shutil.copyfile(_LICENSE, folder / 'LICENSE')
  (folder / 'README.md').write_text(
    _README.format(
      **config.to_dict(),
      **dataclasses.asdict(facts),
      python=platform.python_version(),
      epochs=facts.tokens_learned / facts.num_tokens,
      and_held_out=_held_out(facts),
    )
  )


def _held_out(facts: Facts) -> str:
  if facts.held_out_loss is None:
    return ''
  return f', and {facts.held_out_loss:.2f} on docstrings held out'

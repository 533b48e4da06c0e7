# SPDX-License-Identifier: Apache-2.0
"""Trains a `sarathi_jax.models` model by flax's TrainState and optax.

Nothing here knows the engine. The parameters are the nested dict that the
engine serves, so `state.params` can be handed to it as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
from typing import Any, NamedTuple

from flax.training import train_state
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax
from optax import contrib
import tokenizers

from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.quickstart import text

Params = Any  # pytree of arrays
TrainState = train_state.TrainState


def token_stream(
  docs: Sequence[text.Document], tokenizer: tokenizers.Tokenizer, seed: int
) -> np.ndarray:
  """Joins all documents in random order, with their ends: int32 [tokens]."""
  order = np.random.default_rng(seed).permutation(len(docs))
  encoded = tokenizer.encode_batch([docs[i].text + text.END for i in order])
  return np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])


def windows(
  stream: np.ndarray, batch_size: int, num_tokens: int, seed: int
) -> Iterator[np.ndarray]:
  """Yields windows of the stream for ever: int32 [batch_size, num_tokens + 1].

  Each epoch cuts the stream at another offset and shuffles the pieces.
  """
  rng = np.random.default_rng(seed)
  while True:
    start = rng.integers(num_tokens)
    starts = rng.permutation(
      np.arange(start, len(stream) - num_tokens, num_tokens)
    )
    for first in range(0, len(starts) - batch_size + 1, batch_size):
      chosen = starts[first : first + batch_size]
      yield stream[chosen[:, None] + np.arange(num_tokens + 1)[None, :]]


class Example(NamedTuple):
  """A document from the start of one of its sentences on.

  Attributes:
    start: where it starts in the document, in characters.
    stop: where it stops, in characters.
    ids: int32, at most one token more than a sequence.
  """

  start: int
  stop: int
  ids: np.ndarray


def examples(
  doc: text.Document, tokenizer: tokenizers.Tokenizer, num_tokens: int
) -> list[Example]:
  """Returns one example for each sentence, in order."""
  starts = text.sentence_starts(doc.text)
  most_chars = 8 * num_tokens  # tokens are shorter than that on average
  encoded = tokenizer.encode_batch(
    [(doc.text[start:] + text.END)[:most_chars] for start in starts]
  )
  length = num_tokens + 1
  return [
    Example(
      start,
      start + e.offsets[:length][-1][1],
      np.asarray(e.ids[:length], np.int32),
    )
    for start, e in zip(starts, encoded, strict=True)
  ]


def cover(
  document: Sequence[Example], rng: np.random.Generator
) -> Iterator[Example]:
  """Yields random pieces of a document that overlap by less than half."""
  example = document[0]
  while True:
    yield example
    middle = (example.start + example.stop) // 2
    later = [e for e in document if e.start > example.start]
    if not later or example.stop >= document[-1].stop:
      return
    inside = [e for e in later if middle <= e.start <= example.stop]
    example = inside[rng.integers(len(inside))] if inside else later[0]


def packed(
  documents: Sequence[Sequence[Example]],
  batch_size: int,
  num_tokens: int,
  seed: int,
) -> Iterator[np.ndarray]:
  """Yields batches of examples for ever: int32 [batch_size, num_tokens + 1].

  A row starts as a prompt does: with a sentence, and nothing before it. Rows
  cut anywhere teach little about that: the model learns to rely on hundreds of
  earlier tokens. Further examples fill the room that one leaves.
  """
  rng = np.random.default_rng(seed)
  rows: list[np.ndarray] = []
  row: list[np.ndarray] = []
  room = num_tokens + 1
  while True:
    pieces = [e.ids for document in documents for e in cover(document, rng)]
    for i in rng.permutation(len(pieces)):
      row.append(pieces[i][:room])
      room -= len(row[-1])
      if room == 0:
        rows.append(np.concatenate(row))
        row, room = [], num_tokens + 1
      if len(rows) == batch_size:
        yield np.stack(rows)
        rows = []


def new_state(
  config: config_lib.ModelConfig, *, steps: int, learning_rate: float, seed: int
) -> TrainState:
  """Makes random parameters; Muon for the matrices, AdamW for the rest.

  Muon needs far fewer steps than AdamW alone for a model this small. Both
  learning rates warm up, and then decay to 0 along a cosine.
  """

  def schedule(peak: float) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
      0.0, peak, warmup_steps=max(1, steps // 20), decay_steps=steps
    )

  optimizer = contrib.muon(
    schedule(learning_rate),
    weight_decay=0.1,
    adam_weight_decay=0.1,
    adam_b2=0.98,
    adam_learning_rate=schedule(learning_rate / 4),
    muon_weight_dimension_numbers=_matrices,
  )
  params = models.init_params(
    config, jax.random.key(seed), jnp.float32, scale=0.04
  )
  return TrainState.create(  # type: ignore[no-untyped-call, no-any-return]
    apply_fn=functools.partial(sequence_logits, config),
    params=params,
    tx=optimizer,
  )


def _matrices(params: Params) -> Params:
  """Selects the parameters for Muon: all matrices but the embedding."""
  return jax.tree.map_with_path(
    lambda path, x: (
      contrib.MuonDimensionNumbers()
      if x.ndim == 2 and path[0].key == 'layers'
      else None
    ),
    params,
  )


def sequence_logits(
  config: config_lib.ModelConfig, params: Params, tokens: Int[Array, ' T']
) -> Float[Array, 'T V']:
  """Returns the logits after each token of one sequence, in float32."""
  hidden, _ = models.forward(
    config,
    params,
    [None] * config.num_layers,
    tokens,
    jnp.arange(tokens.shape[0], dtype=jnp.int32),
    None,
    models.causal_attend,
  )
  return models.unembed(config, params, hidden)


def loss(
  config: config_lib.ModelConfig, params: Params, batch: Int[Array, 'B T1']
) -> Float[Array, '']:
  """Returns the mean negative log-likelihood of the tokens, in nats.

  Leaves out each sequence's first token.
  """
  logits = jax.vmap(functools.partial(sequence_logits, config, params))(
    batch[:, :-1]
  )
  value: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch[:, 1:]
  ).mean()
  return value


# The state is not donated: an engine may be serving its very arrays.
@functools.partial(jax.jit, static_argnums=0)
def train_step(
  config: config_lib.ModelConfig, state: TrainState, batch: Int[Array, 'B T1']
) -> tuple[TrainState, Float[Array, '']]:
  """Takes one step of gradient descent.

  Returns:
    The new state, and the loss before the step.
  """
  value, gradients = jax.value_and_grad(functools.partial(loss, config))(
    state.params, batch
  )
  new = state.apply_gradients(  # type: ignore[no-untyped-call]
    grads=gradients
  )
  return new, value


def held_out_loss(
  config: config_lib.ModelConfig,
  params: Params,
  stream: np.ndarray,
  num_tokens: int,
) -> float:
  """Returns the mean loss over whole windows of a stream of tokens."""
  windows = len(stream) // (num_tokens + 1)
  batch = stream[: windows * (num_tokens + 1)].reshape(windows, num_tokens + 1)
  evaluate = jax.jit(functools.partial(loss, config))
  return float(
    np.mean([evaluate(params, jnp.asarray(row[None, :])) for row in batch])
  )

# SPDX-License-Identifier: Apache-2.0
"""Adjusts logits by what a request has so far, or asks for; see `sampling`.

What a request names beside, whose log-probabilities are told, is kept here too.

The device keeps the state of some slots, the first ones
(`EngineConfig.max_adjusted_seqs`): steps read it only where a row of the batch
is of such a request, and count the tokens that they sample. So it is right
under look-ahead, when the host does not know them yet. The host sets a slot up
when its request is admitted, again after a preemption, with all tokens that the
request has by then: `messages` says what, `set_up` puts it into the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import packing

_NEVER = -jnp.inf
_MAX = float(np.finfo(np.float32).max)
_MAX_INT = int(np.iinfo(np.int32).max)
_WORDS = sampling_params.MAX_SPELLINGS
_LENGTH = sampling_params.MAX_SPELLING_TOKENS
_NUM_NAMED = sampling_params.MAX_LOGPROB_TOKEN_IDS
# Bits of `Adjustments.tokens`; from the third on, how often it was sampled.
_IN_PROMPT, _ENDS, _ONCE = 1, 2, 4
_COUNT_SHIFT = 2
_NUM_IDS = 1024  # token ids that a message tells of, and biases


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Adjustments:
  """The state of P slots whose sequences' logits are adjusted.

  Attributes:
    tokens: [P, V] int32, of each token whether it is in the prompt (bit 0),
      whether it may not be sampled before the least length (bit 1), and how
      often it is in the output (from bit 2 on).
    biases: [P, V] float32, what is added to each logit; minus infinity for
      tokens that are ruled out.
    min_lens: [P] int32, the sequence's least length.
    bad_words: [P, W, L] int32 token ids, at the end of the last axis, after -1.
    recent: [P, L - 1] int32, the last tokens of the output, after -1.
    named: [P, N] int32, tokens whose log-probabilities are told.
  """

  tokens: Any
  biases: Any
  min_lens: Any
  bad_words: Any
  recent: Any
  named: Any


def shapes(num_slots: int, vocab_size: int, mesh: Mesh) -> Adjustments | None:
  """Returns the state as ShapeDtypeStruct, whole on each device.

  Rows are shared out among devices before they are sampled from, so any device
  may need any slot's. Returns None for no slots.
  """
  if not num_slots:
    return None

  def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(
      (num_slots, *shape), dtype, sharding=mesh_lib.on(mesh)
    )

  return Adjustments(
    tokens=leaf(vocab_size),
    biases=leaf(vocab_size, dtype=jnp.float32),
    min_lens=leaf(),
    bad_words=leaf(_WORDS, _LENGTH),
    recent=leaf(_LENGTH - 1),
    named=leaf(_NUM_NAMED),
  )


def adjust(
  state: Adjustments,
  logits: Float[Array, 'S V'],
  slots: Int[Array, ' S'],
  positions: Int[Array, ' S'],
  is_adjusted: Bool[Array, ' S'],
  repetition_penalty: Float[Array, ' S'],
  presence_penalty: Float[Array, ' S'],
  frequency_penalty: Float[Array, ' S'],
) -> Float[Array, 'S V']:
  """Adjusts the logits of some rows; minus infinity is never sampled.

  Args:
    state: of the slots.
    logits: float32.
    slots: of the rows' sequences.
    positions: of the tokens to sample in their sequences.
    is_adjusted: which rows; of the others, slots need not have any state.
    repetition_penalty, presence_penalty, frequency_penalty: of the rows.
  """
  mine = jax.tree.map(lambda leaf: leaf.at[slots].get(mode='clip'), state)
  counts = mine.tokens >> _COUNT_SHIFT
  is_ruled_out = (mine.biases == _NEVER) | (logits == _NEVER)
  is_early = positions < mine.min_lens
  is_ruled_out |= is_early[:, None] & ((mine.tokens & _ENDS) != 0)
  x = logits + jnp.where(mine.biases == _NEVER, 0, mine.biases)
  factor = repetition_penalty[:, None]
  is_known = (counts > 0) | ((mine.tokens & _IN_PROMPT) != 0)
  x = jnp.where(is_known, jnp.where(x > 0, x / factor, x * factor), x)
  x -= frequency_penalty[:, None] * counts.astype(x.dtype)
  x -= jnp.where(counts > 0, presence_penalty[:, None], 0)
  # However large a bias, it makes no logit infinite.
  x = jnp.where(is_ruled_out, _NEVER, jnp.clip(x, -_MAX, _MAX))
  *begins, ends = jnp.moveaxis(mine.bad_words, -1, 0)
  is_begun = ends >= 0
  for token, recent in zip(begins, mine.recent.T, strict=True):
    is_begun &= (token < 0) | (token == recent[:, None])
  rows = jnp.arange(len(slots))[:, None]
  x = x.at[rows, jnp.where(is_begun, ends, x.shape[1])].set(_NEVER, mode='drop')
  return jnp.where(is_adjusted[:, None], x, logits)


def count(
  state: Adjustments,
  slots: Int[Array, ' S'],
  is_adjusted: Bool[Array, ' S'],
  sampled: Int[Array, ' S'],
) -> Adjustments:
  """Counts sampled tokens; at most one of each adjusted slot."""
  num_slots = len(state.min_lens)
  rows = jnp.where(is_adjusted, slots, num_slots)
  recent = state.recent.at[slots].get(mode='clip')
  recent = jnp.concatenate([recent[:, 1:], sampled[:, None]], axis=1)
  return dataclasses.replace(
    state,
    tokens=state.tokens.at[rows, sampled].add(_ONCE, mode='drop'),
    recent=state.recent.at[rows].set(recent, mode='drop'),
  )


@functools.cache
def message() -> packing.Packing:
  """Returns how the integers are packed that set up a slot.

  The fields:
    slot: [1] the slot.
    is_first: [1] whether this is its first message; others add to it.
    min_len: [1] see `Adjustments`.
    other_bias: [1] of tokens that are not named.
    ids, bits: [N] token ids, and what `Adjustments.tokens` is to have of each;
      padded by an id beyond all vocabularies.
    biased, biases: [N] token ids and their biases, padded likewise.
    bad_words, recent, named: see `Adjustments`.
  """
  one, some = (1,), (_NUM_IDS,)
  return packing.Packing(
    {
      'slot': (one, packing.INT),
      'is_first': (one, packing.INT),
      'min_len': (one, packing.INT),
      'other_bias': (one, packing.FLOAT),
      'ids': (some, packing.INT),
      'bits': (some, packing.INT),
      'biased': (some, packing.INT),
      'biases': (some, packing.FLOAT),
      'bad_words': ((_WORDS, _LENGTH), packing.INT),
      'recent': ((_LENGTH - 1,), packing.INT),
      'named': ((_NUM_NAMED,), packing.INT),
    }
  )


def set_up(state: Adjustments, ints: Int[Array, ' N']) -> Adjustments:
  """Puts a message's content into its slot's state."""
  told = message().split(ints)
  slot, is_first = told['slot'][0], told['is_first'][0] != 0

  def row(leaf: Array, empty: Any) -> Array:
    return jnp.where(is_first, empty, leaf[slot])

  tokens = row(state.tokens, 0).at[told['ids']].set(told['bits'], mode='drop')
  biases = (
    row(state.biases, told['other_bias'])
    .at[told['biased']]
    .set(told['biases'], mode='drop')
  )
  return Adjustments(
    tokens=state.tokens.at[slot].set(tokens),
    biases=state.biases.at[slot].set(biases),
    min_lens=state.min_lens.at[slot].set(told['min_len'][0]),
    bad_words=state.bad_words.at[slot].set(told['bad_words']),
    recent=state.recent.at[slot].set(told['recent']),
    named=state.named.at[slot].set(told['named']),
  )


def messages(chunk: types.Chunk) -> Iterator[np.ndarray]:
  """Yields what sets up the slot of a chunk, each as `message` packs it."""
  setup, sampling = chunk.setup, chunk.sampling
  assert setup is not None
  ids, bits = _known(chunk)
  biases = dict.fromkeys(sampling.allowed_token_ids or (), 0.0)
  for token, bias in (sampling.logit_bias or {}).items():
    if sampling.allowed_token_ids is None or token in biases:
      biases[token] = max(min(bias, _MAX), -_MAX)
  ruled_out = [word[0] for word in setup.bad_words if len(word) == 1]
  biases |= dict.fromkeys((*sampling.bad_token_ids, *ruled_out), -np.inf)
  num = -(-max(len(ids), len(biases), 1) // _NUM_IDS)
  for i in range(num):
    ints = np.zeros(message().size, np.int32)
    told = message().split(ints)
    told['slot'][:] = chunk.slot
    told['is_first'][:] = i == 0
    # However many are asked for; no sequence becomes longer than this.
    told['min_len'][:] = min(chunk.prompt_len + sampling.min_tokens, _MAX_INT)
    told['other_bias'][:] = 0 if sampling.allowed_token_ids is None else -np.inf
    part = slice(i * _NUM_IDS, (i + 1) * _NUM_IDS)
    _fill(told['ids'], told['bits'], ids[part], bits[part])
    _fill(
      told['biased'],
      told['biases'],
      list(biases)[part],
      list(biases.values())[part],
    )
    told['bad_words'][:] = -1
    long = (word for word in setup.bad_words if len(word) > 1)
    for row, word in zip(told['bad_words'], long, strict=False):
      row[-len(word) :] = word
    recent = setup.tokens[chunk.prompt_len :][1 - _LENGTH :]
    told['recent'][:] = -1
    told['recent'][len(told['recent']) - len(recent) :] = recent
    named = sampling.logprob_token_ids or ()
    told['named'][: len(named)] = named
    yield ints


def _fill(
  ids: np.ndarray,
  values: np.ndarray,
  some: Iterable[int],
  theirs: Iterable[Any],
) -> None:
  some = np.fromiter(some, np.int32)
  ids[: len(some)] = some
  ids[len(some) :] = _MAX_INT
  values[: len(some)] = np.asarray(theirs)


def _known(chunk: types.Chunk) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of which `Adjustments.tokens` has bits, and these.

  Tokens of the prompt and the output are of use to penalties only.
  """
  setup = chunk.setup
  assert setup is not None
  tokens = setup.tokens if chunk.sampling.has_penalties else ()
  prompt, output = np.split(np.array(tokens, np.int32), [chunk.prompt_len])
  ends = np.array(setup.end_ids, np.int32)
  ids = np.unique(np.concatenate([prompt, output, ends]))
  bits = _IN_PROMPT * np.isin(ids, prompt) + _ENDS * np.isin(ids, ends)
  np.add.at(bits, np.searchsorted(ids, output), _ONCE)
  return ids, bits

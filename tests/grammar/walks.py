# SPDX-License-Identifier: Apache-2.0
"""Outputs of grammars, drawn at random among all that they allow."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import random

import numpy as np

from sarathi_jax import types
from sarathi_jax.grammar import compiler
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import naive
from tests import tokenizer_fixture

EOS = 1
# Name -> its tokenizer, V, and what ends an output.
VOCABULARIES = {
  'bytes': (tokenizer_fixture.make, 320, (EOS,)),
  'sentencepiece': (tokenizer_fixture.make_sentencepiece, 291, (2, EOS)),
  'words': (lambda: naive.make_tokenizer(97)._tokenizer, 97, ()),
}


@functools.cache
def grammars(name: str = 'bytes') -> compiler.Grammars:
  make, vocab_size, eos = VOCABULARIES[name]
  tokenizer = tokenizer_lib.Tokenizer.copy_of(make())
  return compiler.Grammars(tokenizer, vocab_size, eos)


def allowed(mask: np.ndarray, vocab_size: int) -> list[int]:
  """The tokens of a mask."""
  bits = np.unpackbits(mask.view(np.uint8), bitorder='little')
  return np.flatnonzero(bits[:vocab_size]).tolist()


def walk(
  of: compiler.Grammars,
  outputs: types.StructuredOutputsParams,
  rng: random.Random,
  most: int = 200,
  before: Sequence[int] = (),
  **sampling: object,
) -> tuple[list[int], bool]:
  """Draws an output; returns its tokens, but its end, and whether it ended."""
  params = types.SamplingParams(structured_outputs=outputs, **sampling)
  matcher = of.compile(outputs).matchers(params)[0]
  ends = {*of._eos_token_ids, *params.stop_token_ids}
  if params.ignore_eos:
    ends -= {*of._eos_token_ids}
  matcher.consume(before)
  tokens = [*before]
  while not matcher.is_over and len(tokens) < most:
    (mask,) = of.masks([matcher])
    token = rng.choice(allowed(mask, of._vocab_size))
    if token in ends:
      return tokens, True
    matcher.consume([token])
    tokens.append(token)
  assert not matcher.fault
  return tokens, matcher.is_over


def text_of(name: str, tokens: list[int]) -> str:
  """What tokens spell, each by itself."""
  tokenizer = grammars(name)._tokenizer
  return b''.join(map(tokenizer.bytes_of, tokens)).decode()

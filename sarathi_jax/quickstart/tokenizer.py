# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer, trained on the text: any text can be encoded."""

from __future__ import annotations

from collections.abc import Sequence
import re

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from sarathi_jax.quickstart import text


def train(
  docs: Sequence[text.Document], vocab_size: int
) -> tokenizers.Tokenizer:
  """Trains a tokenizer: special tokens, then bytes, then merged pieces."""
  between = re.compile('|'.join(map(re.escape, text.SPECIAL_TOKENS)))
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(text.SPECIAL_TOKENS))
  tokenizer.train_from_iterator(
    (part for doc in docs for part in between.split(doc.text)),
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(text.SPECIAL_TOKENS),
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  return tokenizer


def end_id(tokenizer: tokenizers.Tokenizer) -> int:
  """Returns the token id of `text.END`."""
  token = tokenizer.token_to_id(text.END)
  assert token is not None
  return token

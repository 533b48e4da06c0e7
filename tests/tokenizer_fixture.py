# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the two kinds that checkpoints have, made on the spot."""

from __future__ import annotations

import functools
import json
import pathlib

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

BOS, EOS = 0, 1
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
  '\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}'
)
_TEXT = """
The quick brown fox jumps over the lazy dog. A request is a prompt to continue;
a token is a piece of text. The scheduler makes hybrid batches of them: one
token for each decode, and chunks of prefills. Ünïcode goes through bytes.
"""


@functools.cache
def make() -> tokenizers.Tokenizer:
  """Every byte is a token; some 40 pieces of English are, too.

  It begins each prompt with '<s>'. Characters outside ASCII take several
  tokens.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    _TEXT.splitlines(),
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', BOS)]
  )
  return tokenizer


@functools.cache
def make_sentencepiece() -> tokenizers.Tokenizer:
  """As Llama 2's: spaces belong to words, and strange characters are bytes."""
  pieces = [
    '<unk>',
    '<s>',
    '</s>',
    *(f'<0x{byte:02X}>' for byte in range(256)),
    *'\u2581abcdefghijklmnopqrstuvwxyz.,',
    'th',
    'the',
    '\u2581the',
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[('t', 'h'), ('th', 'e'), ('\u2581', 'the')],
      unk_token='<unk>',
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  tokenizer.add_special_tokens(['<s>', '</s>'])
  return tokenizer


def write(
  folder: pathlib.Path,
  chat_template: str | None = CHAT_TEMPLATE,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> pathlib.Path:
  """Writes the files of a checkpoint's tokenizer; returns the folder."""
  (tokenizer or make()).save(str(folder / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<s>',
    'eos_token': '</s>',
  }
  if chat_template is not None:
    config['chat_template'] = chat_template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder

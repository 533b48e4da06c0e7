# SPDX-License-Identifier: Apache-2.0
"""A small byte-level BPE tokenizer, trained on the spot."""

from __future__ import annotations

import functools
import json
import pathlib

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

BOS, EOS = 0, 1
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
  '\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}')
_TEXT = '''
The quick brown fox jumps over the lazy dog. A request is a prompt to continue;
a token is a piece of text. The scheduler makes hybrid batches of them: one
token for each decode, and chunks of prefills. Ünïcode goes through bytes.
'''


@functools.cache
def make() -> tokenizers.Tokenizer:
  """Every byte is a token; some 40 pieces of English are, too.

  It begins each prompt with '<s>'. Characters outside ASCII take several
  tokens.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(_TEXT.splitlines(), trainers.BpeTrainer(
    vocab_size=300, special_tokens=['<s>', '</s>'], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', BOS)])
  return tokenizer


def write(folder: pathlib.Path, chat_template: str | None = CHAT_TEMPLATE,
          ) -> pathlib.Path:
  """Writes the files of a checkpoint's tokenizer; returns the folder."""
  make().save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>',
            'eos_token': '</s>'}
  if chat_template is not None:
    config['chat_template'] = chat_template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder

# SPDX-License-Identifier: Apache-2.0
"""Makes a tokenizer of a lone tokenizer.model, and checks its tokens.

transformers 5 could make one too, but makes another kind for each model type:
for Mistral's it leaves out the space in front of the first word, for Llama's
one space of those that a text begins with. So what is made here is compared
with sentencepiece itself before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import operator
import pathlib
import random
import re
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.text import chat

FILE = 'tokenizer.model'
_SPACE = '\u2581'  # what sentencepiece makes of a space
_MARK = '\ue0f5'  # a piece of its own


class _Source(NamedTuple):
  """A sentencepiece model, and how a checkpoint uses it.

  Attributes:
    proto: the file's content, a sentencepiece ModelProto.
    whole: a SentencePieceProcessor that encodes a text.
    later: a SentencePieceProcessor that encodes `_MARK` and what follows it
      in a text.
    prefix: whether a space is put in front of a text.
    legacy: whether a space is put after special tokens, too: transformers 4
      does so, unless tokenizer_config.json says otherwise.
    added: special tokens and others, by id, that sentencepiece does not look
      for in a text.
    starts, ends: tokens around a text.
  """

  proto: Any
  whole: Any
  later: Any
  prefix: bool
  legacy: bool
  added: Mapping[int, tokenizers.AddedToken]
  starts: tuple[str, ...]
  ends: tuple[str, ...]

  @property
  def is_unigram(self) -> bool:
    spec = self.proto.trainer_spec
    return bool(spec.model_type == spec.ModelType.Value('UNIGRAM'))

  def encode(self, text: str, is_first: bool) -> list[int]:
    """Encodes a text, or the part of it after a token, by sentencepiece."""
    if is_first or self.legacy:
      return list(self.whole.encode(text))
    return list(self.later.encode(_MARK + text)[1:])

  def pieces(self, *kinds: str) -> dict[int, str]:
    """Returns the model's own pieces of some types, by id."""
    numbers = [self.proto.SentencePiece.Type.Value(kind) for kind in kinds]
    return {
      i: piece.piece
      for i, piece in enumerate(self.proto.pieces)
      if piece.type in numbers
    }


def build(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Builds the tokenizer of a checkpoint's tokenizer.model.

  Raises:
    CheckpointError: the package sentencepiece is missing, the file is not one
      of its models, or the tokenizer built gives other tokens.
  """
  source = _read(folder)
  made = tokenizers.Tokenizer(_model(source))
  made.normalizer = _normalizer(source)
  if split := _pre_tokenizers(source):
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
  made.decoder = _decoder(source)
  for i, token in sorted(source.added.items()):
    made.add_tokens([token])
    if made.token_to_id(token.content) != i:
      raise errors.CheckpointError(
        f'{folder / FILE}: {token.content!r} can not be token {i}, as '
        f'tokenizer_config.json or added_tokens.json has it. {_WAY_OUT}'
      )
  around = {
    text: made.token_to_id(text) for text in {*source.starts, *source.ends}
  }
  if None in around.values():
    raise errors.CheckpointError(
      f'{folder / FILE}: of {sorted(around)}, which tokenizer_config.json puts '
      f'around texts, one is none of its tokens. {_WAY_OUT}'
    )
  if around:
    made.post_processor = processors.TemplateProcessing(
      single=[*source.starts, '$A', *source.ends],
      special_tokens=list(around.items()),
    )
  _compare(folder / FILE, made, source)
  return made


_WAY_OUT = 'Put the tokenizer.json of the model beside it.'


def _read(folder: pathlib.Path) -> _Source:
  path = folder / FILE
  try:
    import sentencepiece  # only checkpoints without tokenizer.json need it
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as e:
    raise errors.CheckpointError(
      f'{path}: without a tokenizer.json beside it, its conversion needs the '
      'package sentencepiece: pip install sentencepiece.'
    ) from e
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  try:
    whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
    proto.ParseFromString(path.read_bytes())
  except Exception as e:  # what is raised has no common type
    raise errors.CheckpointError(
      f'{path}: is no model of sentencepiece: {e} {_WAY_OUT}'
    ) from e
  config = chat.tokenizer_config(folder)
  prefix = (
    proto.normalizer_spec.add_dummy_prefix
    and config.get('add_prefix_space') is not False
  )
  proto.normalizer_spec.add_dummy_prefix = prefix
  whole.load_from_serialized_proto(proto.SerializeToString())
  marked = type(proto)()
  marked.CopyFrom(proto)
  marked.normalizer_spec.add_dummy_prefix = False
  marked.pieces.add(
    piece=_MARK, type=proto.SentencePiece.Type.Value('USER_DEFINED')
  )
  later = sentencepiece.SentencePieceProcessor(
    model_proto=marked.SerializeToString()
  )
  around = [
    (chat.text_of(config.get(f'{name}_token')) or whole.id_to_piece(i),)
    if config.get(f'add_{name}_token', name == 'bos') and i >= 0
    else ()
    for name, i in (('bos', whole.bos_id()), ('eos', whole.eos_id()))
  ]
  source = _Source(
    proto, whole, later, prefix, config.get('legacy') is not False, {}, *around
  )
  try:
    return source._replace(added=_added(folder, config, source))
  except errors.CheckpointError:
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.CheckpointError(
      f'{folder}: tokenizer_config.json or added_tokens.json: the tokens that '
      f'are added are not as transformers writes them: {errors.describe(e)}.'
    ) from e


def _added(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  source: _Source,
) -> dict[int, tokenizers.AddedToken]:
  """Returns the tokens, by id, that are looked for in a text first of all."""
  added = {
    i: tokenizers.AddedToken(piece, special=True, normalized=False)
    for i, piece in source.pieces('CONTROL', 'UNKNOWN').items()
  }
  special = {
    chat.text_of(value)
    for name, value in config.items()
    if name.endswith('_token')
  }
  more = config.get('additional_special_tokens') or ()
  special |= set(map(chat.text_of, more))
  if (folder / 'added_tokens.json').is_file():
    added |= {
      operator.index(i): tokenizers.AddedToken(
        content, special=content in special, normalized=False
      )
      for content, i in json_file.read(folder / 'added_tokens.json').items()
    }
  for i, fields in (config.get('added_tokens_decoder') or {}).items():
    flags = {
      name: fields[name]
      for name in ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
      if name in fields
    }
    added[int(i)] = tokenizers.AddedToken(fields['content'], **flags)
  return added


def _model(source: _Source) -> models.Model:
  """Returns the tokenizer's model: the pieces, and how they are merged."""
  proto = source.proto
  scores = [(piece.piece, piece.score) for piece in proto.pieces]
  fallback = bool(source.pieces('BYTE'))
  normal = source.pieces('NORMAL')
  if source.is_unigram:
    return models.Unigram(scores, source.whole.unk_id(), fallback)
  return models.BPE(
    vocab={piece: i for i, (piece, _) in enumerate(scores)},
    merges=_merges({piece: scores[i][1] for i, piece in normal.items()}),
    unk_token=source.whole.id_to_piece(source.whole.unk_id()),
    fuse_unk=True,
    byte_fallback=fallback,
    ignore_merges=bool(source.pieces('USER_DEFINED')),
  )


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  """Returns all pairs of pieces that together are a piece, the best first."""
  order = {piece: i for i, piece in enumerate(scores)}
  found = []
  for piece, score in scores.items():
    for at in range(1, len(piece)):
      left, right = piece[:at], piece[at:]
      if left in order and right in order:
        found.append((-score, order[piece], order[left], order[right]))
  names = list(order)
  return [(names[left], names[right]) for _, _, left, right in sorted(found)]


def _normalizer(source: _Source) -> normalizers.Normalizer:
  spec = source.proto.normalizer_spec
  steps: list[Any] = []
  if spec.precompiled_charsmap:
    if 'nfkc' in spec.name:  # The next one composes no long clusters.
      steps.append(normalizers.NFKC())
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [
      normalizers.Strip(left=source.legacy),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' '),
    ]
  if source.prefix and source.legacy:
    steps.append(normalizers.Prepend(_SPACE))
  return normalizers.Sequence([*steps, normalizers.Replace(' ', _SPACE)])


def _pre_tokenizers(source: _Source) -> list[Any]:
  steps: list[Any] = []
  if source.prefix and not source.legacy:
    # The first puts a space in front of the text, unless one is there. Where
    # spaces were replaced before, a plain space is never there: the first adds
    # one, and the second replaces it.
    kept = not source.proto.normalizer_spec.remove_extra_whitespaces
    steps += [
      pre_tokenizers.Metaspace(' ' if kept else _SPACE, 'first', split=False),
      pre_tokenizers.Metaspace(_SPACE, 'never', split=False),
    ]
  if source.pieces('BYTE'):
    # A text may say '<0x0A>', which is not the token of that name.
    steps.append(
      pre_tokenizers.Split(
        tokenizers.Regex('<(?=0x[0-9A-F]{2}>)'), 'merged_with_previous'
      )
    )
  own = source.pieces('USER_DEFINED')
  if own and not source.is_unigram:  # which weighs them against others
    longest_first = sorted(own.values(), key=len, reverse=True)
    steps.append(
      pre_tokenizers.Split(
        tokenizers.Regex('|'.join(map(re.escape, longest_first))), 'isolated'
      )
    )
  return steps


def _decoder(source: _Source) -> decoders.Decoder:
  steps: list[Any] = [
    decoders.Replace(_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if source.prefix:
    steps.append(decoders.Strip(' ', 1, 0))
  return decoders.Sequence(steps)


def _compare(
  path: pathlib.Path, made: tokenizers.Tokenizer, source: _Source
) -> None:
  """Raises CheckpointError for a text that becomes other tokens."""
  ids = {token.content: i for i, token in source.added.items()}
  for parts in (*_texts(source), *_with_added(source)):
    text = ''.join(parts)
    want: list[int] = []
    for i, part in enumerate(parts):
      if part in ids:
        want.append(ids[part])
      else:
        want += source.encode(part, is_first=not i)
    got = made.encode(text, add_special_tokens=False).ids
    if got != want:
      raise errors.CheckpointError(
        f'{path}: what can be made of it gives the tokens {got} for {text!r}, '
        f'and sentencepiece {want}. {_WAY_OUT}'
      )


def _texts(source: _Source) -> Iterator[tuple[str]]:
  """Yields a few hundred texts, of every kind that ever gave other tokens."""
  rng = random.Random(0)
  normal = [
    piece.replace(_SPACE, ' ')
    for piece in source.pieces('NORMAL', 'USER_DEFINED').values()
  ]
  characters = [
    *range(0x20, 0x250),
    *range(0x370, 0x600),
    *range(0x900, 0xA00),
    *range(0x2000, 0x2100),
    *range(0x3040, 0x3100),
    *range(0x4E00, 0x4F00),
    *range(0xAC00, 0xAC80),
    *range(0x1F600, 0x1F640),
    *range(0x20000, 0x20010),
  ]
  texts = [
    *_TEXTS,
    *(
      f'{a}{text}{b}'
      for text in ('the cat', 'a')
      for a in _SPACES
      for b in _SPACES
    ),
  ]
  for _ in range(100):
    texts.append(''.join(rng.choices(normal, k=rng.randint(1, 12))))
    texts.append(
      ''.join(map(chr, rng.choices(characters, k=rng.randint(1, 12))))
    )
    texts.append(''.join(rng.choices('aeinorst ', k=rng.randint(1, 40))))
  found = re.compile(
    '|'.join(re.escape(token.content) for token in source.added.values())
    or '(?!)'
  )
  for text in texts:
    if not found.search(text):
      yield (text,)


def _with_added(source: _Source) -> Iterator[Sequence[str]]:
  """Yields texts around tokens that are looked for first, in parts."""
  for token in list(source.added.values())[:50]:
    name = token.content
    yield (name,)
    yield name, 'the cat'
    yield 'the cat', name
    yield 'a', name, 'cat sat', name, name, 'on'
    if not (token.lstrip or token.rstrip or token.single_word):
      yield ' the', name, ' cat', name, '  \n', name


_SPACES = ('', ' ', '  ', '     ', '\n', '\n\n', '\t', ' \n ', '\r\n')
_TEXTS = (
  '',
  ' ',
  '   ',
  '\n',
  '\t',
  '\u3000',
  '\xa0',
  '\u200b',
  '\ufeff',
  _SPACE,
  f'{_SPACE}a',
  f'a{_SPACE}{_SPACE}b',
  'Hello, how are you today?',
  'The quick brown fox jumps over the lazy dog.',
  "don't  won't I'll",
  '1',
  '12',
  '1234567890',
  '3.14159',
  '1,000,000',
  '2 + 2 = 4',
  '$5.00 50%',
  'def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n',
  '{"a": [1, 2, {"b": null}]}',
  '<div class="x">&amp;</div>',
  '#!/bin/sh',
  'https://example.com/a?b=c&d=%20',
  'C:\\dir\\file',
  'a\\n',
  '```py\nx\n```',
  'caf\xe9',
  'cafe\u0301',
  'na\xefve \xfcber stra\xdfe',
  '\ufb01 \u2167 \u2460',
  '\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440',
  '\u4f60\u597d\uff0c\u4e16\u754c\u3002',
  '\u3053\u3093\u306b\u3061\u306f',
  '\uc548\ub155\ud558\uc138\uc694',
  '\u1112\u1161\u11ab',
  '\u0645\u0631\u062d\u0628\u0627',
  '\u05e9\u05dc\u05d5\u05dd',
  '\u0928\u092e\u0938\u094d\u0924\u0947',
  '\u0e2a\u0e27\u0e31\u0e2a',
  '\U0001f600',
  '\U0001f469\u200d\U0001f469\u200d\U0001f467',
  '\U0001f1eb\U0001f1f7',
  '\U0001f44d\U0001f3fd',
  '\U00020000\U0002a6d6',
  '\ue000',
  '\U0010fffd',
  '\x00',
  'a\x00b',
  '\x07\x1b[0m',
  '\x7f',
  '\ufffd',
  '<0x0A>',
  '<0xFF>',
  '<unk',
  's>',
  '[INST] hi [/INST]',
  'aaaaaaaaaaaaaaaa',
  '-' * 40,
  '=' * 33,
  '!?!?!?',
  '\u2026\u2014\u201cx\u201d',
  'x\u0300\u0301',
)

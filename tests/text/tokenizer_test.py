# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back, whole and as a stream."""

from __future__ import annotations

import pathlib
from typing import Any

import hypothesis
from hypothesis import strategies as st
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from sarathi_jax import errors
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tokenizer_fixture

PIECES = (
  'the ',
  'fox',
  'a ',
  ' ',
  '  ',
  '\n',
  'x',
  'é',
  '日本',
  '🎉',
  '\ufffd',
)
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map(''.join)


@pytest.fixture(scope='module', params=['byte_level', 'sentencepiece'])
def tokenizer(
  request: pytest.FixtureRequest,
  tmp_path_factory: pytest.TempPathFactory,
) -> tokenizer_lib.Tokenizer:
  made: tokenizers.Tokenizer = {
    'byte_level': tokenizer_fixture.make,
    'sentencepiece': tokenizer_fixture.make_sentencepiece,
  }[request.param]()
  return tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(
      tmp_path_factory.mktemp('tokenizer'), tokenizer=made
    )
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tokenizer_fixture.write(tmp_path_factory.mktemp('tokenizer'))


@hypothesis.given(text=texts, data=st.data())
@hypothesis.settings(max_examples=200)
def test_a_stream_says_what_follows_the_prompt(
  tokenizer: tokenizer_lib.Tokenizer,
  text: str,
  data: st.DataObject,
) -> None:
  """The prompt may end anywhere, within a character too."""
  ids = tokenizer.encode(text)
  cut = data.draw(st.integers(0, len(ids)), 'length of the prompt')
  stream = tokenizer.stream(ids[:cut], skip_special_tokens=True)
  new = [stream.step(token) for token in ids[cut:]]
  text = tokenizer.decode(ids)
  num_bytes = sum(num_bytes_of(tokenizer, token) for token in ids[:cut])
  if tokenizer.encode('x')[0] != tokenizer_fixture.BOS:
    num_bytes = max(num_bytes - 1, 0)  # The space in front of the first word.
  whole = text.encode()[:num_bytes].decode(errors='ignore')
  assert whole + ''.join(new) == text


@hypothesis.given(text=texts)
@hypothesis.settings(max_examples=100)
def test_the_bytes_of_tokens_are_those_of_the_text(
  tokenizer: tokenizer_lib.Tokenizer, text: str
) -> None:
  """As clients that ask for log-probabilities put them together."""
  ids = tokenizer.encode(text)
  special = [t for t in ids if t in tokenizer.special_tokens]
  whole = b''.join(tokenizer.bytes_of(t) for t in ids if t not in special)
  # SentencePiece's has a space in front of the first word.
  assert whole.decode() in (text, f' {text}')


def num_bytes_of(tokenizer: tokenizer_lib.Tokenizer, token: int) -> int:
  piece = tokenizer._tokenizer.id_to_token(token)
  if piece in ('<s>', '</s>'):
    return 0
  if 'ByteLevel' in str(tokenizer._tokenizer.decoder):
    return len(piece)  # A character is a byte.
  if piece.startswith('<0x'):
    return 1
  return len(piece.replace('\u2581', ' ').encode())


def test_whole_characters_beside_a_part_of_one_are_shown_at_once(
  tmp_path: pathlib.Path,
) -> None:
  """A token may hold both, wherever the prompt ends."""
  vocab = {
    c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
  }
  # Two bytes of the alphabet's: 'a' or the end of an emoji, and 0xF0.
  joined = [('a', '\xf0'), ('\u012b', '\xf0')]
  vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(joined)}
  made = tokenizers.Tokenizer(models.BPE(vocab, joined))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  tokenizer = tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(tmp_path, tokenizer=made)
  )
  text = 'ba\U0001f389\U0001f389\ufffda\U0001f389'
  ids = tokenizer.encode(text)
  assert sum(len(made.id_to_token(token)) > 1 for token in ids) == 3
  for cut in range(len(ids) + 1):
    stream = tokenizer.stream(ids[:cut], skip_special_tokens=True)
    shown = text.encode()[
      : sum(len(made.id_to_token(t)) for t in ids[:cut])
    ].decode(errors='ignore')
    for n in range(cut, len(ids)):
      shown += stream.step(ids[n])
      num_bytes = sum(len(made.id_to_token(t)) for t in ids[: n + 1])
      assert shown == text.encode()[:num_bytes].decode(errors='ignore')


def test_a_character_comes_whole_with_its_last_token(
  folder: pathlib.Path,
) -> None:
  tokenizer = tokenizer_lib.Tokenizer(folder)
  ids = tokenizer.encode('é🎉')
  assert len(ids) == 1 + 2 + 4  # '<s>', then a token for each byte.
  stream = tokenizer.stream((), skip_special_tokens=True)
  assert [stream.step(t) for t in ids] == ['', '', 'é', '', '', '', '🎉']


def test_broken_bytes_are_marked_and_the_text_goes_on(
  folder: pathlib.Path,
) -> None:
  tokenizer = tokenizer_lib.Tokenizer(folder)
  first_bytes = tokenizer.encode('🎉')[1:3]
  stream = tokenizer.stream(tokenizer.encode('a'), skip_special_tokens=True)
  ids = (*first_bytes, *tokenizer.encode(' the')[1:])
  assert ''.join(stream.step(t) for t in ids) == '\ufffd the'


def test_broken_bytes_behind_a_byte_that_was_given(
  tmp_path: pathlib.Path,
) -> None:
  """All bytes in a row are one text: what was given of them is rewritten."""
  made = tokenizer_fixture.make_sentencepiece()
  tokenizer = tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(tmp_path, tokenizer=made)
  )
  ids = [made.token_to_id(piece) for piece in ('<0x41>', '<0x94>', '\u2581the')]
  stream = tokenizer.stream(tokenizer.encode('a'), skip_special_tokens=True)
  assert [stream.step(t) for t in ids] == ['A', '', '\ufffd the']


def test_special_tokens_are_shown_where_asked_for(folder: pathlib.Path) -> None:
  tokenizer = tokenizer_lib.Tokenizer(folder)
  ids = (tokenizer_fixture.EOS, *tokenizer.encode('x')[1:])
  for skip, text in ((True, 'x'), (False, '</s>x')):
    stream = tokenizer.stream(tokenizer.encode('a'), skip_special_tokens=skip)
    assert ''.join(stream.step(t) for t in ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_a_prompt_begins_with_its_special_token(folder: pathlib.Path) -> None:
  tokenizer = tokenizer_lib.Tokenizer(folder)
  assert tokenizer.encode('the')[0] == tokenizer_fixture.BOS
  assert tokenizer.encode('') == (tokenizer_fixture.BOS,)


def test_text_that_is_no_unicode_is_refused(folder: pathlib.Path) -> None:
  with pytest.raises(errors.InvalidRequestError, match="prompt: can't be"):
    tokenizer_lib.Tokenizer(folder).encode('a\ud800')


def test_a_chat_has_one_start_and_ends_at_the_answer(
  folder: pathlib.Path,
) -> None:
  tokenizer = tokenizer_lib.Tokenizer(folder)
  ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'the fox'}])
  assert ids.count(tokenizer_fixture.BOS) == 1
  assert tokenizer.decode(ids) == '[user] the fox\n[assistant]'


def test_a_chat_without_a_template_is_refused(tmp_path: pathlib.Path) -> None:
  tokenizer_fixture.write(tmp_path, chat_template=None)
  with pytest.raises(errors.UnsupportedError, match='no chat template'):
    tokenizer_lib.Tokenizer(tmp_path).apply_chat_template(
      [{'role': 'user', 'content': 'x'}]
    )


def test_a_chat_that_the_template_refuses_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  tokenizer_fixture.write(
    tmp_path, chat_template="{{ raise_exception('only one system role') }}"
  )
  with pytest.raises(errors.InvalidRequestError, match='only one system role'):
    tokenizer_lib.Tokenizer(tmp_path).apply_chat_template(
      [{'role': 'user', 'content': 'x'}]
    )


def test_a_damaged_file_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'tokenizer.json').write_text('{"version": ')
  with pytest.raises(errors.CheckpointError, match=r'tokenizer\.json: not a'):
    tokenizer_lib.Tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(
  tmp_path: pathlib.Path, folder: pathlib.Path
) -> None:
  assert tokenizer_lib.Tokenizer.from_folder(tmp_path) is None
  assert tokenizer_lib.Tokenizer.from_folder(folder) is not None


@pytest.mark.parametrize(
  'left_on',
  [
    lambda made: made.enable_truncation(4),
    lambda made: made.enable_truncation(4, stride=2, direction='left'),
    lambda made: made.enable_padding(length=64, pad_token='</s>', pad_id=1),
    lambda made: made.enable_padding(pad_to_multiple_of=8),
    lambda made: setattr(made.model, 'dropout', 0.9),
  ],
  ids=['truncation', 'stride', 'padding', 'multiple', 'dropout'],
)
def test_what_a_training_script_left_on_is_off(
  left_on: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Dropout of merges would make other tokens each time."""
  made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  text = 'The quick brown fox jumps over the lazy dog.'
  want = tuple(made.encode(text).ids)
  left_on(made)
  ours = tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(tmp_path, tokenizer=made)
  )
  assert {ours.encode(text) for _ in range(5)} == {want}
  chat = [{'role': 'user', 'content': text}]
  assert ours.apply_chat_template(chat) == (
    tokenizer_lib.Tokenizer(folder).apply_chat_template(chat)
  )


def test_what_belongs_to_a_tokenizer_stays(tmp_path: pathlib.Path) -> None:
  """Tokens added at both ends, normalizers, spaces that tokens swallow."""
  made = tokenizers.Tokenizer.from_str(tokenizer_fixture.make().to_str())
  made.normalizer = normalizers.Lowercase()
  made.post_processor = processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
  )
  made.add_special_tokens(
    [tokenizers.AddedToken('<sep>', lstrip=True, rstrip=True)]
  )
  ours = tokenizer_lib.Tokenizer(
    tokenizer_fixture.write(tmp_path, tokenizer=made)
  )
  text = 'THE FOX  <sep>  x'
  assert list(ours.encode(text)) == made.encode(text).ids
  assert [made.token_to_id(name) for name in ('x', '<sep>', 'x', '</s>')] == (
    list(ours.encode(text))[-4:]
  )


@pytest.mark.parametrize(
  ('words', 'pieces'),
  [
    # A space is a part of the token after it: another first token, as many.
    (['fox'], [['fox'], ['\u2581fox']]),
    ([' fox'], [['fox'], ['\u2581fox']]),
    (['foxthe'], [['fox', 'the'], ['\u2581fox', 'the']]),
    # A token of its own for the space, after which the first spelling ends.
    (['x'], [['x']]),
    (['x', 'fox'], [['x'], ['fox'], ['\u2581fox']]),
  ],
)
def test_words_are_spelled_as_vllm_spells_them(
  words: list[str], pieces: list[list[str]]
) -> None:
  vocab = ['x', 'the', 'fox', '\u2581fox', '\u2581', '<s>']
  made = tokenizers.Tokenizer(
    models.Unigram([(piece, -1.0) for piece in vocab], unk_id=5)
  )
  made.normalizer = normalizers.Replace(' ', '\u2581')
  made.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 5)]
  )
  tokenizer = tokenizer_lib.Tokenizer.copy_of(made)
  assert tokenizer.spellings(words) == tuple(
    tuple(vocab.index(piece) for piece in word) for word in pieces
  )

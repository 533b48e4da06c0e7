# SPDX-License-Identifier: Apache-2.0
"""tokenizer.model alone becomes what sentencepiece makes of any text."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import sys
import tempfile
from typing import Any

import hypothesis
from hypothesis import strategies as st
import pytest
import sentencepiece
import tokenizers

from checkpoints_convert import sentencepiece_model
from checkpoints_convert import tokenizer_files
from sarathi_jax import errors
from sarathi_jax.text import tokenizer as tokenizer_lib

_CORPUS = (
  'the cat sat on the mat with a hat',
  'Hello, how are you today?',
  'a b c d e f g h',
  '    return x ** 2',
  '\u4f60\u597d 1234',
)
_LLAMA = dict(
  normalization_rule_name='identity', remove_extra_whitespaces=False
)
_KINDS: dict[str, dict[str, Any]] = {
  'llama': _LLAMA,
  'unigram': _LLAMA | dict(model_type='unigram', hard_vocab_limit=False),
  'normalizing': {},
  'unknown characters': _LLAMA | dict(byte_fallback=False, vocab_size=90),
  'no space in front': _LLAMA | dict(add_dummy_prefix=False),
  'own symbols': _LLAMA
  | dict(
    user_defined_symbols=['<ud>', '\u2581\u2581\u2581\u2581', '[X]'],
    control_symbols=['[INST]', '[/INST]'],
  ),
  'unigram with own symbols': _LLAMA
  | dict(
    model_type='unigram',
    hard_vocab_limit=False,
    user_defined_symbols=['<ud>', '\u2581\u2581\u2581\u2581', '[X]'],
  ),
}
_CONFIG = dict(
  tokenizer_class='LlamaTokenizer',
  bos_token='<s>',
  eos_token='</s>',
  unk_token='<unk>',
)
_TEXTS = (
  'the cat',
  ' the cat',
  '  a   hat ',
  'a\nthe',
  'Hello, how',
  '\u2581a',
  '\t',
  '\xe9\u4f60\U0001f600',
  '<0x0A>',
  'x' * 30,
  '',
)


@functools.cache
def _trained(kind: str) -> bytes:
  """A small model, of a kind."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    **dict(
      dict(
        sentence_iterator=iter(_CORPUS * 40),
        model_writer=model,
        vocab_size=330,
        model_type='bpe',
        byte_fallback=True,
        minloglevel=2,
      ),
      **_KINDS[kind],
    )
  )
  return model.getvalue()


@pytest.fixture(scope='module')
def trained(request: pytest.FixtureRequest) -> bytes:
  return _trained(getattr(request, 'param', 'llama'))


def _write(
  tmp_path: pathlib.Path, model: bytes, family: str = 'llama', **config: Any
) -> tuple[pathlib.Path, pathlib.Path]:
  folder, out = tmp_path / 'hf', tmp_path / 'out'
  folder.mkdir()
  out.mkdir()
  (folder / 'tokenizer.model').write_bytes(model)
  (folder / 'config.json').write_text(json.dumps({'model_type': family}))
  (folder / 'tokenizer_config.json').write_text(json.dumps(_CONFIG | config))
  return folder, out


def _made(
  tmp_path: pathlib.Path, model: bytes, family: str = 'llama', **config: Any
) -> tokenizer_lib.Tokenizer:
  folder, out = _write(tmp_path, model, family, **config)
  tokenizer_files.write(folder, out)
  return tokenizer_lib.Tokenizer(out)


@pytest.mark.parametrize('trained', _KINDS, indirect=True)
@pytest.mark.parametrize('family', ['llama', 'mistral'])
def test_the_tokens_are_sentencepieces(
  family: str, trained: bytes, tmp_path: pathlib.Path
) -> None:
  """Whatever the family: transformers' own choice depends on it."""
  ours = _made(tmp_path, trained, family, legacy=True)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=trained)
  for text in _TEXTS:
    assert list(ours.encode(text)) == [theirs.bos_id(), *theirs.encode(text)], (
      text
    )


@hypothesis.given(text=st.text(max_size=12) | st.text('theca \n\u2581<0x>A'))
@hypothesis.settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_text(text: str, trained: bytes) -> None:
  ours, theirs = _both(trained)
  assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


@functools.cache
def _both(model: bytes) -> tuple[tokenizers.Tokenizer, Any]:
  with tempfile.TemporaryDirectory() as name:
    folder, _ = _write(pathlib.Path(name), model)
    return (
      sentencepiece_model.build(folder),
      sentencepiece.SentencePieceProcessor(model_proto=model),
    )


@pytest.mark.parametrize('legacy', [True, False, None])
def test_special_tokens_in_a_text(
  legacy: bool | None, trained: bytes, tmp_path: pathlib.Path
) -> None:
  """A space is put behind them where the checkpoint's flag says so."""
  ours = _made(
    tmp_path,
    trained,
    legacy=legacy,
    add_eos_token=True,
    added_tokens_decoder={'330': dict(content='<pad>', special=True)},
  )
  theirs = sentencepiece.SentencePieceProcessor(model_proto=trained)
  eos = theirs.eos_id()
  first, second = theirs.encode('the cat'), theirs.encode(' sat')
  if legacy is False:  # Its own space, and not the one put in front.
    assert theirs.id_to_piece(second[0]) == '\u2581'
    second = second[1:]
  assert list(ours.encode('the cat</s> sat<pad>')) == [
    theirs.bos_id(),
    *first,
    eos,
    *second,
    330,
    eos,
  ]


def test_flags_and_names_of_special_tokens(
  trained: bytes, tmp_path: pathlib.Path
) -> None:
  ours = _made(
    tmp_path,
    trained,
    add_bos_token=False,
    add_eos_token=True,
    eos_token={'content': '</s>', 'lstrip': False},
  )
  ids = ours.encode('the cat')
  assert ids[0] != 1 and ids[-1] == 2
  assert ours.decode(ids) == 'the cat'
  assert ours.decode(ours.encode('  a\n\xe9')) == '  a\n\xe9'


def test_a_difference_is_refused(
  trained: bytes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Whatever it comes from: here, a merge that is forgotten."""
  merges = sentencepiece_model._merges
  monkeypatch.setattr(
    sentencepiece_model, '_merges', lambda scores: merges(scores)[1:]
  )
  folder, out = _write(tmp_path, trained)
  with pytest.raises(
    errors.CheckpointError, match=r'tokenizer\.model: .* and sentencepiece \['
  ):
    tokenizer_files.write(folder, out)


def test_an_added_token_at_anothers_place(
  trained: bytes, tmp_path: pathlib.Path
) -> None:
  folder, out = _write(tmp_path, trained)
  (folder / 'added_tokens.json').write_text('{"<pad>": 400}')
  with pytest.raises(errors.CheckpointError, match="'<pad>' can not be token"):
    tokenizer_files.write(folder, out)


@pytest.mark.parametrize('content', [b'', b'IQ== 0\nIg== 1\n'])
def test_a_file_of_another_kind(content: bytes, tmp_path: pathlib.Path) -> None:
  """Llama 3 has one of tiktoken, by the same name."""
  folder, out = _write(tmp_path, content)
  with pytest.raises(
    errors.CheckpointError,
    match=r'tokenizer\.model: is no model of sentencepiece',
  ):
    tokenizer_files.write(folder, out)


def test_without_the_package(
  trained: bytes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  folder, out = _write(tmp_path, trained)
  with pytest.raises(errors.CheckpointError, match='pip install sentencepiece'):
    tokenizer_files.write(folder, out)

# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json of a converted checkpoint stands alone."""

from __future__ import annotations

import json
import pathlib

import pytest
import sentencepiece
import tokenizers
import transformers

from checkpoints_convert import tokenizer_files
from sarathi_jax import errors

_WORDS = ('<s>', '</s>', '<unk>', 'a', 'b', 'c')
_TEXTS = ('a', 'a b c', 'c c', '')


def _make(folder: pathlib.Path, *, adds_bos: bool, **flags: object) -> None:
  """A tokenizer of six words, and a config with flags."""
  folder.mkdir()
  vocab = {word: i for i, word in enumerate(_WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='<unk>'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(list(_WORDS[:3]))
  if adds_bos:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)])
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(
    dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>',
         eos_token='</s>', unk_token='<unk>', **flags)))


def _encode(folder: pathlib.Path, text: str) -> list[int]:
  ids: list[int] = tokenizers.Tokenizer.from_file(
    str(folder / 'tokenizer.json')).encode(text).ids
  return ids


def _written(tmp_path: pathlib.Path) -> pathlib.Path:
  target = tmp_path / 'out'
  target.mkdir()
  tokenizer_files.write(tmp_path / 'hf', target)
  return target


@pytest.mark.parametrize('adds_bos', [True, False])
@pytest.mark.parametrize('flags', [
  {}, {'add_bos_token': True}, {'add_bos_token': False, 'add_eos_token': True}])
def test_tokenizer_json_is_copied(
  adds_bos: bool, flags: dict[str, object], tmp_path: pathlib.Path) -> None:
  """And gives what transformers gives, whatever the flags are."""
  _make(tmp_path / 'hf', adds_bos=adds_bos, **flags)
  (tmp_path / 'hf' / 'chat_template.jinja').write_text('{{ messages }}')
  (tmp_path / 'hf' / 'README.md').touch()
  target = _written(tmp_path)
  assert sorted(path.name for path in target.iterdir()) == [
    'chat_template.jinja', 'tokenizer.json', 'tokenizer_config.json']
  for path in target.iterdir():
    assert path.read_bytes() == (tmp_path / 'hf' / path.name).read_bytes()
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'hf'))
  for text in _TEXTS:
    assert _encode(target, text) == theirs(text).input_ids
  assert _encode(target, 'b') == [0] * adds_bos + [4]


@pytest.mark.parametrize('eos', [True, False])
def test_sentencepiece_alone(eos: bool, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'hf'
  folder.mkdir()
  corpus = tmp_path / 'corpus.txt'
  corpus.write_text('the cat sat on the mat with a hat\n' * 50)
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus), model_prefix=str(folder / 'tokenizer'), vocab_size=290,
    model_type='bpe', byte_fallback=True, minloglevel=2)
  (folder / 'tokenizer.vocab').unlink()
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  (folder / 'tokenizer_config.json').write_text(json.dumps(
    dict(tokenizer_class='LlamaTokenizer', add_bos_token=True,
         add_eos_token=eos, bos_token='<s>', eos_token='</s>',
         unk_token='<unk>')))
  target = _written(tmp_path)
  pieces = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / 'tokenizer.model'))
  for text in ('the cat', 'a hat on the mat', 'sat at \u00e9'):
    assert _encode(target, text) == [
      pieces.bos_id(), *pieces.encode(text), *[pieces.eos_id()] * eos]


def test_no_tokenizer(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'hf').mkdir()
  assert not list(_written(tmp_path).iterdir())


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json'])
def test_damaged(name: str, tmp_path: pathlib.Path) -> None:
  _make(tmp_path / 'hf', adds_bos=True)
  (tmp_path / 'hf' / name).write_text('{')
  with pytest.raises(errors.CheckpointError, match=name):
    _written(tmp_path)

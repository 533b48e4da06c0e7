# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json of a converted checkpoint stands alone."""

from __future__ import annotations

import fnmatch
import json
import pathlib
from typing import Any

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects
import pytest
import sentencepiece
import tokenizers
import transformers

from checkpoints_convert import source
from checkpoints_convert import tokenizer_files
from sarathi_jax import errors

_WORDS = ('<s>', '</s>', '<unk>', 'a', 'b', 'c')
_TEXTS = ('a', 'a b c', 'c c', '')


def _make(folder: pathlib.Path, *, adds_bos: bool, **flags: object) -> None:
  """A tokenizer of six words, and a config with flags."""
  folder.mkdir()
  vocab = {word: i for i, word in enumerate(_WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='<unk>')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(list(_WORDS[:3]))
  if adds_bos:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      dict(
        tokenizer_class='PreTrainedTokenizerFast',
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        **flags,
      )
    )
  )


def _encode(folder: pathlib.Path, text: str) -> list[int]:
  ids: list[int] = (
    tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    .encode(text)
    .ids
  )
  return ids


def _written(tmp_path: pathlib.Path) -> pathlib.Path:
  target = tmp_path / 'out'
  target.mkdir()
  tokenizer_files.write(tmp_path / 'hf', target)
  return target


@pytest.mark.parametrize('adds_bos', [True, False])
@pytest.mark.parametrize(
  'flags',
  [
    {},
    {'add_bos_token': True},
    {'add_bos_token': False, 'add_eos_token': True},
  ],
)
def test_tokenizer_json_is_copied(
  adds_bos: bool, flags: dict[str, object], tmp_path: pathlib.Path
) -> None:
  """And gives what transformers gives, whatever the flags are."""
  _make(tmp_path / 'hf', adds_bos=adds_bos, **flags)
  (tmp_path / 'hf' / 'chat_template.jinja').write_text('{{ messages }}')
  (tmp_path / 'hf' / 'README.md').touch()
  target = _written(tmp_path)
  assert sorted(path.name for path in target.iterdir()) == [
    'chat_template.jinja',
    'tokenizer.json',
    'tokenizer_config.json',
  ]
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
    input=str(corpus),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=290,
    model_type='bpe',
    byte_fallback=True,
    minloglevel=2,
  )
  (folder / 'tokenizer.vocab').unlink()
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      dict(
        tokenizer_class='LlamaTokenizer',
        add_bos_token=True,
        add_eos_token=eos,
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
      )
    )
  )
  target = _written(tmp_path)
  pieces = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / 'tokenizer.model')
  )
  for text in ('the cat', 'a hat on the mat', 'sat at \u00e9'):
    assert _encode(target, text) == [
      pieces.bos_id(),
      *pieces.encode(text),
      *[pieces.eos_id()] * eos,
    ]


@pytest.mark.parametrize(
  'change',
  [
    lambda made: made.enable_truncation(2),
    lambda made: made.enable_padding(length=9),
  ],
  ids=['truncation', 'padding'],
)
def test_what_a_training_script_left_on_is_not_taken_along(
  change: Any, tmp_path: pathlib.Path
) -> None:
  """Gateways read the file by themselves."""
  _make(tmp_path / 'hf', adds_bos=True)
  path = tmp_path / 'hf' / 'tokenizer.json'
  made = tokenizers.Tokenizer.from_file(str(path))
  change(made)
  made.save(str(path))
  assert _encode(_written(tmp_path), 'a b c') == [0, 3, 4, 5]


def test_vocab_and_merges(tmp_path: pathlib.Path) -> None:
  """They are downloaded, too, and transformers makes the tokenizer."""
  folder = tmp_path / 'hf'
  folder.mkdir()
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator(['the cat sat on the mat'] * 9, vocab_size=270)
  made.save_model(str(folder))
  (folder / 'config.json').write_text('{"model_type": "qwen2"}')
  assert _encode(_written(tmp_path), 'the cat') == made.encode('the cat').ids
  for name in ('vocab.json', 'merges.txt', 'tokenizer.model'):
    assert any(fnmatch.fnmatch(name, p) for p in source._FILES)
  (folder / 'merges.txt').unlink()
  with pytest.raises(errors.CheckpointError, match=r'neither merges\.txt nor'):
    tokenizer_files.write(folder, tmp_path / 'out2')


def test_of_the_hub_what_is_read_is_downloaded_once(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Mistral's repositories have the weights twice."""
  names = [
    'config.json',
    'model-00001-of-00002.safetensors',
    'vocab.json',
    'consolidated.safetensors',
    'original/model.safetensors',
    'chat_template.jinja',
    'pytorch_model.bin',
  ]

  def download(hub_id: str, **patterns: list[str]) -> str:
    return ' '.join(filter_repo_objects(names, **patterns))

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert str(source.locate('org/name')).split() == [*names[:3], names[5]]


@pytest.mark.parametrize(
  'name',
  [
    'tekken.json',
    'qwen.tiktoken',
    'tokenizer.model.v3',
    'spiece.model',
    'spm.model',
    'source.spm',
    'vocab.bpe',
    'tokenizer_config.json',
  ],
)
def test_tokenizers_of_other_kinds_are_not_left_out_without_a_word(
  name: str, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'hf').mkdir()
  (tmp_path / 'hf' / name).write_text('{}')
  with pytest.raises(
    errors.CheckpointError, match=f'{name}: a tokenizer of this kind'
  ):
    _written(tmp_path)
  _make(tmp_path / 'hf2', adds_bos=True)
  (tmp_path / 'hf2' / name).write_text('{}')
  tokenizer_files.write(tmp_path / 'hf2', tmp_path / 'out')  # as it has both


def test_a_chat_template_that_is_none(tmp_path: pathlib.Path) -> None:
  _make(tmp_path / 'hf', adds_bos=True, chat_template=[{'name': 'default'}])
  with pytest.raises(errors.CheckpointError, match='hf: chat_template: must'):
    _written(tmp_path)


def test_no_tokenizer(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'hf').mkdir()
  assert not list(_written(tmp_path).iterdir())


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json'])
def test_damaged(name: str, tmp_path: pathlib.Path) -> None:
  _make(tmp_path / 'hf', adds_bos=True)
  (tmp_path / 'hf' / name).write_text('{')
  with pytest.raises(errors.CheckpointError, match=name):
    _written(tmp_path)

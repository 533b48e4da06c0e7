# SPDX-License-Identifier: Apache-2.0
"""The training of the quickstart model, and what it writes."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.quickstart import export
from sarathi_jax.quickstart import text
from sarathi_jax.quickstart import tokenizer as tokenizer_lib
from sarathi_jax.quickstart import training


def _config(tied: bool = True) -> config_lib.LlamaConfig:
  return config_lib.LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=tied,
  )


def test_windows_are_of_the_stream_and_cover_it() -> None:
  stream = np.arange(1000, dtype=np.int32)
  windows = training.windows(stream, batch_size=4, num_tokens=10, seed=0)
  epoch = np.concatenate([next(windows) for _ in range(24)])
  assert epoch.shape == (96, 11)
  np.testing.assert_array_equal(np.diff(epoch, axis=1), 1)
  assert len(set(epoch[:, 0])) == 96
  again = training.windows(stream, batch_size=4, num_tokens=10, seed=0)
  np.testing.assert_array_equal(next(again), epoch[:4])


def test_examples_begin_with_sentences() -> None:
  doc = text.Document('a', 'One two. Three: e.g. four.\n\nFive.')
  tokenizer = tokenizer_lib.train([doc], 300)
  written = [
    tokenizer.decode(e.ids.tolist(), skip_special_tokens=False)
    for e in training.examples(doc, tokenizer, 100)
  ]
  assert written == [
    doc.text + text.END,
    'Three: e.g. four.\n\nFive.<|end|>',
    'Five.<|end|>',
  ]
  for example in training.examples(doc, tokenizer, 4):
    assert len(example.ids) <= 5
    assert (
      tokenizer.decode(example.ids.tolist())
      == (doc.text[example.start : example.stop])
    )


def test_examples_cover_documents_and_fill_rows() -> None:
  docs = text.documents(5)
  tokenizer = tokenizer_lib.train(docs, 300)
  examples = [training.examples(doc, tokenizer, 400) for doc in docs]
  for doc, document in zip(docs, examples, strict=True):
    pieces = list(training.cover(document, np.random.default_rng(0)))
    assert pieces[0].start == 0
    covered = {i for p in pieces for i in range(p.start, p.stop)}
    assert covered >= set(range(len(doc.text)))
    assert sum(len(p.ids) for p in pieces) < 2 * len(tokenizer.encode(doc.text))
  batches = training.packed(examples, batch_size=3, num_tokens=400, seed=0)
  starts = {tuple(e.ids[:3]) for document in examples for e in document}
  for _ in range(5):
    batch = next(batches)
    assert batch.shape == (3, 401)
    assert {tuple(row[:3]) for row in batch} <= starts


def test_stream_holds_every_document_with_its_end() -> None:
  docs = text.documents(5)
  tokenizer = tokenizer_lib.train(docs, 300)
  stream = training.token_stream(docs, tokenizer, seed=0)
  end = tokenizer.token_to_id(text.END)
  written = tokenizer.decode(list(stream), skip_special_tokens=False)
  assert np.sum(stream == end) == 5
  assert sorted(written.split(text.END)[:-1]) == sorted(d.text for d in docs)


def test_steps_lower_the_loss_and_leave_the_arrays_before_them() -> None:
  config = _config()
  state = training.new_state(config, steps=20, learning_rate=1e-2, seed=0)
  before = state.params
  batch = jnp.asarray(
    np.random.default_rng(0).integers(300, size=(2, 17)), jnp.int32
  )
  first = float(training.loss(config, state.params, batch))
  for _ in range(20):
    state, _ = training.train_step(config, state, batch)
  assert float(training.loss(config, state.params, batch)) < first - 1
  # An engine may still be serving them.
  assert float(training.loss(config, before, batch)) == pytest.approx(first)


def test_loss_is_of_the_next_token() -> None:
  config = _config()
  params = models.init_params(config, jax.random.key(0), jnp.float32, 0.2)
  tokens = np.random.default_rng(0).integers(300, size=12)
  logits = np.asarray(
    training.sequence_logits(
      config, params, jnp.asarray(tokens[:-1], jnp.int32)
    ),
    np.float64,
  )
  logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = -np.mean(logits[np.arange(11), tokens[1:]])
  assert float(
    training.loss(config, params, jnp.asarray(tokens[None], jnp.int32))
  ) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('tied', [True, False])
def test_export_converts_back_bit_for_bit(
  tied: bool, tmp_path: pathlib.Path
) -> None:
  config = _config(tied)
  params = models.init_params(config, jax.random.key(0), jnp.float32, 0.1)
  tokenizer = tokenizer_lib.train(text.documents(3), 300)
  export.write(tmp_path / 'hf', config, params, tokenizer)
  convert.convert(tmp_path / 'hf', tmp_path / 'ours', check=True)
  metadata = checkpoint.load_metadata(tmp_path / 'ours')
  assert metadata.model == config
  assert metadata.eos_token_ids == (tokenizer.token_to_id(text.END),)
  assert metadata.bos_token_id is None
  restored = checkpoint.restore_params(tmp_path / 'ours')
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_array_equal(
      np.asarray(ours).astype(ml_dtypes.bfloat16), np.asarray(theirs)
    ),
    params,
    restored,
  )


def test_script_trains_samples_and_writes(tmp_path: pathlib.Path) -> None:
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.quickstart.train',
      f'--output={tmp_path}',
      '--steps=3',
      '--sample_every=2',
      '--documents=8',
      '--tokens_per_step=64',
      '--sequence_length=16',
      '--context=64',
      '--vocab_size=300',
      '--hidden_size=32',
      '--intermediate_size=32',
      '--num_layers=1',
    ],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '200'},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'step 2: loss' in done.stdout
  assert 'step 3: loss' in done.stdout  # the last one is sampled from, too
  assert done.stdout.count('The for statement is used to') == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'LICENSE',
    'README.md',
    'chat_template.jinja',
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  ]

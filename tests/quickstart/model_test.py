# SPDX-License-Identifier: Apache-2.0
"""The quickstart model as it is shipped: it loads, speaks, and is small."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from checkpoints_convert import convert
import sarathi_jax
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import quickstart
from sarathi_jax.quickstart import text
from sarathi_jax.quickstart import training
from tests import tiny

PROMPT = 'The for statement is used to'

# Nats a token on docstrings held out, in windows of 256; knowing nothing costs
# ln(2048) = 7.6. Other releases of Python have other docstrings.
HELD_OUT_LOSS = 4.0


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  target = tmp_path_factory.mktemp('quickstart') / 'converted'
  convert.convert(quickstart.MODEL, target, check=True)
  return target


@pytest.fixture(scope='module')
def llm(folder: pathlib.Path) -> sarathi_jax.LLM:
  return sarathi_jax.LLM.from_checkpoint(folder, config=_small())


def _small() -> sarathi_jax.EngineConfig:
  return sarathi_jax.EngineConfig(
    token_budget=4,
    max_num_seqs=4,
    max_model_len=128,
    page_size=32,
    num_pages=16,
    **tiny.STEPS_ALONE,
  )


def test_it_is_small() -> None:
  sizes = {
    path.name: path.stat().st_size for path in quickstart.MODEL.iterdir()
  }
  assert {
    'config.json',
    'model.safetensors',
    'tokenizer.json',
    'LICENSE',
    'README.md',
  } <= sizes.keys()
  assert sum(sizes.values()) < 4_000_000


def test_it_is_called_as_it_was_given(
  llm: sarathi_jax.LLM, folder: pathlib.Path
) -> None:
  assert llm.engine.info.model_name == str(folder)


def test_it_says_words(llm: sarathi_jax.LLM) -> None:
  known = text.words(text.documents())
  prompts = [
    PROMPT,
    'Exceptions are',
    'A class definition',
    f'{text.USER}What does len do?{text.ASSISTANT}',
  ]
  for prompt, said in zip(
    prompts,
    llm.generate(
      prompts, sarathi_jax.SamplingParams(max_tokens=64, temperature=0)
    ),
    strict=True,
  ):
    found = text.find_words(said.text)
    assert len(found) >= 5, prompt
    # The last word may be cut off.
    share = np.mean([word in known for word in found[:-1]])
    assert share > 0.9, said.text
    assert len(set(found)) > len(found) / 4, said.text  # not one word


def test_sampled_words_are_words_too(llm: sarathi_jax.LLM) -> None:
  known = text.words(text.documents())
  said = llm.generate(
    [PROMPT] * 4,
    [
      sarathi_jax.SamplingParams(
        max_tokens=64, temperature=0.6, top_p=0.9, seed=seed
      )
      for seed in range(4)
    ],
  )
  found = [word for one in said for word in text.find_words(one.text)]
  assert len(found) > 60
  assert np.mean([word in known for word in found]) > 0.9


def test_it_ends_answers(llm: sarathi_jax.LLM) -> None:
  (answer,) = llm.generate(
    [[{'role': 'user', 'content': 'What does len do?'}]],
    sarathi_jax.SamplingParams(max_tokens=100, temperature=0),
  )
  assert answer.finish_reason is sarathi_jax.FinishReason.STOP
  assert 'Return' in answer.text


def test_chats_are_as_they_were_learned(llm: sarathi_jax.LLM) -> None:
  tokenizer = llm.engine.tokenizer
  assert tokenizer is not None
  assert tokenizer.apply_chat_template(
    [
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': 'b'},
      {'role': 'user', 'content': 'c'},
    ]
  ) == tokenizer.encode('<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>')
  with pytest.raises(errors.InvalidRequestError, match='only the roles'):
    tokenizer.apply_chat_template([{'role': 'system', 'content': 'a'}])


def test_loss_on_what_it_never_saw(folder: pathlib.Path) -> None:
  config = checkpoint.load_metadata(folder).model
  params = jax.tree.map(
    lambda x: x.astype(jnp.float32), checkpoint.restore_params(folder)
  )
  _, held_out = text.split(text.documents())
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  stream = training.token_stream(held_out, tokenizer, seed=0)[:4096]
  assert training.held_out_loss(config, params, stream, 256) < HELD_OUT_LOSS
  # The bound is no formality: one layer's attention less, and it is broken.
  params['layers'][0]['attn']['o'] *= 0
  assert training.held_out_loss(config, params, stream, 256) > HELD_OUT_LOSS


def test_transformers_says_the_same(folder: pathlib.Path) -> None:
  import torch
  import transformers

  torch.set_num_threads(1)
  theirs = transformers.LlamaForCausalLM.from_pretrained(
    quickstart.MODEL, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart.MODEL)
  prompt = tokenizer(PROMPT, return_tensors='pt')
  expected = theirs.generate(  # type: ignore[misc]
    **prompt,
    max_new_tokens=32,
    do_sample=False,
    eos_token_id=None,
    temperature=None,
    top_p=None,
  )[0].tolist()
  num_prompt = prompt['input_ids'].shape[1]

  config = checkpoint.load_metadata(folder).model
  params = jax.tree.map(
    lambda x: x.astype(jnp.float32), checkpoint.restore_params(folder)
  )
  ours = sarathi_jax.LLM(config, params, tokenizer=str(folder), config=_small())
  (said,) = ours.generate(
    PROMPT,
    sarathi_jax.SamplingParams(max_tokens=32, temperature=0, ignore_eos=True),
  )
  assert list(said.prompt_token_ids) == expected[:num_prompt]
  assert list(said.token_ids) == expected[num_prompt:]
  assert said.text == tokenizer.decode(expected[num_prompt:])

  logits = training.sequence_logits(
    config, params, jnp.asarray(expected, jnp.int32)
  )
  with torch.no_grad():
    np.testing.assert_allclose(
      np.asarray(logits),
      theirs(torch.tensor([expected])).logits[0].numpy(),
      atol=1e-3,
    )

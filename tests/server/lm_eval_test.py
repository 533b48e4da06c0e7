# SPDX-License-Identifier: Apache-2.0
"""lm_eval over our HTTP gives the numbers of its own backend."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import sys
from typing import Any
import venv

import pytest

from sarathi_jax import quickstart
from tests import source_tree
from tests.server import process_test

pytestmark = pytest.mark.slow

_PACKAGES = ('lm-eval[api]==0.4.13', 'accelerate==1.15.0')
_DRIVER = pathlib.Path(__file__).parent / 'clients' / 'harness.py'
_CHOICES = (
  ('The for statement is used to', 0, (' iterate over', ' delete files', ' x')),
  ('A list is', 0, (' a mutable sequence', ' an immutable number')),
  ('What does len do?\n', 0, ('Return the number', 'Return nothing')),
  ('The', 1, (' function', ' of of', ' é')),
)
_PROMPTS = (
  'The for statement is used to',
  'A dictionary',
  'What does len do?',
  'Once upon',
)
_GENERATION = {
  'until': ['\n\n'],
  'max_gen_toks': 24,
  'do_sample': False,
  'temperature': 0,
}
# Name -> what lm_eval is to know of the task, beside its data.
_TASKS: dict[str, Any] = {
  'local_choice': {
    'output_type': 'multiple_choice',
    'doc_to_text': '{{question}}',
    'doc_to_choice': '{{choices}}',
    'doc_to_target': '{{answer}}',
    'target_delimiter': '',
    'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
  },
  'local_rolling': {
    'output_type': 'loglikelihood_rolling',
    'doc_to_text': '',
    'doc_to_target': '{{question}}',
    'metric_list': [{'metric': 'word_perplexity'}],
  },
  'local_generation': {
    'output_type': 'generate_until',
    'doc_to_text': '{{question}}',
    'doc_to_target': '{{answer}}',
    'generation_kwargs': _GENERATION,
    'metric_list': [{'metric': 'exact_match'}],
  },
}


@pytest.fixture(scope='module')
def python() -> pathlib.Path:
  """Its own environment, which has torch and transformers of this one.

  It is kept beside these, as scripts/test keeps other wheels.
  """
  folder = pathlib.Path(sys.prefix) / '-'.join(_PACKAGES).replace('[api]', '')
  made = folder / 'bin' / 'python'
  if not folder.exists():
    part = folder.with_suffix('.part')
    venv.create(part, clear=True, with_pip=True)
    theirs, ours = (
      next(pathlib.Path(prefix).glob('lib/python*/site-packages'))
      for prefix in (part, sys.prefix)
    )
    (theirs / 'parent.pth').write_text(f'{ours}\n')
    subprocess.run(
      [
        part / 'bin' / 'python',
        *('-m', 'pip', 'install', '--quiet', '--disable-pip-version-check'),
        *_PACKAGES,
      ],
      check=True,
    )
    part.rename(folder)
  return made


@pytest.fixture(scope='module')
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of all tasks, with their data."""
  folder = tmp_path_factory.mktemp('tasks')
  choices = [
    {'question': question, 'answer': answer, 'choices': choices}
    for question, answer, choices in _CHOICES
  ]
  prompts = [{'question': prompt, 'answer': '?'} for prompt in _PROMPTS]
  for name, task in _TASKS.items():
    data = folder / f'{name}.jsonl'
    lines = choices if name == 'local_choice' else prompts
    data.write_text('\n'.join(map(json.dumps, lines)))
    said = {
      'task': name,
      'dataset_path': 'json',
      'dataset_kwargs': {'data_files': {'test': str(data)}},
      'test_split': 'test',
      **task,
    }
    (folder / f'{name}.yaml').write_text(json.dumps(said))
  return folder


@pytest.fixture(scope='module')
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
  """Of our HTTP, that serves the quickstart model in float32."""
  process = process_test.Process(
    '-m',
    'sarathi_jax.server',
    f'--checkpoint={quickstart.MODEL}',
    f'--config={source_tree.ROOT / "configs/quickstart.py"}',
    '--token_budget=32',
    '--dtype=float32',
    '--served_model_name=quickstart',
    '--port=0',
    '--http_port=0',
    f'--cache_dir={tmp_path_factory.mktemp("cache")}',
  )
  try:
    yield int(process.read_until(r"OpenAI's HTTP: \S+:(\d+)/v1")[1])
  finally:
    process.close()


def _run(
  python: pathlib.Path,
  model: str,
  args: dict[str, Any],
  tasks: pathlib.Path,
  *names: str,
) -> Any:
  done = subprocess.run(
    [python, '-I', _DRIVER, model, json.dumps(args), tasks, *names],
    check=False,
    capture_output=True,
    text=True,
    timeout=300,
    env={
      **os.environ,
      'HF_HUB_OFFLINE': '1',
      'HF_DATASETS_OFFLINE': '1',
      'HF_HOME': str(tasks / 'huggingface'),
    },
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_completions(
  python: pathlib.Path, tasks: pathlib.Path, port: int
) -> None:
  """Likelihoods, of texts after others and of whole ones; and generation."""
  theirs = _run(
    python,
    'hf',
    {'pretrained': str(quickstart.MODEL), 'dtype': 'float32'},
    tasks,
    *_TASKS,
  )
  ours = _run(
    python,
    'local-completions',
    {
      'model': 'quickstart',
      'base_url': f'http://127.0.0.1:{port}/v1/completions',
      'tokenizer': str(quickstart.MODEL),
      'tokenizer_backend': 'huggingface',
    },
    tasks,
    *_TASKS,
  )
  for name, expected in theirs.items():
    assert ours[name]['numbers'] == pytest.approx(
      expected['numbers'], rel=1e-4
    ), name
  assert (
    ours['local_generation']['responses']
    == theirs['local_generation']['responses']
  )
  pairs = [
    (mine, other)
    for got, expected in zip(
      ours['local_choice']['responses'],
      theirs['local_choice']['responses'],
      strict=True,
    )
    for mine, other in zip(got, expected, strict=True)
  ]
  for (logprob, is_greedy), (expected, was_greedy) in pairs:
    assert logprob == pytest.approx(expected, abs=1e-3)
    assert is_greedy == was_greedy
  assert {is_greedy for (_, is_greedy), _ in pairs} == {True, False}
  assert theirs['local_choice']['numbers']['acc,none'] == 0.75


def test_chats(python: pathlib.Path, tasks: pathlib.Path, port: int) -> None:
  theirs = _run(
    python,
    'hf',
    {'pretrained': str(quickstart.MODEL), 'dtype': 'float32'},
    tasks,
    'local_generation',
    '--chat',
  )
  ours = _run(
    python,
    'local-chat-completions',
    {
      'model': 'quickstart',
      'base_url': f'http://127.0.0.1:{port}/v1/chat/completions',
    },
    tasks,
    'local_generation',
    '--chat',
  )
  assert ours == theirs
  (third,) = theirs['local_generation']['responses'][2]
  assert third == 'Return the number of items in a container.'

# SPDX-License-Identifier: Apache-2.0
"""Chat templates, against what transformers makes of them."""

from __future__ import annotations

import json
import pathlib

import pytest
import transformers

from sarathi_jax import errors
from sarathi_jax.engine import chat
from tests import tokenizer_fixture

MESSAGES = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Say "<é & 日本>"'},
  {'role': 'assistant', 'content': 'No.'},
  {'role': 'user', 'content': 'Why?'}]

TEMPLATES = {
  'plain': "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
           "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
           "{% if add_generation_prompt %}<|assistant|>{% endif %}",
  'blocks': "{%- for message in messages %}\n"
            "  {%- if loop.index0 == 1 %}{% continue %}{% endif %}\n"
            "    {{- message | tojson }}\n{% endfor %}\n",
  'generation': "{% for m in messages %}{% if m.role == 'assistant' %}"
                "{% generation %}{{ m.content }}{% endgeneration %}"
                "{% else %}{{ m.content }}{% endif %}{% endfor %}",
}


def _write(folder: pathlib.Path, template: str, **more: object) -> None:
  tokenizer_fixture.write(folder)
  (folder / 'tokenizer_config.json').write_text(json.dumps({
    'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>',
    'eos_token': '</s>', 'chat_template': template, **more}))


@pytest.mark.parametrize('name', TEMPLATES)
def test_renders_as_transformers_does(tmp_path, name):
  _write(tmp_path, TEMPLATES[name])
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path).apply_chat_template(
      MESSAGES, tokenize=False, add_generation_prompt=True)
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None
  assert template.render(MESSAGES) == theirs


def test_a_file_of_its_own_takes_precedence(tmp_path):
  _write(tmp_path, 'old')
  (tmp_path / 'chat_template.jinja').write_text('new')
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None
  assert template.render(MESSAGES) == 'new'


def test_there_may_be_none(tmp_path):
  assert chat.ChatTemplate.from_folder(tmp_path) is None


def test_what_a_template_refuses_is_told():
  template = chat.ChatTemplate("{{ raise_exception('user must begin') }}", {})
  with pytest.raises(errors.InvalidRequestError, match='user must begin'):
    template.render(MESSAGES)


def test_templates_can_not_reach_python():
  template = chat.ChatTemplate(
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
  with pytest.raises(errors.InvalidRequestError, match='unsafe'):
    template.render(MESSAGES)


def test_a_damaged_template_is_refused():
  with pytest.raises(errors.CheckpointError, match='chat template'):
    chat.ChatTemplate('{% for %}', {})

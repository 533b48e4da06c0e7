# SPDX-License-Identifier: Apache-2.0
"""Drives HTTP with OpenAI's client: PORT. Prints JSON of what it got."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def main() -> None:
  client = openai.OpenAI(
    base_url=f'http://127.0.0.1:{sys.argv[1]}/v1',
    api_key='none',
    max_retries=0,
    timeout=20,
  )
  model = client.models.list().data[0].id
  got: dict[str, Any] = {'model': model}
  ask: Any = {'model': model, 'temperature': 0, 'max_tokens': 12}
  chat: Any = ask | {
    'messages': [{'role': 'user', 'content': 'What does len do?'}]
  }

  whole = client.chat.completions.create(**chat)
  got['chat'] = whole.choices[0].message.content
  got['chat_finish'] = whole.choices[0].finish_reason
  got['chat_usage'] = whole.usage.model_dump() if whole.usage else None
  pieces = list(
    client.chat.completions.create(
      **chat, stream=True, stream_options={'include_usage': True}
    )
  )
  got['chat_stream'] = ''.join(
    p.choices[0].delta.content or '' for p in pieces if p.choices
  )
  got['chat_stream_usage'] = pieces[-1].usage.completion_tokens
  prompt: Any = ask | {'prompt': 'The for statement is used to'}
  got['completion'] = client.completions.create(**prompt).choices[0].text
  got['completion_stream'] = ''.join(
    p.choices[0].text
    for p in client.completions.create(**prompt, stream=True)
    if p.choices
  )
  seeded: Any = prompt | {'prompt': 'Once', 'temperature': 1.5, 'seed': 7}
  got['seeded'] = [
    client.completions.create(**seeded).choices[0].text for _ in range(2)
  ]
  stopped = client.completions.create(**prompt, stop=[' elements'])
  got['stopped'] = stopped.choices[0].text
  got['stopped_finish'] = stopped.choices[0].finish_reason
  scored = (
    client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
    .choices[0]
    .logprobs
  )
  got['logprobs'] = [(t.token, t.logprob) for t in scored.content]
  got['top_logprobs'] = [
    [(t.token, t.logprob) for t in at.top_logprobs] for at in scored.content
  ]
  echoed = client.completions.create(**prompt, echo=True, logprobs=2)
  told = echoed.choices[0].logprobs
  got['echoed'] = echoed.choices[0].text
  got['scored'] = told and told.model_dump()
  refused: dict[str, Any] = {}
  for name, value in (
    ('frequency_penalty', 2.5),
    ('n', 2),
    ('logprobs', 21),
    ('temperature', -1),
  ):
    try:
      client.completions.create(**{**prompt, name: value})
    except openai.APIStatusError as error:
      refused[name] = [error.status_code, str(error)]
  got['refused'] = refused
  print(json.dumps(got))


main()

# SPDX-License-Identifier: Apache-2.0
"""Reads prompts as Python callers give them: one or many, lists or arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
import numbers
from typing import Any

import jax
import numpy as np

from sarathi_jax.text import prompts as prompts_lib


def listed(prompts: Any) -> list[prompts_lib.Prompt]:
  """Returns one prompt or several as a list of prompts, without arrays.

  Args:
    prompts: a text, token ids (a list or an array), or a chat; or an iterable
      of such prompts.

  Raises:
    InvalidRequestError: it is none of these.
  """
  prompts = _plain(prompts)
  if isinstance(prompts, (str, bytes, bytearray, Mapping, Set)) or (
    not isinstance(prompts, Iterable)
  ):
    return [_prompt(prompts)]
  prompts = [_plain(prompt) for prompt in prompts]
  # A list of token ids, or a chat; not a list of these.
  if (
    prompts
    and isinstance(prompts[0], (numbers.Number, Mapping))
    and (not _is_vllms(prompts[0]))
  ):
    return [prompts]
  return [_prompt(prompt) for prompt in prompts]


def _plain(value: Any) -> Any:
  """Returns an array as a list or a number, and anything else as it is."""
  is_array = isinstance(value, (np.ndarray, jax.Array))
  return jax.device_get(value).tolist() if is_array else value


def _is_vllms(prompt: Any) -> bool:
  """Says whether a prompt is as vLLM has it: {'prompt_token_ids': [...]}."""
  return isinstance(prompt, Mapping) and (
    prompt.keys() in ({'prompt'}, {'prompt_token_ids'})
  )


def _prompt(prompt: Any) -> prompts_lib.Prompt:
  if _is_vllms(prompt):
    (prompt,) = map(_plain, prompt.values())
  return prompts_lib.checked(prompt)

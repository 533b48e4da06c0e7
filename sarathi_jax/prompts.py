# SPDX-License-Identifier: Apache-2.0
"""Prompts as callers in Python give them: one or many, lists or arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sarathi_jax.engine import tokenizer


def listed(prompts: Any) -> list[tokenizer.Prompt]:
  """A list of prompts, without arrays, of one prompt or several.

  Args:
    prompts: a text, token ids (a list or an array), or a chat; or several.
  """
  if _is_one(prompts):
    prompts = [prompts]
  return [_plain(prompt) for prompt in prompts]


def _is_one(prompts: Any) -> bool:
  """A text, a list of token ids, or a chat; not a list of these."""
  if isinstance(prompts, str):
    return True
  if not len(prompts):
    return False
  is_number = hasattr(prompts[0], '__index__') and not np.ndim(prompts[0])
  return is_number or isinstance(prompts[0], Mapping)


def _plain(prompt: Any) -> Any:
  """An array of token ids as a list of them."""
  is_array = isinstance(prompt, (np.ndarray, jax.Array))
  return np.asarray(prompt).tolist() if is_array else prompt

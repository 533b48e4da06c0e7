# SPDX-License-Identifier: Apache-2.0
"""Kinds of layers: options that layers share. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sarathi_jax.models import config


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionOptions:
  """Options of a layer's attention; compiled in.

  Attributes:
    scale: multiplies q . k.
    window: a token at p attends to (p - window, p]; None: to [0, p].
    soft_cap: scores become soft_cap * tanh(score / soft_cap); None: no cap.
  """

  scale: float
  window: int | None = None
  soft_cap: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LayerKind:
  """The options that tell layers apart, beside their weights.

  Attributes:
    attention: options of the attention.
    rope: the rotary embedding of queries and keys.
  """

  attention: AttentionOptions
  rope: config.RopeConfig

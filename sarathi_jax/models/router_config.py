# SPDX-License-Identifier: Apache-2.0
"""How tokens choose experts, as plain data. Standard library only: no JAX."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax.models import fields as fields_lib

SCORES = ('softmax', 'sigmoid')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
  """How each token chooses its experts, and weighs what they give.

  Attributes:
    score: what experts' logits become, one of `SCORES`: over all experts, or
      each by itself.
    bias: whether logits add one (gpt-oss).
    choice_bias: whether experts are chosen by their scores plus a bias, which
      their weights don't have (GLM-4.5).
    num_groups: experts lie in so many groups, consecutive ones in each.
    top_groups: how many groups a token's experts may be of: those whose two
      best experts have the highest sums.
    sums_to_one: whether the weights of a token's experts are divided by their
      sum. (With softmax, they then are one of these experts' logits alone,
      whether the top is taken before it or after.)
    scale: multiplies the weights then.
  """

  score: str = 'softmax'
  bias: bool = False
  choice_bias: bool = False
  num_groups: int = 1
  top_groups: int = 1
  sums_to_one: bool = True
  scale: float = 1.0

  def __post_init__(self) -> None:
    config_lib.check_fields(
      self,
      {
        'score': config_lib.one_of(SCORES),
        'bias': config_lib.FLAG,
        'choice_bias': config_lib.FLAG,
        'num_groups': fields_lib.COUNT,
        'top_groups': fields_lib.COUNT,
        'sums_to_one': config_lib.FLAG,
        'scale': fields_lib.POSITIVE,
      },
    )

  def check(self, num_experts: int, experts_per_token: int) -> None:
    """Raises ConfigError if so many experts can't be chosen among so many."""
    size, rest = divmod(num_experts, self.num_groups)
    config_lib.check(
      self.num_groups == 1 or (size >= 2 and not rest),
      'router.num_groups',
      self.num_groups,
      f'must divide num_experts={num_experts} into groups of at least two',
    )
    config_lib.check(
      self.top_groups <= self.num_groups
      and self.top_groups * size >= experts_per_token,
      'router.top_groups',
      self.top_groups,
      f'must be at most num_groups={self.num_groups}, and enough for '
      f'experts_per_token={experts_per_token}',
    )

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any], what: str) -> RouterConfig:
    """Reads what `dataclasses.asdict` wrote; refuses unknown fields."""
    config: RouterConfig = fields_lib.from_dict(cls, fields, what)
    return config


DEFAULT = RouterConfig()

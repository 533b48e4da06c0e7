# SPDX-License-Identifier: Apache-2.0
"""What is served, as clients are told, and what it takes for granted."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from types import MappingProxyType
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import types


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
  """What is being served.

  Attributes:
    model_name: for people.
    family: model family, such as 'llama'.
    vocab_size: token ids are below it.
    max_model_len: most tokens of a sequence, prompt and output.
    eos_token_ids: tokens that end a sequence.
    policy, token_budget, max_num_seqs: of the scheduler.
    num_pages, page_size: of the KV cache.
    default_sampling: values of `SamplingParams` for what a request leaves
      open, where not those of `SamplingParams` itself; see `sampling`.
  """

  model_name: str = ''
  family: str = ''
  vocab_size: int
  max_model_len: int
  eos_token_ids: tuple[int, ...]
  policy: str
  token_budget: int
  max_num_seqs: int
  num_pages: int
  page_size: int
  default_sampling: Mapping[str, Any] = dataclasses.field(
    default_factory=dict)

  @classmethod
  def of(cls, config: config_lib.SchedulerConfig, **others: Any) -> EngineInfo:
    """Returns what is served under a scheduler's limits.

    Args:
      config: of the scheduler.
      others: the fields that it does not have.
    """
    shared = {field.name: getattr(config, field.name)
              for field in dataclasses.fields(cls)
              if hasattr(config, field.name)}
    shared['eos_token_ids'] = tuple(config.eos_token_ids)
    return cls(**shared, **others)

  def sampling(self, fields: Mapping[str, Any],
               defaults: Mapping[str, Any] = MappingProxyType({}),
               ) -> types.SamplingParams:
    """Returns the parameters of a request.

    Args:
      fields: what it says; see `SamplingParams.from_dict`.
      defaults: for what it does not, before those of the model.

    Raises:
      InvalidRequestError: one is unknown, out of range or not supported.
    """
    return types.SamplingParams.from_dict(
      fields, {**self.default_sampling, **defaults})

# SPDX-License-Identifier: Apache-2.0
"""The facts of a served model, for clients, and its default sampling."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from types import MappingProxyType
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax import types


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
  """The facts of a served model and its engine.

  Attributes:
    model_name: a name for people.
    family: model family, such as 'llama'.
    vocab_size: token ids are below it.
    max_model_len: the most tokens of a sequence, prompt and output.
    eos_token_ids: tokens that end a sequence.
    policy, token_budget, max_num_seqs: of the scheduler.
    num_pages, page_size, windows: of the KV cache; see `page_groups`.
    default_sampling: fields of `SamplingParams` for what a request leaves
      open, where they differ from its own defaults; see `sampling`.
    grammars: whether outputs may follow some (structured outputs).
    adapters: names of LoRA adapters that requests may ask for.
    max_loras: the most of them in a step; None: there is no room for any.
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
  windows: page_groups.Windows = page_groups.ONE_GROUP
  default_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  grammars: bool = True
  adapters: tuple[str, ...] = ()
  max_loras: int | None = None

  @classmethod
  def of(cls, config: config_lib.SchedulerConfig, **others: Any) -> EngineInfo:
    """Returns the info of an engine, with its scheduler's limits.

    Args:
      config: of the scheduler.
      others: the fields that `config` does not have.
    """
    shared = {
      field.name: getattr(config, field.name)
      for field in dataclasses.fields(cls)
      if hasattr(config, field.name)
    }
    shared['eos_token_ids'] = tuple(config.eos_token_ids)
    return cls(**shared, **others)

  def kv_tokens(self, num_pages: int) -> int:
    """Returns the tokens of the longest sequences that pages hold."""
    return page_groups.num_tokens(
      self.windows, num_pages, self.page_size, self.max_model_len
    )

  def sampling(
    self,
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
  ) -> types.SamplingParams:
    """Returns the sampling parameters of a request.

    Args:
      fields: those that it sets; see `SamplingParams.from_dict`.
      defaults: for those that it leaves open; they override the model's.

    Raises:
      InvalidRequestError: one is unknown, out of range or not supported.
    """
    return types.SamplingParams.from_dict(
      fields, {**self.default_sampling, **defaults}
    )

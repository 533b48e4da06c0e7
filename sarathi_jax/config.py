# SPDX-License-Identifier: Apache-2.0
"""Configuration: frozen, self-validating, standard library only.

A user writes an `EngineConfig`. The scheduler's `SchedulerConfig` is resolved
from it once the model and the size of the KV cache are known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

from sarathi_jax import errors
from sarathi_jax import page_groups

AUTO = 'auto'  # Chosen once the model and the device are known.
DTYPES = ('auto', 'float32', 'bfloat16', 'float16')
QUANTIZED_ACTIVATIONS = ('fp8',)
KV_CACHE_DTYPES = ('auto', 'float32', 'bfloat16', 'float16', 'int8', 'fp8')


def is_int(value: object) -> bool:
  """Says whether a value is an integer, and not a bool."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
  """Says whether a value is a number that a float can hold, and finite."""
  return (is_int(value) or isinstance(value, float)) and abs(
    value
  ) <= sys.float_info.max


# What a value must be: a test of it, and the rule in words.
Rule = tuple[Callable[[Any], bool], str]
SIZE: Rule = (
  lambda value: is_int(value) and value >= 1,
  'must be an integer >= 1',
)
POSITIVE: Rule = (lambda value: is_real(value) and value > 0, 'must be > 0')
FLAG: Rule = (lambda value: isinstance(value, bool), 'must be true or false')


def or_none(rule: Rule, text: str | None = None) -> Rule:
  """Returns the rule that also allows None; `text` replaces its words."""
  holds, words = rule
  return lambda value: value is None or holds(value), text or words


def one_of(values: Collection[object]) -> Rule:
  """Returns the rule that a value must be one of these."""
  return (
    lambda value: value in tuple(values),  # Unlike a dict, takes lists, too.
    f'must be one of {", ".join(map(str, values))}',
  )


def check_fields(config: object, rules: Mapping[str, Rule]) -> None:
  """Raises ConfigError for the first field that breaks its rule."""
  for field, (holds, rule) in rules.items():
    value = getattr(config, field)
    check(holds(value), field, value, rule)


def check(ok: bool, field: str, value: Any, rule: str) -> None:
  """Raises ConfigError unless `ok`."""
  if not ok:
    raise errors.ConfigError(f'{field}={value!r}: {rule}.')


def default_cache_dir() -> pathlib.Path:
  """Returns the folder that keeps converted checkpoints and compiled steps."""
  return pathlib.Path('~/.cache/sarathi_jax').expanduser()


# At most, by default, for max_adjusted_seqs. 128 take 149 of a vocabulary of
# 152,000 tokens.
_ADJUSTED_MIB = 256
SLOS = 'tbt_slo_ms', 'ttft_slo_ms', 'batch_tbt_slo_ms'
# The ratio of the two targets, where only TBT's is given. MLPerf and others
# measure at ratios of about ten; at this one, TBT gives way to TTFT.
_TTFT_OVER_TBT = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
  """An engine's configuration, as its user writes it.

  Attributes:
    policy: 'sarathi', 'vllm', 'orca' or 'faster_transformer'.
    token_budget: the most tokens of a step, decodes counted in. Policies that
      take prompts whole exceed it by a single prompt where they must.
    max_num_seqs: the most sequences running at once; <= token_budget.
    max_adjusted_seqs: the most of these with penalties, biases, tokens or words
      that are ruled out, or a least length; for each the device keeps eight
      bytes for each token of the vocabulary. More wait, and who comes after
      them. None for all of max_num_seqs, as far as 256 MiB go; 0 for none.
    grammars: whether outputs may follow some (structured outputs), for which
      the device keeps four bytes for each token of the vocabulary and sequence.
    max_model_len: the most tokens of a sequence, prompt and output; None for
      what the model was made for.
    page_size: tokens in a page of the KV cache.
    num_pages: pages in the KV cache; None for as many as fit.
    kv_cache_gib: size of the KV cache, GiB; None for what is free on the
      device (on a CPU, which can't tell: 1 GiB for all of its devices).
    memory_utilization: the part of a device's memory that may be used, where
      the size of the KV cache is not given.
    look_ahead: whether to launch a step before the previous one was fetched.
    short_prompt_share: the part of a step's prefill tokens that a prompt
      leaves to the prompts behind it, in [0, 1).
    dtype: the dtype that a checkpoint's weights are kept and computed with:
      'float32', 'bfloat16' or 'float16'; 'auto' for the checkpoint's own, but
      on a CPU computed with in float32, where matrices keep their 16 bits.
      Live weights keep their own.
    kv_cache_dtype: 'auto' for the weights' ('float32' on a CPU), 'float32',
      'bfloat16' or 'float16'; 'int8' or 'fp8' (e4m3) for half the memory or
      less, with a scale for each token and head.
    quantized_activations: 'fp8' to round what matrices of fp8 multiply, too,
      each token by a scale of its own (W8A8, as of FP8_DYNAMIC): it changes
      numbers, and chunks take half of the products' time on Hopper. None: it
      stays in the model's dtype.
    tbt_slo_ms: the target for the time between tokens (TBT), milliseconds.
      Each step's budget follows it by measured step times, up to
      token_budget; None for token_budget always. For policy sarathi only.
    ttft_slo_ms: the target for the median time to a prompt's first token
      (TTFT), milliseconds, beyond the time that computing it takes. Where it
      can't be met otherwise, tbt_slo_ms gives way; None: twenty times
      tbt_slo_ms.
    batch_tbt_slo_ms: like tbt_slo_ms, for requests of the tier 'batch'; None:
      these bound no step.
    attention: the implementation of ragged_paged_attention; None picks one.
    deterministic: whether a request's logits have the same bits whatever else
      runs with it, however its prompt is cut into chunks, preempted or not, and
      whether or not the prefix cache has what it begins with. Each step then
      computes token_budget tokens, however few there are, so choose it small.
    expert_parallel: whether each of the devices that share a layer has whole
      experts of a mixture, and computes its own experts' rows; if not, it has
      columns of all.
    prefix_cache: whether prompts that begin as others did use their pages of
      the KV cache.
    prefix_cache_misses: whether to find none, but to do all else: to measure
      what finding them saves.
    cache_aware_window: of how many requests, the first ones of a priority and
      client, the one begins next of which the most is found in the cache; each
      is passed by fewer than so many. 1: first come, first served.
    max_loras: the most LoRA adapters that a batch may have: room on the device
      for so many of `max_lora_rank`; requests for others wait. None for as many
      as there are at the start; if these are none, there is no room, and steps
      are compiled once and not twice.
    max_lora_rank: the highest rank of an adapter. None for that of those that
      there are at the start, or 16.
    max_cpu_loras: the most adapters that may be in the host's memory; with one
      more, that goes which no request asked for the longest, but for those that
      there are at the start. If it came from files, it is read again when one
      does. None for any number.
    tp: tensor parallelism: devices that share each layer; None for one, or for
      those of a mesh that is given.
    pp: pipeline parallelism: stages, of tp devices each.
    seed: of the random numbers of requests without a seed of their own.
    tool_parser, reasoning_parser: how the model writes calls of tools, and what
      it thinks; 'auto' by its chat template, see `text.reply_formats`.
    compilation_cache_dir: where compiled steps are kept between runs; 'auto'
      for JAX's own cache, where the program has set one, else a folder below
      `default_cache_dir`; None for no such cache.
  """

  policy: str = 'sarathi'
  token_budget: int = 512
  max_num_seqs: int = 128
  max_adjusted_seqs: int | None = None
  grammars: bool = True
  max_model_len: int | None = None
  page_size: int = 64
  num_pages: int | None = None
  kv_cache_gib: float | None = None
  memory_utilization: float = 0.9
  look_ahead: bool = True
  short_prompt_share: float = 0.25
  dtype: str = 'auto'
  kv_cache_dtype: str = 'auto'
  quantized_activations: str | None = None
  tbt_slo_ms: float | None = None
  ttft_slo_ms: float | None = None
  batch_tbt_slo_ms: float | None = None
  attention: str | None = None
  deterministic: bool = False
  expert_parallel: bool = False
  prefix_cache: bool = True
  prefix_cache_misses: bool = False
  cache_aware_window: int = 1
  max_loras: int | None = None
  max_lora_rank: int | None = None
  max_cpu_loras: int | None = None
  tp: int | None = None
  pp: int = 1
  seed: int = 0
  tool_parser: str = AUTO
  reasoning_parser: str = AUTO
  compilation_cache_dir: str | os.PathLike[str] | None = AUTO

  def __post_init__(self) -> None:
    check_fields(self, _ENGINE_RULES)
    check(
      self.token_budget >= self.max_num_seqs,
      'token_budget',
      self.token_budget,
      f'must be at least max_num_seqs={self.max_num_seqs}, or a decode '
      'could be left out of a step',
    )
    for field in SLOS:
      value = getattr(self, field)
      check(
        value is None or self.tbt_slo_ms is not None,
        field,
        value,
        'needs tbt_slo_ms',
      )
    check(
      not self.deterministic or self.tbt_slo_ms is None,
      'tbt_slo_ms',
      self.tbt_slo_ms,
      'must be None with deterministic, whose steps all take as long',
    )
    check(
      not self.deterministic or self.attention != 'pallas_mosaic',
      'attention',
      self.attention,
      'must be another with deterministic, as it computes decodes by other '
      'sums than chunks',
    )

  def num_adjusted_seqs(self, vocab_size: int) -> int:
    """Returns `max_adjusted_seqs`, resolved for a model's vocabulary."""
    most = self.max_adjusted_seqs
    if most is None:
      most = max((_ADJUSTED_MIB << 20) // (8 * vocab_size), 1)
    return min(most, self.max_num_seqs)

  def cache_bytes(self, page_bytes: int) -> float | None:
    """Returns the configured bytes of the KV cache on one device.

    Args:
      page_bytes: bytes of a page on that device.

    Returns:
      Bytes; None for all that is free.
    """
    if self.num_pages is not None:
      return self.num_pages * page_bytes
    return None if self.kv_cache_gib is None else self.kv_cache_gib * 2**30


_ENGINE_RULES: Mapping[str, Rule] = {
  **dict.fromkeys(
    ('token_budget', 'max_num_seqs', 'page_size', 'cache_aware_window', 'pp'),
    SIZE,
  ),
  **dict.fromkeys(
    (
      'max_model_len',
      'num_pages',
      'tp',
      'max_loras',
      'max_lora_rank',
      'max_cpu_loras',
    ),
    or_none(SIZE),
  ),
  'max_adjusted_seqs': or_none(
    (lambda value: is_int(value) and value >= 0, 'must be an integer >= 0')
  ),
  **dict.fromkeys(SLOS, or_none(POSITIVE, 'must be milliseconds > 0')),
  'kv_cache_gib': or_none(
    (  # inf: all that can be used
      lambda value: value == math.inf or POSITIVE[0](value),
      POSITIVE[1],
    )
  ),
  'memory_utilization': (
    lambda value: is_real(value) and 0 < value <= 1,
    'must be in (0, 1]',
  ),
  'short_prompt_share': (
    lambda value: is_real(value) and 0 <= value < 1,
    'must be in [0, 1)',
  ),
  'dtype': one_of(DTYPES),
  'kv_cache_dtype': one_of(KV_CACHE_DTYPES),
  'quantized_activations': or_none(one_of(QUANTIZED_ACTIVATIONS)),
  **dict.fromkeys(
    (
      'look_ahead',
      'grammars',
      'deterministic',
      'expert_parallel',
      'prefix_cache',
      'prefix_cache_misses',
    ),
    FLAG,
  ),
  'compilation_cache_dir': or_none(
    (
      lambda value: isinstance(value, (str, os.PathLike)),
      "must be a folder, 'auto' or None",
    )
  ),
  'seed': (
    lambda value: is_int(value) and 0 <= value < 2**63,
    'must be an integer in [0, 2**63)',
  ),
}


def or_default(config: object) -> EngineConfig:
  """Returns a caller's configuration; the default one for None.

  Raises:
    ConfigError: it is something else.
  """
  if config is None:
    return EngineConfig()
  if not isinstance(config, EngineConfig):
    raise errors.ConfigError(
      f'config: is a {type(config).__name__}; must be an EngineConfig.'
    )
  return config


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
  """A scheduler's configuration, resolved from the engine's.

  Attributes:
    token_budget, max_num_seqs, short_prompt_share, tbt_slo_ms, ttft_slo_ms,
      batch_tbt_slo_ms, prefix_cache, prefix_cache_misses, cache_aware_window,
      max_loras: see `EngineConfig`.
    max_adjusted_seqs: the most sequences running at once whose logits are
      adjusted; they have the first slots. None for all.
    max_model_len: the most tokens of a sequence.
    num_pages, page_size: the KV cache.
    windows: of the groups of layers, which take pages of their own; see
      `page_groups`.
    num_stages: pipeline stages. A sequence's next token can be launched once
      that many later steps were launched.
    look_ahead: whether one batch more than stages may be in flight.
    prefix_cost: what each earlier token of the sequence adds to the cost of a
      prefill's token, in tokens; 0 where batches may take different times.
    eos_token_ids: tokens that end a sequence, unless it ignores them.
    seed: see `EngineConfig`.
    dynamic_rope_len: the longest prompt whose keys in the cache do not depend
      on its length; None where no prompt's do.
    rope_counts_outputs: whether that is the prompt and the most that is put
      out; of longer ones all keys are alike then.
  """

  token_budget: int
  max_num_seqs: int
  max_model_len: int
  num_pages: int
  page_size: int
  windows: page_groups.Windows = page_groups.ONE_GROUP
  num_stages: int = 1
  look_ahead: bool = True
  short_prompt_share: float = 0.25
  prefix_cost: float = 0.0
  tbt_slo_ms: float | None = None
  ttft_slo_ms: float | None = None
  batch_tbt_slo_ms: float | None = None
  eos_token_ids: Collection[int] = ()
  seed: int = 0
  max_adjusted_seqs: int | None = None
  prefix_cache: bool = True
  prefix_cache_misses: bool = False
  cache_aware_window: int = 1
  max_loras: int | None = None
  dynamic_rope_len: int | None = None
  rope_counts_outputs: bool = False

  @classmethod
  def of(cls, config: EngineConfig, **resolved: Any) -> SchedulerConfig:
    """Returns a scheduler's config, from an engine's.

    Args:
      config: of the engine; fields that both have are taken from it.
      resolved: the other fields, and those that depend on the model and the
        device: max_model_len and num_pages at least.

    Raises:
      ConfigError: the cache has no room for one sequence.
    """
    shared = {
      field.name
      for field in dataclasses.fields(cls)
      if hasattr(config, field.name)
    }
    return cls(**{name: getattr(config, name) for name in shared} | resolved)

  def __post_init__(self) -> None:
    check(
      self.token_budget >= self.max_num_seqs,
      'token_budget',
      self.token_budget,
      f'must be at least max_num_seqs={self.max_num_seqs}',
    )
    self.check_room()

  def check_room(self, chunk: int = 1) -> None:
    """Raises ConfigError if the cache has no room for one sequence.

    Args:
      chunk: the fewest tokens that are computed at once, if there are so many.
    """
    longest = page_groups.longest(
      self.windows, self.num_pages, self.page_size, self.max_model_len, chunk
    )
    check(
      longest == self.max_model_len,
      'num_pages',
      self.num_pages,
      f'{longest} tokens of KV cache are too few '
      f'for one sequence of max_model_len={self.max_model_len}; lower '
      'max_model_len or raise kv_cache_gib',
    )

  @property
  def ttft_target_s(self) -> float:
    """The target for TTFT, in seconds; needs tbt_slo_ms."""
    assert self.tbt_slo_ms is not None
    return (self.ttft_slo_ms or _TTFT_OVER_TBT * self.tbt_slo_ms) / 1e3

  @property
  def max_in_flight(self) -> int:
    """The most batches that may be launched and not yet completed."""
    return self.num_stages + self.look_ahead

  @property
  def num_adjusted_seqs(self) -> int:
    """The slots, the first ones, whose sequences may be adjusted."""
    if self.max_adjusted_seqs is None:
      return self.max_num_seqs
    return min(self.max_adjusted_seqs, self.max_num_seqs)

  @property
  def pages_per_seq(self) -> int:
    return math.ceil(self.max_model_len / self.page_size)

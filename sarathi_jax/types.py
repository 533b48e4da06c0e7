# SPDX-License-Identifier: Apache-2.0
"""The values that travel between the layers. Frozen; standard library only.

What a user makes (`SamplingParams`, `Request`) validates itself. What the
engine makes hundreds of every step (`Chunk`, `TokenEvent`, `OutputDelta`) are
named tuples, which cost a third of a frozen dataclass to build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import enum
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from sarathi_jax import config as config_lib
from sarathi_jax import errors

_T = TypeVar('_T')
MIN_SEED, MAX_SEED = -2**63, 2**63 - 1  # vLLM's
TIERS = ('interactive', 'batch')

# What vLLM's SamplingParams knows and we don't honour yet -> the value at
# which it changes nothing. Any other value, but None, is refused by name.
UNSUPPORTED_SAMPLING: Mapping[str, Any] = {
  'allowed_token_ids': None,
  'bad_words': (),
  'detokenize': True,
  'extra_args': {},
  'flat_logprobs': False,
  'frequency_penalty': 0.0,
  'guided_decoding': None,
  'logit_bias': {},
  'logprob_token_ids': None,
  'logits_processors': None,
  'min_tokens': 0,
  'n': 1,
  'output_kind': None,
  'presence_penalty': 0.0,
  'prompt_logprobs': None,
  'repetition_detection': None,
  'repetition_penalty': 1.0,
  'spaces_between_special_tokens': True,
  'structured_outputs': None,
  'thinking_token_budget': None,
  'truncate_prompt_tokens': None,
}


class FinishReason(enum.Enum):
  """Why a request ended. The values are what clients see."""

  STOP = 'stop'  # end of sequence, a stop token or a stop string
  LENGTH = 'length'  # max_tokens, or the end of the context
  ABORT = 'abort'  # by the client
  ERROR = 'error'  # by a fault in the engine, or logits that aren't finite


def _check(ok: bool, field: str, value: object, rule: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(f'{field}={errors.shown(value)}: {rule}.')


def _plain(value: Any) -> Any:
  """A scalar of NumPy or JAX as Python's; other things as they are."""
  is_scalar = getattr(value, 'ndim', None) == 0 and hasattr(value, 'item')
  return value.item() if is_scalar else value


def _listed(value: Any) -> Any:
  """A list, or an array of NumPy or JAX, as a tuple of plain values."""
  if getattr(value, 'ndim', None) == 1 and hasattr(value, 'tolist'):
    value = value.tolist()
  return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else (
    value)


_is_int, _is_real = config_lib.is_int, config_lib.is_real


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
  """How to choose the tokens of one request. Names and defaults are vLLM's.

  Where vLLM takes None for a value that is not said, so does this: it is the
  default. Scalars of NumPy and JAX are taken, and kept as Python's.

  Attributes:
    max_tokens: the most tokens to generate, >= 1; None for all that the
      context has room for.
    temperature: >= 0; 0 takes the likeliest token (greedy).
    top_k: sample among the k likeliest tokens; 0 or -1 for all.
    top_p: sample among the likeliest tokens that make up this probability,
      in (0, 1].
    min_p: drop tokens less likely than this fraction of the likeliest one,
      in [0, 1].
    seed: in [-2**63, 2**63); the same seed, prompt and weights give the same
      random numbers, whatever else runs. So they give the same tokens, but
      where rounding, which does depend on what else is in a step, decides
      between two that are nearly as likely: seldom with float32 weights,
      often enough to notice with 16 bits. None or, as in vLLM, -1: the engine
      draws one.
    stop: strings that end the output, which excludes them.
    stop_token_ids: tokens that end the output, which includes them.
    include_stop_str_in_output: keep the stop string at the end of the text.
    ignore_eos: go on past the end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    logprobs: None or 0. The log-probability of each sampled token is always
      returned; those of other tokens are not supported.
  """

  max_tokens: int | None = 16
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int | None = None
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  include_stop_str_in_output: bool = False
  ignore_eos: bool = False
  skip_special_tokens: bool = True
  logprobs: int | None = None

  def __post_init__(self) -> None:
    for field, default in _DEFAULTS.items():
      value = getattr(self, field)
      if value is None and field in NONE_IS_DEFAULT:
        object.__setattr__(self, field, default)
      elif type(value) is not type(default):  # Most values are plain.
        object.__setattr__(self, field, _plain(value))
    stop = (self.stop,) if isinstance(self.stop, str) else self.stop
    for field, value in (('stop', _listed(stop)),
                         ('stop_token_ids', _listed(self.stop_token_ids))):
      _check(isinstance(value, tuple), field, value, 'must be a list')
      object.__setattr__(self, field, value)
    _check(self.max_tokens is None
           or (_is_int(self.max_tokens) and self.max_tokens >= 1),
           'max_tokens', self.max_tokens, 'must be an integer >= 1')
    _check(_is_real(self.temperature) and self.temperature >= 0,
           'temperature', self.temperature, 'must be finite and >= 0')
    _check(_is_int(self.top_k) and self.top_k >= -1,
           'top_k', self.top_k, 'must be an integer >= 1, or 0 or -1 for all')
    _check(_is_real(self.top_p) and 0 < self.top_p <= 1,
           'top_p', self.top_p, 'must be in (0, 1]')
    _check(_is_real(self.min_p) and 0 <= self.min_p <= 1,
           'min_p', self.min_p, 'must be in [0, 1]')
    _check(self.seed is None
           or (_is_int(self.seed) and MIN_SEED <= self.seed <= MAX_SEED),
           'seed', self.seed,
           f'must be an integer in [{MIN_SEED}, {MAX_SEED}]')
    if self.seed == -1:  # as in vLLM
      object.__setattr__(self, 'seed', None)
    _check(all(isinstance(s, str) and s for s in self.stop),
           'stop', self.stop, 'must be strings that are not empty')
    _check(all(_is_int(t) and t >= 0 for t in self.stop_token_ids),
           'stop_token_ids', self.stop_token_ids, 'must be token ids >= 0')
    for field in ('include_stop_str_in_output', 'ignore_eos',
                  'skip_special_tokens'):
      _check(isinstance(getattr(self, field), bool),
             field, getattr(self, field), 'must be true or false')
    if self.logprobs not in (None, 0) or isinstance(self.logprobs, bool):
      raise errors.UnsupportedError(
        f'logprobs={errors.shown(self.logprobs)}: only the sampled token\'s '
        'log-probability is returned (logprobs=0; in OpenAI\'s chats, '
        'top_logprobs=0).')

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any],
                defaults: Mapping[str, Any] = MappingProxyType({}),
                ) -> SamplingParams:
    """Makes parameters from decoded JSON.

    Args:
      fields: what is said.
      defaults: fields for what is not, or is null.

    Raises:
      UnsupportedError: a field that vLLM knows and this engine does not
        honour, at a value that would change the output.
      InvalidRequestError: an unknown field, or a value out of range.
    """
    if not isinstance(fields, Mapping):
      raise errors.InvalidRequestError(
        f'sampling={errors.shown(fields)}: must be an object of sampling '
        'fields.')
    known = {f.name for f in dataclasses.fields(cls)}
    kept = {}
    said = {name: value for name, value in fields.items()
            if value is not None or name not in NONE_IS_DEFAULT}
    for name, value in {**defaults, **said}.items():
      if name in known:
        kept[name] = value
      elif name not in UNSUPPORTED_SAMPLING:
        raise errors.InvalidRequestError(
          f'{errors.cut(str(name))}={errors.shown(value)}: unknown sampling '
          f'field; known: '
          f'{", ".join(sorted(known))}.')
      elif value is not None and UNSUPPORTED_SAMPLING[name] != (
          tuple(value) if isinstance(value, list) else value):
        raise errors.UnsupportedError(
          f'{name}={errors.shown(value)}: this sampling field is not '
          'supported.')
    return cls(**kept)

  @classmethod
  def defaults(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `defaults` for `from_dict`, whole, of decoded JSON.

    What this engine does not honour, and changes nothing, is left out.

    Raises:
      InvalidRequestError: see `from_dict`.
    """
    params = cls.from_dict(fields)
    return {name: getattr(params, name) for name in fields
            if hasattr(params, name)}


_DEFAULTS: Mapping[str, Any] = {
  field.name: field.default for field in dataclasses.fields(SamplingParams)}
# Where vLLM takes None, or its HTTP does, and None says nothing itself.
NONE_IS_DEFAULT = frozenset({
  'temperature', 'top_k', 'top_p', 'min_p', 'stop', 'stop_token_ids'})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
  """One prompt to continue.

  Attributes:
    request_id: unique among its tenant's requests that are running or waiting.
    prompt_token_ids: token ids, at least one.
    sampling: how to choose the tokens.
    arrival_time: when it arrived, seconds on the engine's clock.
    tenant: whose it is; '' where all are one's.
    client: who sent it, of the tenant's; for fairness and for people.
    priority: those of a smaller one begin first and are preempted last.
    deadline: when it is of no use any more, on the engine's clock.
    tier: 'interactive', or 'batch' for who does not watch the tokens come;
      see `EngineConfig.batch_tbt_slo_ms`.
    key: unique among all requests that an engine has; the `request_id` of
      its chunks and deltas. By default the request's own.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  sampling: SamplingParams = SamplingParams()
  arrival_time: float = 0.0
  tenant: str = ''
  client: str = ''
  priority: int = 0
  deadline: float | None = None
  tier: str = 'interactive'
  key: str = dataclasses.field(default='', repr=False, compare=False)

  def __post_init__(self) -> None:
    _check(self.tier in TIERS, 'tier', self.tier,
           f'must be one of {", ".join(TIERS)}')
    object.__setattr__(self, 'key', self.key or self.request_id)


class Chunk(NamedTuple):
  """The tokens that one sequence contributes to one hybrid batch.

  Tokens [start, start + num_tokens) of the sequence are computed. A chunk
  that `samples` reaches the sequence's end, so what comes next is sampled.

  Attributes:
    request_id: whose tokens: the request's `key`.
    slot: in [0, max_num_seqs), the sequence's own while it runs; the device
      keeps its last sampled token there.
    start: tokens of the sequence that are in the KV cache already.
    tokens: the token ids; empty if the one token is still on the device,
      sampled by a batch in flight (look-ahead).
    num_tokens: how many are computed: len(tokens), or 1 if that is empty.
    page_table: the pages of tokens [0, start + num_tokens), in order. The
      same object is passed on until a page is added.
    is_prefill: whether this is part of a prefill (a recompute is, too).
    samples: how many tokens are sampled, one after each of its last ones; 0
      for a part of a prefill.
    prompt_len: tokens of the request's prompt; what dynamic RoPE depends on.
    seed: of the request's random numbers, of 64 bits with a sign.
    sampling: how to choose the token.
  """

  request_id: str
  slot: int
  start: int
  tokens: tuple[int, ...]
  num_tokens: int
  page_table: tuple[int, ...]
  is_prefill: bool
  samples: int
  prompt_len: int
  seed: int
  sampling: SamplingParams


class ScheduledBatch(NamedTuple):
  """One step: every ready decode, then chunks of prefills.

  Attributes:
    step: counts from 0 the batches that were scheduled.
    chunks: decodes first.
    num_tokens: the sum over chunks; at most the step's limit.
    preempted: requests whose pages were taken back to make this batch.
  """

  step: int
  chunks: tuple[Chunk, ...]
  num_tokens: int
  preempted: tuple[str, ...] = ()


class Sampled(NamedTuple):
  """What a batch sampled, one entry a chunk: of some tokens, one, or none.

  Attributes:
    tokens: token ids, as they follow one another in the sequence.
    logprobs: of the tokens, natural logarithm, before temperature; NaN where
      logits were not finite, and no token could be sampled.
  """

  tokens: list[tuple[int, ...]]
  logprobs: list[tuple[float, ...]]

  @classmethod
  def of(cls, chunks: Iterable[Chunk], tokens: Iterable[int],
         logprobs: Iterable[float]) -> Sampled:
    """Shares out what was sampled, one after another, among the chunks."""
    counts = [chunk.samples for chunk in chunks]
    return cls(_shared_out(counts, tokens), _shared_out(counts, logprobs))


def _shared_out(counts: list[int], values: Iterable[_T]
                ) -> list[tuple[_T, ...]]:
  ones = zip(values)  # What makes tuples of one the fastest.
  return [next(ones) if n == 1 else tuple(x for x, in islice(ones, n))
          for n in counts]


class TokenEvent(NamedTuple):
  """The tokens that a request gained in a step, one or more.

  With FinishReason.ERROR it gained none, as one could not be sampled.
  """

  request_id: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
  """What a finished request went through. Times are seconds.

  Attributes:
    num_prompt_tokens: length of the prompt.
    num_output_tokens: tokens generated.
    num_preemptions: how often its pages were taken back.
    scheduling_delay_s: from arrival to its first chunk's schedule.
    ttft_s: from arrival to the first token; None without one.
    tpot_s: mean time between tokens; None with less than two.
    e2e_s: from arrival to the end.
    max_tbt_s: the longest time between two tokens; None with less than two.
  """

  num_prompt_tokens: int
  num_output_tokens: int
  num_preemptions: int
  scheduling_delay_s: float | None
  ttft_s: float | None
  tpot_s: float | None
  e2e_s: float
  max_tbt_s: float | None


class OutputDelta(NamedTuple):
  """What one request gained in one step.

  Attributes:
    request_id: whose: the request's `key`.
    text: what may be shown now: whole characters only, and nothing that may
      yet turn out to be a stop string.
    token_ids: new tokens; a matched stop string's are included.
    logprobs: of those tokens.
    finish_reason: None while it goes on.
    stop_reason: the stop token id or stop string that ended it, if any; None
      for the model's own end of sequence.
    metrics: with the last delta only.
  """

  request_id: str
  text: str
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason | None = None
  stop_reason: int | str | None = None
  metrics: RequestMetrics | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
  """A finished request, whole.

  Attributes:
    request_id: whose.
    prompt_token_ids: the prompt.
    token_ids: the generated tokens.
    logprobs: their log-probabilities (natural logarithm, before temperature
      and filters).
    text: the generated text, '' without a tokenizer.
    finish_reason: why it ended.
    stop_reason: see `OutputDelta`.
    metrics: what it went through.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  text: str
  finish_reason: FinishReason
  stop_reason: int | str | None
  metrics: RequestMetrics

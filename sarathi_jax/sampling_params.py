# SPDX-License-Identifier: Apache-2.0
"""How to choose the tokens of a request: one table of fields. No JAX.

The class is the table. What else is to be known of a field, beside its name
and default, is its `Field`: what values it takes, its flag's help, whether
a checkpoint may recommend it, and what the device gets of it. From `FIELDS`
are made the checks, the flags, the tensors of the Open Inference Protocol, and
what is packed for the device. A field is added here, to the .proto, and where
it is honoured.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from types import MappingProxyType
from typing import Any

from sarathi_jax import config
from sarathi_jax import errors
from sarathi_jax import sampling_fields as fields_lib
from sarathi_jax import structured_outputs as structured_outputs_lib

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1  # vLLM's
# Of the bad words of a request, those of several tokens; vLLM takes 1,024
# tokens of at most 128 words.
MAX_SPELLINGS, MAX_SPELLING_TOKENS = 128, 16

# The most log-probabilities at a position; vLLM's, by default.
MAX_LOGPROBS, MAX_LOGPROB_TOKEN_IDS = 20, 128
# Whether log-probabilities are of the logits as they came, divided by the
# temperature, or as they are sampled from.
LOGPROBS_MODES = ('raw', 'temperature', 'processed')

# What vLLM's SamplingParams knows and we don't honour yet -> the value at
# which it changes nothing. Any other value, but None, is refused by name.
UNSUPPORTED: Mapping[str, Any] = {
  'best_of': 1,
  'detokenize': True,
  'extra_args': {},
  'flat_logprobs': False,
  'guided_decoding': None,
  'logits_processors': None,
  'output_kind': None,
  'repetition_detection': None,
  'spaces_between_special_tokens': True,
  'thinking_token_budget': None,
  'truncate_prompt_tokens': None,
}


Kind = fields_lib.Kind
Field = fields_lib.Field
_is_int, _is_real = config.is_int, config.is_real
_Outputs = structured_outputs_lib.StructuredOutputsParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
  """How to choose the tokens of one request. Names and defaults are vLLM's.

  `runner.sampling` says in what order they act on the logits. Where vLLM takes
  None for a value that is not said, so does this: it is the default. Scalars of
  NumPy and JAX are taken, and kept as Python's.

  Attributes:
    n: how many outputs to make of the prompt, each with random numbers of its
      own; >= 1, and 1 with temperature 0, as all would be the same.
    max_tokens: the most tokens to generate, >= 1; None for all that the
      context has room for.
    temperature: >= 0; 0 takes the likeliest token (greedy).
    top_k: sample among the k likeliest tokens; 0 or -1 for all.
    top_p: sample among the likeliest tokens that make up this probability,
      in (0, 1].
    min_p: drop tokens less likely than this fraction of the likeliest one,
      in [0, 1].
    repetition_penalty: > 0; divides the logits of tokens of the prompt and of
      the output that are positive, and multiplies those that are negative.
    presence_penalty: in [-2, 2]; is taken off the logits of tokens of the
      output.
    frequency_penalty: in [-2, 2]; is taken off the logits of tokens of the
      output, as often as they are there.
    logit_bias: token id -> what is added to its logit; None or empty for
      nothing.
    allowed_token_ids: the only tokens that may be sampled; None for all.
    bad_token_ids: tokens that are never sampled.
    bad_words: words that are never completed, as they are spelled at the start
      of a text or after a space (vLLM's rule). At most MAX_SPELLINGS spellings
      of several tokens, each of at most MAX_SPELLING_TOKENS.
    min_tokens: the least tokens to generate: before them, neither the model's
      end of sequence nor `stop_token_ids` are sampled, and stop strings
      are text like any other. At most max_tokens; without these it may be more
      than the context has room for, whose end then ends the output.
    seed: in [-2**63, 2**63), of the first output; each next one has one more
      (vLLM's rule). The same seed, prompt and weights give the same random
      numbers, whatever else runs. So they give the same tokens, but where
      rounding, which does depend on what else is in a step, decides between
      two that are nearly as likely: seldom with float32 weights, often enough
      to notice with 16 bits, never if the engine is `deterministic`. None or,
      as in vLLM, -1: the engine draws one.
    stop: strings that end the output, which excludes them.
    stop_token_ids: tokens that end the output, which includes them.
    include_stop_str_in_output: keep the stop string at the end of the text.
    ignore_eos: go on past the end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    structured_outputs: what the output has to be; a StructuredOutputsParams, or
      a dict of its fields. Nothing else is sampled, and an output ends where
      its grammar does, whatever `min_tokens` and `ignore_eos` say. After a
      chat, what the model thinks comes before, and it may call tools instead.
    logprobs: how many of the likeliest tokens to tell the log-probabilities
      of, with each sampled token's, at most MAX_LOGPROBS; None to tell but the
      sampled token's log-probability, which is always told.
    prompt_logprobs: likewise of the prompt, with each of its tokens but the
      first; of the logits as they came, whatever `logprobs_mode` says but
      'temperature'.
    logprob_token_ids: tokens whose log-probabilities are told with each sampled
      token's, at most MAX_LOGPROB_TOKEN_IDS.
    logprobs_mode: what log-probabilities of the output are of: 'raw', the
      logits as they came; 'temperature', these divided by the temperature, if
      it is not 0; 'processed', what the token was sampled from, after all that
      this request asks for.
  """

  n: int = fields_lib.field(
    1,
    Kind.INT,
    'How many outputs to make of each prompt.',
    'must be an integer >= 1',
    lambda n: _is_int(n) and n >= 1,
    none_is_default=True,
  )
  max_tokens: int | None = fields_lib.field(
    16,
    Kind.INT,
    'The most tokens to generate.',
    'must be an integer >= 1',
    lambda n: n is None or (_is_int(n) and n >= 1),
  )
  temperature: float = fields_lib.probability(
    1.0,
    'Temperature of sampling; 0 takes the likeliest token each time.',
    'must be finite and >= 0',
    lambda t: _is_real(t) and t >= 0,
    0.0,
  )
  top_k: int = fields_lib.field(
    0,
    Kind.INT,
    'Sample among this many likeliest tokens; 0 or -1: among all.',
    'must be an integer >= 1, or 0 or -1 for all',
    lambda k: _is_int(k) and k >= -1,
    none_is_default=True,
    is_recommended=True,
    on_device=fields_lib.OnDevice(0, lambda k: max(k, 0)),
  )
  top_p: float = fields_lib.probability(
    1.0,
    'Sample among the likeliest tokens that together have this probability.',
    'must be in (0, 1]',
    lambda p: _is_real(p) and 0 < p <= 1,
    1.0,
  )
  min_p: float = fields_lib.probability(
    0.0,
    "Drop tokens less likely than this fraction of the likeliest token's "
    'probability.',
    'must be in [0, 1]',
    lambda p: _is_real(p) and 0 <= p <= 1,
    0.0,
  )
  repetition_penalty: float = fields_lib.penalty(
    1.0,
    'Penalty of tokens that are in the prompt or the output, a factor; 1 for '
    'none.',
    'must be finite and > 0',
    lambda penalty: penalty > 0,
    is_recommended=True,
  )
  presence_penalty: float = fields_lib.penalty(
    0.0,
    'Penalty of tokens that are in the output, taken off their logits.',
    'must be in [-2, 2]',
    lambda penalty: -2 <= penalty <= 2,
  )
  frequency_penalty: float = fields_lib.penalty(
    0.0,
    'Penalty of tokens for each time that they are in the output, taken off '
    'their logits.',
    'must be in [-2, 2]',
    lambda penalty: -2 <= penalty <= 2,
  )
  logit_bias: Mapping[int, float] | None = fields_lib.field(
    None,
    Kind.BIAS,
    "Token id and what is added to the token's logit, as ID:BIAS; may be given "
    'several times.',
    'must have token ids >= 0, and finite numbers',
    lambda bias: bias is None or fields_lib.is_bias(bias),
    none_is_default=True,
    adjusts=True,
  )
  allowed_token_ids: tuple[int, ...] | None = fields_lib.ids(
    None,
    'Id of a token that may be sampled, if it is given at all; may be given '
    'several times.',
    adjusts=True,
  )
  bad_token_ids: tuple[int, ...] = fields_lib.ids(
    (),
    'Id of a token that is never sampled; may be given several times.',
    adjusts=True,
  )
  bad_words: tuple[str, ...] = fields_lib.field(
    (),
    Kind.STRINGS,
    'Word that is never completed; may be given several times.',
    'must be strings that are not blank',
    lambda words: all(isinstance(w, str) and w.strip() for w in words),
    none_is_default=True,
    adjusts=True,
  )
  min_tokens: int = fields_lib.field(
    0,
    Kind.INT,
    'The least tokens to generate before the output may end by itself.',
    'must be an integer >= 0',
    lambda n: _is_int(n) and n >= 0,
    none_is_default=True,
    adjusts=True,
  )
  seed: int | None = fields_lib.field(
    None,
    Kind.LONG,
    "Seed of the request's random numbers; the same seed gives the same ones.",
    f'must be an integer in [{MIN_SEED}, {MAX_SEED}]',
    lambda s: s is None or (_is_int(s) and MIN_SEED <= s <= MAX_SEED),
  )
  stop: tuple[str, ...] = fields_lib.field(
    (),
    Kind.STRINGS,
    'Text that ends the output; may be given several times.',
    'must be strings that are not empty',
    lambda stop: all(isinstance(s, str) and s for s in stop),
    none_is_default=True,
  )
  stop_token_ids: tuple[int, ...] = fields_lib.ids(
    (), 'Id of a token that ends the output; may be given several times.'
  )
  include_stop_str_in_output: bool = fields_lib.flag(
    False, 'Keep the stop text at the end of the output.'
  )
  ignore_eos: bool = fields_lib.flag(
    False, 'Go on generating past the end-of-sequence token.'
  )
  skip_special_tokens: bool = fields_lib.flag(
    True, "Leave special tokens out of the output's text."
  )
  structured_outputs: _Outputs | None = fields_lib.field(  # noqa: RUF009
    None,
    Kind.OUTPUTS,
    'What the output has to be, in JSON: an object with one of '
    f'{", ".join(structured_outputs_lib.KINDS)}.',
    '',
    lambda value: True,
    none_is_default=True,
  )
  logprobs: int | None = fields_lib.logprobs(
    'How many of the likeliest tokens to tell the log-probabilities of',
    MAX_LOGPROBS,
  )
  prompt_logprobs: int | None = fields_lib.logprobs(
    'How many of the likeliest tokens to tell the log-probabilities of at each '
    'token of the prompt',
    MAX_LOGPROBS,
  )
  logprob_token_ids: tuple[int, ...] | None = fields_lib.ids(
    None,
    'Id of a token whose log-probability is told with each sampled one; may be '
    'given several times.',
    most=MAX_LOGPROB_TOKEN_IDS,
    adjusts=True,
  )
  logprobs_mode: str = fields_lib.name(
    LOGPROBS_MODES[0],
    LOGPROBS_MODES,
    "Whether log-probabilities are of the model's logits (raw), of these "
    'divided by the temperature (temperature), or of what tokens are sampled '
    'from (processed).',
  )

  def __post_init__(self) -> None:
    for name, field in FIELDS.items():
      value = getattr(self, name)
      if value is None and field.none_is_default:
        value = DEFAULTS[name]
      elif field.kind.is_list:
        is_one = field.kind is Kind.STRINGS and isinstance(value, str)
        value = fields_lib.listed((value,) if is_one else value)
        _check(isinstance(value, tuple), name, value, 'must be a list')
      elif field.kind is Kind.BIAS:
        value = fields_lib.biases(value)
        value = None if value == {} else value
      elif field.kind is Kind.OUTPUTS:
        value = _Outputs.of(value)
      else:
        value = fields_lib.plain(value)
      _check(field.holds(value), name, value, field.rule)
      object.__setattr__(self, name, value)
    _check(
      self.max_tokens is None or self.min_tokens <= self.max_tokens,
      'min_tokens',
      self.min_tokens,
      f'must be at most max_tokens={self.max_tokens}',
    )
    _check(
      self.n == 1 or self.temperature > 0,
      'n',
      self.n,
      'must be 1 with temperature=0, which makes all outputs the same',
    )
    if self.seed == -1:  # as in vLLM
      object.__setattr__(self, 'seed', None)

  @property
  def is_adjusted(self) -> bool:
    """Whether a field needs what the device keeps of a sequence."""
    return any(getattr(self, name) != DEFAULTS[name] for name in _ADJUSTING)

  @property
  def tells(self) -> bool:
    """Whether more is told of an output token than its log-probability."""
    return self.logprobs is not None or self.logprob_token_ids is not None

  @property
  def telling(self) -> int:
    """Returns 0 for the raw log-probability alone, else 1 + the mode's place.

    The mode is in LOGPROBS_MODES.
    """
    mode = LOGPROBS_MODES.index(self.logprobs_mode)
    return 1 + mode if mode or self.tells else 0

  @property
  def prompt_temperature(self) -> float:
    """What logits of the prompt are divided by before they are told of."""
    is_scaled = self.logprobs_mode == 'temperature' and self.temperature > 0
    return self.temperature if is_scaled else 1.0

  @property
  def is_masked(self) -> bool:
    """Whether the host says of each token which ones it may be."""
    return self.structured_outputs is not None

  @property
  def has_penalties(self) -> bool:
    """Whether a penalty changes the logits."""
    return any(getattr(self, name) != DEFAULTS[name] for name in _PENALTIES)

  @classmethod
  def from_dict(
    cls,
    fields: Mapping[str, Any],
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
        'fields.'
      )
    kept = {}
    said = {
      name: value
      for name, value in fields.items()
      if value is not None
      or not (name in FIELDS and FIELDS[name].none_is_default)
    }
    for name, value in {**defaults, **said}.items():
      if name in FIELDS:
        kept[name] = value
      elif name not in UNSUPPORTED:
        raise errors.InvalidRequestError(
          f'{errors.cut(str(name))}={errors.shown(value)}: unknown sampling '
          f'field; known: '
          f'{", ".join(sorted(FIELDS))}.'
        )
      elif value is not None and UNSUPPORTED[name] != (
        tuple(value) if isinstance(value, list) else value
      ):
        raise errors.UnsupportedError(
          f'{name}={errors.shown(value)}: this sampling field is not supported.'
        )
    return cls(**kept)

  @classmethod
  def defaults(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `defaults` for `from_dict`, whole, of decoded JSON.

    What this engine does not honour, and changes nothing, is left out.

    Raises:
      InvalidRequestError: see `from_dict`.
    """
    params = cls.from_dict(fields)
    return {name: getattr(params, name) for name in fields if name in FIELDS}


def _check(ok: bool, field: str, value: object, rule: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(f'{field}={errors.shown(value)}: {rule}.')


FIELDS: Mapping[str, Field] = {
  field.name: field.metadata['field']
  for field in dataclasses.fields(SamplingParams)
}
DEFAULTS: Mapping[str, Any] = {
  field.name: field.default for field in dataclasses.fields(SamplingParams)
}
_ADJUSTING = tuple(name for name, field in FIELDS.items() if field.adjusts)
_PENALTIES = tuple(name for name in _ADJUSTING if FIELDS[name].on_device)

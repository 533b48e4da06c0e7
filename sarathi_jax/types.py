# SPDX-License-Identifier: Apache-2.0
"""The values that pass between the layers. Frozen; standard library only.

What a user makes (`SamplingParams`, `Request`) validates itself. What the
engine makes by the hundred in every step (`Chunk`, `TokenEvent`, `OutputDelta`)
are named tuples, which take a third of a frozen dataclass's time to build.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import enum
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import structured_outputs

_T = TypeVar('_T')
SamplingParams = sampling_params.SamplingParams
StructuredOutputsParams = structured_outputs.StructuredOutputsParams
_DEFAULT_SAMPLING = SamplingParams()
TIERS = ('interactive', 'batch')
# Of a token that can't be sampled, where JSON tells it; vLLM's.
LEAST_LOGPROB = -9999.0


class FinishReason(enum.Enum):
  """Why a request ended. The values are what clients see."""

  STOP = 'stop'  # end of sequence, a stop token or a stop string
  LENGTH = 'length'  # max_tokens, or the end of the context
  ABORT = 'abort'  # by the client
  ERROR = 'error'  # by a fault in the engine, or logits that aren't finite


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Adapter:
  """A LoRA adapter that requests may ask for; two are never equal.

  Attributes:
    name: by which clients ask for it.
    generation: how many of this name there were before: what one left in the
      KV cache is of no use to another.
    matrices: what it adds to each matrix, see `runner.adapters.Matrices`.
  """

  name: str
  generation: int
  matrices: Any = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
  """One prompt to continue.

  Attributes:
    request_id: unique among its tenant's requests that are running or waiting.
    prompt_token_ids: token ids, at least one.
    sampling: how to choose the tokens.
    arrival_time: when it arrived, seconds on the engine's clock.
    tenant: the tenant it belongs to; '' where there is only one.
    client: the tenant's client that sent it; for fairness and for people.
    priority: requests of a smaller one begin first and are preempted last.
    deadline: when its result is of no use any more, seconds on the engine's
      clock; None for never.
    tier: 'interactive', or 'batch' if nobody watches the tokens come; see
      `EngineConfig.batch_tbt_slo_ms`.
    cache_salt: only requests of the same salt share pages of the KV cache: by
      their times they could tell what others asked.
    adapter: what the model is changed by, of `Engine.adapters`; None for the
      model as it is.
    key: unique among all requests that an engine has; the `request_id` of its
      chunks and deltas. By default the request's own.
    shown_token_ids: special tokens whose text is shown, though others' is not:
      marks by which a reply is read.
    grammar: that of `sampling.structured_outputs`, if it was compiled; see
      `Engine.prepared`.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  sampling: SamplingParams = _DEFAULT_SAMPLING
  arrival_time: float = 0.0
  tenant: str = ''
  client: str = ''
  priority: int = 0
  deadline: float | None = None
  tier: str = 'interactive'
  cache_salt: str = ''
  adapter: Adapter | None = None
  key: str = dataclasses.field(default='', repr=False, compare=False)
  shown_token_ids: tuple[int, ...] = ()
  grammar: Any = dataclasses.field(default=None, repr=False, compare=False)

  def __post_init__(self) -> None:
    if self.tier not in TIERS:
      raise errors.InvalidRequestError(
        f'tier={errors.shown(self.tier)}: must be one of {", ".join(TIERS)}.'
      )
    object.__setattr__(self, 'key', self.key or self.request_id)

  def key_of(self, index: int) -> str:
    """Returns the key of one of its `sampling.n` sequences."""
    return f'{self.key}/{index}' if index else self.key


class SlotSetup(NamedTuple):
  """What only the host knows of a sequence whose logits are adjusted.

  Attributes:
    tokens: all that the sequence has so far, prompt and output.
    end_ids: tokens that may not be sampled before `min_tokens` are.
    bad_words: the token ids of each.
  """

  tokens: tuple[int, ...]
  end_ids: tuple[int, ...] = ()
  bad_words: tuple[tuple[int, ...], ...] = ()


class Chunk(NamedTuple):
  """The tokens that one sequence contributes to one hybrid batch.

  Tokens [start, start + num_tokens) of the sequence are computed. A chunk
  that `samples` reaches the sequence's end, so what comes next is sampled.

  Attributes:
    request_id: the request's `key`; of several sequences of a request, the
      sequence's own (`Request.key_of`).
    slot: in [0, max_num_seqs), the sequence's own while it runs; the device
      keeps its last sampled token there.
    start: tokens of the sequence that are in the KV cache already.
    tokens: the token ids; empty if the one token is still on the device,
      sampled by a batch in flight (look-ahead).
    num_tokens: how many are computed: len(tokens), or 1 if that is empty; 0
      of a `Fork`.
    page_table: the pages of tokens [0, start + num_tokens), in order; of
      several groups of layers, one of each group for each place. For pages that
      were given back, as no token yet to be computed attends to them, there is
      any number. The same object is passed on until a page is added.
    is_prefill: whether this is part of a prefill (a recompute is, too).
    samples: how many tokens are sampled, one after each of its last tokens; 0
      for a part of a prefill that does not end it.
    prompt_len: tokens of the request's prompt.
    seed: of the request's random numbers, a signed 64-bit integer.
    sampling: how to choose the tokens.
    setup: with the first chunk of a sequence in its slot, if its logits are
      adjusted (`SamplingParams.is_adjusted`).
    next_token: the token of the prompt that follows the chunk, where the
      log-probabilities of the prompt are told; -1 where the prompt ends with
      the chunk; None where none are told.
    rope_len: what rotations by a length go by (`models.rope.tables`): that of
      the prompt, or the most that the sequence may come to.
    adapter: one more than the device's slot of the request's adapter; 0 for
      none.
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
  setup: SlotSetup | None = None
  next_token: int | None = None
  rope_len: int = 0
  adapter: int = 0


class TokenLogprobs(NamedTuple):
  """The log-probabilities of several tokens at one position.

  Attributes:
    token_ids: the token that is there; then the likeliest ones, as many as are
      asked for, the likeliest first, of equal ones the lower id; then those of
      `SamplingParams.logprob_token_ids`. So an id may be there twice.
    logprobs: of each (natural logarithm); minus infinity for a token that could
      not be sampled. See `SamplingParams.logprobs_mode`.
    rank: how many tokens are at least as likely as the one that is there,
      itself included: 1 for the likeliest.
  """

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  rank: int

  @property
  def logprob(self) -> float:
    """The log-probability of the token that is there."""
    return self.logprobs[0]

  def plain(self) -> dict[str, Any]:
    """Returns the fields for JSON, where minus infinity is LEAST_LOGPROB."""
    logprobs = [max(logprob, LEAST_LOGPROB) for logprob in self.logprobs]
    return {**self._asdict(), 'logprobs': logprobs}


Told = tuple[TokenLogprobs, ...]  # of consecutive tokens


class Fork(NamedTuple):
  """A sequence that begins where a chunk ends: one more sample after it.

  Attributes:
    row: which chunk of the batch; it ends a prefill.
    chunk: the sequence's own, of no tokens.
  """

  row: int
  chunk: Chunk


class ScheduledBatch(NamedTuple):
  """One step: every ready decode, then chunks of prefills.

  Attributes:
    step: the number of the batch, from 0.
    chunks: its chunks, decodes first.
    num_tokens: the sum over chunks; at most the step's limit.
    preempted: keys of requests whose pages were taken back to make this batch.
    forks: sequences that begin at the ends of its prefills.
    copies: pages (from, to) to copy before it is computed, in order.
    loads: adapters to put into slots before it is computed.
  """

  step: int
  chunks: tuple[Chunk, ...]
  num_tokens: int
  preempted: tuple[str, ...] = ()
  forks: tuple[Fork, ...] = ()
  copies: tuple[tuple[int, int], ...] = ()
  loads: tuple[tuple[int, Adapter], ...] = ()

  @property
  def samplers(self) -> tuple[Chunk, ...]:
    """All that may sample: the chunks, and those of the forks after them."""
    if not self.forks:
      return self.chunks
    return (*self.chunks, *(fork.chunk for fork in self.forks))

  @property
  def size(self) -> int:
    """The tokens of a step that holds it, which has as many samples."""
    if not self.forks:
      return self.num_tokens
    return max(self.num_tokens, sum(c.samples for c in self.samplers))


class Sampled(NamedTuple):
  """The samples of a batch: any number of tokens for each chunk.

  Attributes:
    tokens: token ids, in the order of the sequence.
    logprobs: log-probabilities of the tokens (natural logarithm, see
      `SamplingParams.logprobs_mode`); NaN where logits were not finite, so no
      token could be sampled.
    told: of each token what `SamplingParams.logprobs` asks for, () for chunks
      that do not; None if none does.
    prompts: of each chunk with a `next_token`, its tokens' successors in the
      prompt, () for the others; None if none has one.
  """

  tokens: list[tuple[int, ...]]
  logprobs: list[tuple[float, ...]]
  told: list[Told] | None = None
  prompts: list[Told] | None = None

  @property
  def tells(self) -> bool:
    """Whether more is told than tokens and their log-probabilities."""
    return self.told is not None or self.prompts is not None

  @classmethod
  def of(
    cls,
    chunks: Iterable[Chunk],
    tokens: Iterable[int],
    logprobs: Iterable[float],
  ) -> Sampled:
    """Distributes sampled values among the chunks, in order."""
    counts = [chunk.samples for chunk in chunks]
    return cls(_shared_out(counts, tokens), _shared_out(counts, logprobs))


def _shared_out(
  counts: list[int], values: Iterable[_T]
) -> list[tuple[_T, ...]]:
  ones = zip(values)  # The fastest way to make tuples of one.
  return [
    next(ones) if n == 1 else tuple(x for (x,) in islice(ones, n))
    for n in counts
  ]


class TokenEvent(NamedTuple):
  """The tokens that a request gained in a step, one or more.

  With FinishReason.ERROR it gained none, as a token could not be sampled.
  `told` and `prompt_logprobs` are `OutputDelta`'s.
  """

  request_id: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason | None
  told: Told = ()
  prompt_logprobs: Told | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
  """Measurements of a finished request, or output. Times are seconds.

  Attributes:
    num_prompt_tokens: length of the prompt.
    num_cached_tokens: how many of these were found in the KV cache.
    num_output_tokens: tokens generated.
    num_preemptions: how often its pages were taken back.
    scheduling_delay_s: from arrival to its first chunk's schedule.
    ttft_s: from arrival to the first token; None without one.
    tpot_s: mean time between tokens; None with fewer than two.
    e2e_s: from arrival to the end.
    max_tbt_s: the longest time between two tokens; None with fewer than two.
  """

  num_prompt_tokens: int
  num_cached_tokens: int = 0
  num_output_tokens: int
  num_preemptions: int
  scheduling_delay_s: float | None
  ttft_s: float | None
  tpot_s: float | None
  e2e_s: float
  max_tbt_s: float | None


class VersionSpan(NamedTuple):
  """Tokens behind one another that the same weights gave.

  Attributes:
    version: of the weights, see `Engine.weight_version`.
    num_tokens: how many.
  """

  version: int
  num_tokens: int


class OutputDelta(NamedTuple):
  """The output that one request gained in one step, or one of its several.

  Attributes:
    request_id: the request's `key`.
    text: the text that may be shown now: whole characters only, and nothing
      that may yet turn out to be a stop string.
    token_ids: new tokens, those of a matched stop string included.
    logprobs: log-probabilities of those tokens.
    finish_reason: None while it goes on.
    stop_reason: the stop token id or stop string that ended it, if any; None
      for the model's own end of sequence.
    metrics: with the last delta only.
    told: of each new token, if `SamplingParams.logprobs` or `logprob_token_ids`
      asks for it; else ().
    prompt_logprobs: with the first delta only: of each token of the prompt but
      the first, if `SamplingParams.prompt_logprobs` asks for it.
    output_index: which of the request's outputs it is of.
    num_left: with the last delta of an output: how many of the others go on.
    versions: of the weights that the tokens were sampled by, in their order; ()
      if they are the first that the engine had.
  """

  request_id: str
  text: str
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason | None = None
  stop_reason: int | str | None = None
  metrics: RequestMetrics | None = None
  told: Told = ()
  prompt_logprobs: Told | None = None
  output_index: int = 0
  num_left: int = 0
  versions: tuple[VersionSpan, ...] = ()

  @property
  def ends_request(self) -> bool:
    """Whether it is the last delta of its request."""
    return self.finish_reason is not None and not self.num_left

  def with_version(self, version: int) -> OutputDelta:
    """Returns it with the version of the weights that gave its tokens."""
    if not self.token_ids:
      return self
    return self._replace(versions=(VersionSpan(version, len(self.token_ids)),))


def versions_of(deltas: Iterable[OutputDelta]) -> tuple[VersionSpan, ...]:
  """Returns the versions of the tokens of an output's deltas, in order."""
  found: list[VersionSpan] = []
  for delta in deltas:
    spans = delta.versions or (VersionSpan(0, len(delta.token_ids)),)
    for version, num in spans:
      if found and found[-1].version == version:
        found[-1] = VersionSpan(version, found[-1].num_tokens + num)
      elif num:
        found.append(VersionSpan(version, num))
  return tuple(found)


class ToolCall(NamedTuple):
  """A call of a tool, or what one gained.

  Attributes:
    number: its place among the calls of a reply, from 0.
    id: what a tool's message answers to; '' in all pieces but the first.
    name: the tool's; '' in all pieces but the first.
    arguments: a JSON object, as the model wrote it; as much of it as it wrote.
  """

  number: int
  id: str
  name: str
  arguments: str


class Reply(NamedTuple):
  """What the reply to a chat says, or what it gained.

  Attributes:
    content: text for the user.
    reasoning: what the model wrote for itself before.
    tool_calls: the calls, in order.
  """

  content: str = ''
  reasoning: str = ''
  tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
  """The whole output of a finished request, or one of its several.

  Attributes:
    request_id: of the request.
    index: which of the request's outputs.
    prompt_token_ids: the prompt.
    token_ids: the generated tokens.
    logprobs: their log-probabilities (natural logarithm, see
      `SamplingParams.logprobs_mode`).
    text: the generated text, '' without a tokenizer.
    finish_reason: why it ended.
    stop_reason: see `OutputDelta`.
    metrics: its measurements.
    told, prompt_logprobs: see `OutputDelta`.
    reply: what `text` says, told apart; of `LLM.chat` alone.
    versions: of the weights that its tokens were sampled by, in their order;
      () without a token.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  text: str
  finish_reason: FinishReason
  stop_reason: int | str | None
  metrics: RequestMetrics
  told: Told = ()
  prompt_logprobs: Told | None = None
  reply: Reply | None = None
  index: int = 0
  versions: tuple[VersionSpan, ...] = ()

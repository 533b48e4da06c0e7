# SPDX-License-Identifier: Apache-2.0
"""What one server takes on: the one table of all that a client can size.

A row is a field of `Limits`: its default, what it bounds, why, and the fields
of messages whose entries it counts. The server's flags and their help, the
errors and the check of a message before it is parsed are all made of it.
Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax import types

# A text whose tokens are longer on average is none: English has 4 to 5
# characters a token, indented code up to 8.
_CHARS_PER_TOKEN = 16
# Takes some 30 ms to tokenize, without the interpreter.
_LEAST_PROMPT_CHARS = 65_536


def _row(
  default: Any,
  what: str,
  why: str = '',
  *,
  least: float = 1,
  counts: tuple[str, ...] = (),
) -> Any:
  return dataclasses.field(
    default=default,
    metadata={'what': what, 'why': why, 'least': least, 'counts': counts},
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
  """What one server takes on. Beyond it, requests are refused at once.

  The attributes, their defaults and reasons are the rows below.

  Raises:
    ConfigError: a value is below the least that makes sense.
  """

  max_waiting: int = _row(
    1024,
    'requests that wait to begin, those of several outputs as so many',
    "each holds its prompt, and what can't be served soon is best refused",
  )
  max_waiting_tokens: int | None = _row(
    None,
    'tokens of the prompts that wait',
    'a few long prompts hold as much memory as many short ones. Default: no '
    'bound',
  )
  max_outbox: int = _row(
    4096,
    'pieces of output that may wait for one slow client',
    'they are kept until it reads them',
  )
  stream_interval_ms: int = _row(
    0,
    'milliseconds, at the least, between two messages of a stream',
    "tokens in between are merged, as most of a token's cost is its message",
    least=0,
  )
  max_message_mib: float = _row(
    16.0,
    'MiB of a message',
    'it is copied whole before it is looked at',
    least=0.001,
  )
  max_fields: int = _row(
    2**16,
    'fields of a message, counting those of its parts',
    'counting one takes 0.4 us of Python, parsing it 0.1 us',
  )
  max_numbers: int = _row(
    2**20,
    'numbers in the lists of a message',
    'parsing a million takes 5 ms; a prompt may have as many token ids',
  )
  max_parameters: int = _row(
    1024,
    'entries in the maps of a message',
    'parsing one holds the interpreter for 0.4 us',
  )
  max_prompt_tokens: int | None = _row(
    None,
    'tokens of a prompt',
    "the engine's thread copies them once more. Default: as many as the model "
    'takes',
  )
  max_prompt_chars: int | None = _row(
    None,
    'characters of a prompt, or of all messages of a chat; by '
    f'default {_CHARS_PER_TOKEN} for each token that a prompt may have, and '
    f'at least {_LEAST_PROMPT_CHARS:,}',
    'tokenizing a million takes a core for up to 1 s',
  )
  max_messages: int = _row(
    2**14,
    'messages of a chat',
    'a template takes some 3 us for each, in Python',
    counts=('sarathi.v1.Chat.messages',),
  )
  max_tools: int = _row(
    128,
    'tools of a chat',
    "each is written into the prompt; OpenAI's limit",
  )
  max_tool_chars: int = _row(
    2**18,
    'characters of all tools of a chat, or of its chat_template_kwargs',
    'a template writes them in Python',
  )
  max_tool_levels: int = _row(
    64,
    'levels of objects and lists in a tool',
    'what writes and what checks them calls itself for each',
  )
  max_n: int = _row(
    128,
    'outputs of a prompt',
    'each is a sequence of its own to the engine, and waits as one',
  )
  max_n_tokens: int = _row(
    2**21,
    'tokens of a prompt, times its outputs',
    "each output has a list of its own, and counts the prompt's pages: the "
    "engine's thread takes 10 ms for a million",
  )
  max_stops: int = _row(
    128,
    'stop strings',
    'each is looked for after each token',
    counts=(
      'sarathi.v1.SamplingParams.stop',
      'vllm.grpc.engine.SamplingParams.stop',
    ),
  )
  max_stop_chars: int = _row(
    4096,
    'characters of all stop strings',
    'output is held back while it may be the beginning of one',
  )
  max_stop_token_ids: int = _row(
    1024,
    'stop token ids',
    "the engine's thread makes a set of them",
    counts=(
      'sarathi.v1.SamplingParams.stop_token_ids',
      'vllm.grpc.engine.SamplingParams.stop_token_ids',
    ),
  )
  max_adjusted_token_ids: int = _row(
    1024,
    'token ids to bias, to allow, to rule out or to tell of',
    'the device is told of each when its request begins',
    counts=(
      'sarathi.v1.SamplingParams.allowed_token_ids',
      'sarathi.v1.SamplingParams.bad_token_ids',
      'sarathi.v1.SamplingParams.logprob_token_ids',
    ),
  )
  max_bad_words: int = _row(
    64,
    'bad words',
    'each is tokenized twice, and looked for at each token',
    counts=('sarathi.v1.SamplingParams.bad_words',),
  )
  max_bad_word_chars: int = _row(
    4096, 'characters of all bad words', 'they are tokenized'
  )
  max_prompt_logprobs: int = _row(
    2**16,
    'log-probabilities of a prompt, 1 + prompt_logprobs for each token',
    'each is kept until the prompt is computed, and takes up to 40 bytes of a '
    'response',
  )
  max_logprobs: int = _row(
    2**19,
    'log-probabilities of all outputs, n times max_tokens times 1 + logprobs + '
    'logprob_token_ids; and of an HTTP response as a whole, with its prompts',
    'each is kept until a client has it, and takes up to 80 bytes and 10 us of '
    'a response. Where max_tokens is not given, outputs end there',
  )
  max_echoed_chars: int = _row(
    2**23,
    'characters of prompts in a response, where each output has them: echo and '
    'text_input, and a token id of return_token_ids as 8',
    'they are written in Python, 1 us for an id, and kept until a client has '
    'them',
  )
  max_choices: int = _row(
    4096,
    'texts of which an output is to be one',
    'each is a part of its grammar',
    counts=(
      'sarathi.v1.StructuredOutputs.choice',
      'vllm.grpc.engine.ChoiceConstraint.choices',
    ),
  )
  max_grammar_chars: int = _row(
    32_768,
    'characters of a schema, of choices, of a regular expression or a grammar; '
    f'at most {structured_outputs.MOST_CHARS}',
    'compiling them takes a core for up to 0.1 s',
  )
  max_id_chars: int = _row(
    256,
    'characters of an id or a name, of a request or a client',
    'it is in each message of a stream, in logs and in errors',
  )
  max_abort_ids: int = _row(
    1024,
    'requests that one call aborts',
    "the engine's thread looks each of them up",
    counts=(
      'sarathi.v1.AbortRequest.request_ids',
      'vllm.grpc.engine.AbortRequest.request_ids',
    ),
  )
  max_tensors: int = _row(
    64,
    'tensors of a request, in or out',
    'each is read in Python; the model takes and gives 39',
    counts=(
      'inference.ModelInferRequest.inputs',
      'inference.ModelInferRequest.outputs',
      'inference.ModelInferRequest.raw_input_contents',
    ),
  )
  max_elements: int = _row(
    1024,
    'elements of a tensor, but for input_ids',
    'each becomes an object of Python',
  )
  max_dims: int = _row(
    8,
    'dimensions of a tensor',
    'multiplying their sizes takes time by the square of their number',
  )
  max_json_chars: int = _row(
    65_536,
    'characters of JSON within a message, as in sampling_parameters',
    'decoding it holds the interpreter',
  )
  max_prompts: int = _row(
    1024,
    'prompts of one HTTP request',
    'each is a request of its own to the queue, and takes a task',
  )
  max_connections: int = _row(
    4096,
    'HTTP connections at once',
    'each takes an open file and up to 128 KiB of buffers',
  )
  max_pipelined: int = _row(
    8,
    'requests that wait on an HTTP connection for the one before them',
    'each is kept whole, and 256 KiB, which come at once, may be 14,000. More '
    'are not answered, and their connection is closed after the others',
  )
  max_escapes: int = _row(
    2**20,
    'backslashes in an HTTP body',
    'reading a million characters that are escaped by them holds the '
    'interpreter for up to 30 ms',
  )
  max_bodies_mib: float = _row(
    256.0,
    'MiB of the HTTP bodies that are being read',
    'each is kept until it is whole, however slowly it comes',
    least=0.001,
  )
  max_stream_requests: int = _row(
    1024,
    'requests at once of one stream',
    'each takes a task and the memory of its prompt; the next is read when one '
    'ends',
  )
  max_kv_subscribers: int = _row(
    16,
    'calls at once that are told what the KV cache holds',
    'each may hold on to a list of all its pages',
  )
  max_kv_history: int = _row(
    2**16,
    'changes of the KV cache that are kept for who is told of them',
    'each has the tokens of a page; who falls further behind starts anew',
  )
  max_trace_s: float = _row(
    600.0, 'seconds of a trace', 'its events stay in memory until its end'
  )
  max_profile_steps: int = _row(
    1000, 'steps of a profile', 'each adds megabytes to it'
  )

  def __post_init__(self) -> None:
    for row in dataclasses.fields(self):
      value, least = getattr(self, row.name), row.metadata['least']
      if value is not None and not value >= least:
        raise errors.ConfigError(f'{row.name}={value!r}: must be >= {least}.')
    if self.max_message_mib >= 2048:
      raise errors.ConfigError(
        f'max_message_mib={self.max_message_mib!r}: must be below 2048.'
      )

  def check(
    self, name: str, value: int, field: str, at_most: int | None = None
  ) -> None:
    """Refuses a value that is larger than its row allows.

    Args:
      name: the row's.
      value: how many there are.
      field: where they are, as the client calls it.
      at_most: the bound, where it is not the row's value.

    Raises:
      InvalidRequestError: there are more than the row says.
    """
    bound = getattr(self, name) if at_most is None else at_most
    if bound is not None and value > bound:
      raise errors.InvalidRequestError(
        f'{field}: has {value:,} {_short(name)}: must be at most '
        f'{name}={bound}.'
      )

  def check_so_far(self, name: str, num_counted: int, field: str) -> None:
    """Refuses what was counted so far, where nobody goes on to count."""
    bound = getattr(self, name)
    if num_counted > bound:
      raise errors.InvalidRequestError(
        f'{field}: has too many {_short(name)}: must be at most {name}={bound}.'
      )

  def check_name(self, field: str, value: str) -> None:
    """Refuses ids and names that are too long."""
    self.check('max_id_chars', len(value), field)

  def check_sampling(self, sampling: types.SamplingParams) -> None:
    """Refuses sampling with too many strings and token ids to look for."""
    # More than may wait would never find room.
    self.check('max_n', sampling.n, 'n', min(self.max_n, self.max_waiting))
    self.check('max_stops', len(sampling.stop), 'stop')
    self.check('max_stop_chars', sum(map(len, sampling.stop)), 'stop')
    self.check(
      'max_stop_token_ids', len(sampling.stop_token_ids), 'stop_token_ids'
    )
    self.check('max_bad_words', len(sampling.bad_words), 'bad_words')
    self.check(
      'max_bad_word_chars', sum(map(len, sampling.bad_words)), 'bad_words'
    )
    outputs = sampling.structured_outputs
    if outputs is not None:
      field = outputs.named(outputs.kind)
      self.check('max_choices', len(outputs.choice or ()), field)
      self.check('max_grammar_chars', outputs.num_chars, field)
    for field in ('logit_bias', 'allowed_token_ids', 'bad_token_ids'):
      ids = getattr(sampling, field) or ()
      self.check('max_adjusted_token_ids', len(ids), field)

  def check_prompt_logprobs(self, request: types.Request) -> None:
    """Refuses a prompt of which too much is to be told."""
    num = num_prompt_logprobs(request)
    self.check('max_prompt_logprobs', num, 'prompt_logprobs')

  def check_logprobs(
    self, sampling: types.SamplingParams, max_model_len: int
  ) -> None:
    """Refuses outputs of which too much is to be told, if it says how long."""
    if sampling.max_tokens is not None:
      num = num_logprobs(sampling, max_model_len)
      self.check('max_logprobs', num, 'logprobs')

  def ended(self, request: types.Request, room: int) -> types.Request:
    """Has outputs end before too much is told, where nobody says when.

    Args:
      request: the request.
      room: tokens that an output may have.
    """
    sampling = request.sampling
    num = num_logprobs(sampling, room)
    if sampling.max_tokens is not None or num <= self.max_logprobs:
      return request
    most = max(self.max_logprobs // (num // room), 1)
    return dataclasses.replace(
      request, sampling=dataclasses.replace(sampling, max_tokens=most)
    )

  def check_prompt_tokens(self, num_tokens: int, max_model_len: int) -> None:
    """Refuses a prompt that is too long for the server, or for its model."""
    self.check('max_prompt_tokens', num_tokens, 'prompt')
    if num_tokens >= max_model_len:
      raise errors.InvalidRequestError(
        f'prompt: has {num_tokens} tokens, which leaves no room to generate; '
        f'max_model_len={max_model_len}.'
      )

  def check_counted(self, num_tokens: int, max_model_len: int) -> None:
    """Refuses a prompt of more tokens than are listed for who counts them.

    It may be too long to be served, which is what its client wants to know.
    """
    most = max(2 * max_model_len, _LEAST_PROMPT_CHARS)
    if num_tokens > most:
      raise errors.InvalidRequestError(
        f'prompt: has {num_tokens:,} tokens: must be at most {most:,}; '
        f'max_model_len={max_model_len}.'
      )

  def check_n_tokens(self, request: types.Request) -> None:
    """Refuses a long prompt of many outputs."""
    n = request.sampling.n
    if n > 1:
      num = n * len(request.prompt_token_ids)
      self.check('max_n_tokens', num, f'n={n}')

  def check_prompt_chars(self, num_chars: int, max_model_len: int) -> None:
    """Refuses a text that must not even be tokenized."""
    self.check(
      'max_prompt_chars',
      num_chars,
      'prompt',
      self.max_prompt_chars
      or max(
        _CHARS_PER_TOKEN
        * min(self.max_prompt_tokens or max_model_len, max_model_len),
        _LEAST_PROMPT_CHARS,
      ),
    )


def num_logprobs(sampling: types.SamplingParams, room: int) -> int:
  """Counts the log-probabilities that may be told of outputs.

  Args:
    sampling: of the request.
    room: tokens that an output may have.
  """
  if not sampling.tells:
    return 0
  named = sampling.logprob_token_ids or ()
  each = 1 + (sampling.logprobs or 0) + len(named)
  return sampling.n * each * min(sampling.max_tokens or room, room)


def num_prompt_logprobs(request: types.Request) -> int:
  """Counts the log-probabilities that are told of a request's prompt."""
  num_top = request.sampling.prompt_logprobs
  if num_top is None:
    return 0
  return len(request.prompt_token_ids) * (1 + num_top)


def without() -> Limits:
  """Returns limits that nothing exceeds but messages of gRPC."""
  rows = (row.name for row in dataclasses.fields(Limits))
  unbound: dict[str, Any] = dict.fromkeys(rows, math.inf)
  return Limits(
    **{**unbound, 'max_message_mib': ROWS['max_message_mib'].default}
  )


ROWS: Mapping[str, dataclasses.Field[Any]] = {
  row.name: row for row in dataclasses.fields(Limits)
}
# Repeated field of a message -> the row that bounds its entries.
COUNTED: Mapping[str, str] = {
  field: name for name, row in ROWS.items() for field in row.metadata['counts']
}


def _short(name: str) -> str:
  return str(ROWS[name].metadata['what']).partition(';')[0].partition(',')[0]


def help_of(name: str) -> str:
  """Returns the help of the flag for a row."""
  row = ROWS[name]
  text = (
    row.metadata['what']
    if name == 'stream_interval_ms'
    else (f'The most {row.metadata["what"]}')
  )
  default = '' if row.default is None else f' Default: {row.default}.'
  return f'{text[0].upper()}{text[1:]}: {row.metadata["why"]}.{default}'

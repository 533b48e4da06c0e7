# SPDX-License-Identifier: Apache-2.0
"""What an engine's tokens must be: those of recomputing all for each one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import state
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import sampling as sampling_lib
from sarathi_jax.text import collector
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import sampling_oracle

GREEDY = types.SamplingParams(temperature=0, max_tokens=20)
SEEDED = (
  types.SamplingParams(temperature=0.9, max_tokens=20, seed=2**62 + 1),
  types.SamplingParams(temperature=1.3, top_k=20, seed=-2, max_tokens=14),
  types.SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=17),
  types.SamplingParams(
    temperature=1.1, min_p=0.05, top_k=40, top_p=0.95, seed=4, max_tokens=9
  ),
)

# All that adjusts logits at once, and few tokens, so that it does often. Words
# are those of `make_tokenizer`.
_FEW = (3, 8, 13, 21, 34, 40, 55, 60, 77, 89, 92)
ADJUSTED = tuple(
  types.SamplingParams(
    max_tokens=24,
    min_tokens=min_tokens,
    stop_token_ids=(13, 55, 92),
    repetition_penalty=1.4,
    presence_penalty=0.7,
    frequency_penalty=frequency_penalty,
    logit_bias={3: 0.5, 8: -1.0, 21: 1.5, 96: 100.0},
    allowed_token_ids=_FEW,
    bad_token_ids=(40,),
    bad_words=(
      't60',
      *(f't{a} t{b}' for a in _FEW[::2] for b in _FEW[::3]),
      *(f't{a} t{a} t{b}' for a in _FEW for b in _FEW[1::3]),
    ),
    **rest,
  )
  for min_tokens, frequency_penalty, rest in (
    (15, 0.2, dict(temperature=0)),
    (9, -0.4, dict(temperature=1.2, seed=2**40 + 1)),
    (20, 0.1, dict(temperature=0.9, seed=5, top_k=7, top_p=0.95, min_p=0.02)),
  )
)
# And one thing alone.
ALONE = (
  types.SamplingParams(temperature=0, max_tokens=20, frequency_penalty=1.5),
  types.SamplingParams(temperature=0, max_tokens=20, repetition_penalty=3.0),
  types.SamplingParams(seed=8, max_tokens=20, presence_penalty=-2.0),
  types.SamplingParams(seed=9, max_tokens=20, logit_bias={5: 4.0}),
)

# What outputs may be -> which tokens may come after some; none: it is over. The
# tokens are those of `make_tokenizer`.
_CHOICES = 't1t2t3', 't1t5', 't4t6t8t2t2', 't7t9'
_OTHERS = 't[1-9][0-9]?'  # All but the first.


def _may_be(choices: Sequence[str], output: Sequence[int]) -> set[int]:
  text = ''.join(f't{i}' for i in output)
  rests = [c[len(text) :] for c in choices if c.startswith(text)]
  return {int(rest.split('t')[1]) for rest in rests if rest}


def _some_others(output: Sequence[int], least: int, most: int) -> set[int]:
  if 0 in output:
    return set()
  return {
    *(range(1, 97) if len(output) < most else ()),
    *([0] if len(output) >= least else ()),
  }


_REGEX, _OPEN, _CHOICE = (
  types.StructuredOutputsParams(**said)
  for said in (
    {'regex': f'({_OTHERS}){{6,14}}t0'},
    {'regex': f'({_OTHERS})+'},
    {'choice': _CHOICES},
  )
)
ALLOWED = {
  _REGEX: functools.partial(_some_others, least=6, most=14),
  # Where the grammar may end, so may the request by a stop token.
  _OPEN: functools.partial(_some_others, least=1, most=99),
  _CHOICE: functools.partial(_may_be, _CHOICES),
}
STRUCTURED = (
  types.SamplingParams(
    seed=11, temperature=1.5, max_tokens=20, structured_outputs=_REGEX
  ),
  types.SamplingParams(
    temperature=0, max_tokens=20, structured_outputs=_CHOICE
  ),
  types.SamplingParams(
    seed=2**41,
    max_tokens=20,
    stop_token_ids=(0,),
    logit_bias={0: 3.0},
    min_tokens=3,
    structured_outputs=_OPEN,
  ),
  types.SamplingParams(
    temperature=0,
    max_tokens=12,
    repetition_penalty=1.6,
    structured_outputs=_REGEX,
  ),
)

Tokens = tuple[list[int], list[float]]  # ids, log-probabilities


def make_requests(
  vocab_size: int,
  prompt_lens: Sequence[int],
) -> list[types.Request]:
  """Two of each length, one greedy, one seeded."""
  rng = np.random.default_rng(0)
  return [
    types.Request(
      request_id=f'{name}-{i}',
      sampling=params,
      prompt_token_ids=tuple(rng.integers(0, vocab_size, n).tolist()),
    )
    for i, n in enumerate(prompt_lens)
    for name, params in (('greedy', GREEDY), ('seeded', SEEDED[i % 4]))
  ]


def make_adjusted(
  vocab_size: int,
  prompt_lens: Sequence[int],
) -> list[types.Request]:
  """Four of each length: logits adjusted by all or one, a grammar, nothing."""
  return [
    types.Request(
      request_id=f'{name}-{i}',
      prompt_token_ids=request.prompt_token_ids,
      sampling=sampling,
    )
    for i, request in enumerate(make_requests(vocab_size, prompt_lens)[::2])
    for name, sampling in (
      ('all', ADJUSTED[i % len(ADJUSTED)]),
      ('none', SEEDED[i % len(SEEDED)]),
      ('one', ALONE[i % len(ALONE)]),
      ('grammar', STRUCTURED[i % len(STRUCTURED)]),
    )
  ]


def make_several(
  vocab_size: int, prompt_lens: Sequence[int], most: int
) -> list[types.Request]:
  """Requests of several outputs each, up to `most`.

  Of some they are adjusted, of some each follows a grammar.
  """
  adjusted = ADJUSTED[1], ADJUSTED[2], ALONE[2], ALONE[3]
  return [
    types.Request(
      request_id=f'{name}-{i}',
      prompt_token_ids=request.prompt_token_ids,
      sampling=dataclasses.replace(
        sampling[i % len(sampling)], n=1 + (most - 1 - i) % most, seed=100 * i
      ),
    )
    for i, request in enumerate(make_requests(vocab_size, prompt_lens)[::2])
    for name, sampling in (
      ('plain', SEEDED),
      ('adjusted', adjusted),
      ('grammar', STRUCTURED[::2]),
    )
  ]


def make_alike(
  vocab_size: int, prompt_lens: Sequence[int]
) -> list[types.Request]:
  """As `make_requests`, of prompts that begin with the same 20 tokens."""
  rng = np.random.default_rng(1)
  beginning = tuple(rng.integers(0, vocab_size, 20).tolist())
  return [
    dataclasses.replace(
      request,
      prompt_token_ids=beginning[: len(request.prompt_token_ids)]
      + request.prompt_token_ids[20:],
    )
    for request in make_requests(vocab_size, prompt_lens)
  ]


def apart(requests: Sequence[types.Request]) -> list[types.Request]:
  """For each output of requests, a request of its own, named as it is."""
  return [
    dataclasses.replace(
      r,
      request_id=r.key_of(i),
      sampling=dataclasses.replace(
        r.sampling, n=1, seed=(r.sampling.seed or 0) + i
      ),
      key='',
    )
    for r in requests
    for i in range(r.sampling.n)
  ]


def make_tokenizer(vocab_size: int) -> tokenizer_lib.Tokenizer:
  """Text is words 't0', 't1', ..., each the token of its number."""
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {f't{i}': i for i in range(vocab_size)}, unk_token='t0'
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return tokenizer_lib.Tokenizer.copy_of(words)


def hidden_of(
  model: model_config_lib.ModelConfig, params: Any, tokens: jax.Array
) -> jax.Array:
  """The hidden states after all layers, without a cache."""
  hidden, _ = models.forward(
    model,
    params,
    [None] * model.num_layers,
    tokens,
    jnp.arange(len(tokens), dtype=jnp.int32),
    None,
    models.causal_attend,
  )
  return hidden


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(
  model: model_config_lib.ModelConfig, params: Any, tokens: Any, length: Any
) -> jax.Array:
  hidden = hidden_of(model, params, tokens)
  return models.unembed(model, params, hidden[length - 1][None])[0]


@jax.jit
def _sample(*row: Any) -> jax.Array:
  output, _ = sampling_lib.sample(*(field[None] for field in row))
  return output.tokens[0]


def recompute(
  model: model_config_lib.ModelConfig,
  params: Any,
) -> Callable[[types.Request], Tokens]:
  """Continues a prompt by recomputing everything for each token."""
  max_len = model.max_position_embeddings

  def run(request: types.Request) -> Tokens:
    tokens = list(request.prompt_token_ids)
    num_prompt = len(tokens)
    s = request.sampling
    bad_words = [
      [int(token[1:]) for token in word.split()] for word in s.bad_words
    ]
    logprobs = []
    allowed = ALLOWED.get(s.structured_outputs)
    for _ in range(min(s.max_tokens, max_len - len(tokens))):
      padded = np.zeros(max_len, np.int32)
      padded[: len(tokens)] = tokens
      # NumPy does the little things, which would each be a program of JAX.
      logits = np.asarray(
        _next_logits(model, params, padded, np.int32(len(tokens)))
      )
      adjusted = logits
      if allowed is not None:
        ids = sorted(allowed(tokens[num_prompt:]))
        if not ids:
          break
        adjusted = np.full_like(logits, -np.inf)
        adjusted[ids] = logits[ids]
      if s.is_adjusted:
        adjusted = sampling_oracle.adjust(
          adjusted, s, tokens[:num_prompt], tokens[num_prompt:], bad_words
        ).astype(np.float32)
      token = _sample(
        adjusted,
        np.float32(s.temperature),
        np.int32(s.top_k),
        np.float32(s.top_p),
        np.float32(s.min_p),
        np.array([s.seed or 0], np.int64).view(np.int32),
        np.int32(len(tokens)),
      )
      tokens.append(int(token))
      logprobs.append(float(sampling_oracle.log_softmax(logits)[tokens[-1]]))
      if tokens[-1] in s.stop_token_ids:
        break
    return tokens[num_prompt:], logprobs

  return run


def make_engine(
  runner: Any, *, vocab_size: int, policy: str = 'sarathi', **limits: Any
) -> tuple[engine_lib.Engine, scheduler_lib.Scheduler]:
  """Makes an engine around `runner`.

  Args:
    runner: computes; it may be used by several engines, one by one.
    vocab_size: of the model.
    policy: of the scheduler.
    **limits: of its SchedulerConfig.
  """
  config = config_lib.SchedulerConfig(**limits)
  scheduler = scheduler_lib.POLICIES[policy](config)
  engine = engine_lib.Engine(
    scheduler,
    runner,
    info=engine_lib.EngineInfo.of(config, policy=policy, vocab_size=vocab_size),
    tokenizer=make_tokenizer(vocab_size),
  )
  return engine, scheduler


def finish(
  engine: engine_lib.Engine, requests: Sequence[types.Request]
) -> dict[str, types.Completion]:
  """Runs requests, all added at once; returns outputs by their keys."""
  for request in requests:
    engine.add(request)
  named = {r.request_id: r for r in requests}
  collected = {r.request_id: collector.Collector(r) for r in requests}
  done: dict[str, types.Completion] = {}
  while engine.has_work:
    for delta in engine.step():
      for completion in collected[delta.request_id].add(delta):
        done[named[delta.request_id].key_of(completion.index)] = completion
  stats = engine.stats()
  assert stats.num_free_pages == stats.num_pages
  return done


def complete(
  runner: Any, requests: Sequence[types.Request], **options: Any
) -> tuple[dict[str, types.Completion], state.EngineStats]:
  """Runs requests on an engine of their own; see `make_engine`."""
  engine, _ = make_engine(runner, **options)
  return finish(engine, requests), engine.stats()


def run_engine(
  runner: Any, requests: Sequence[types.Request], **options: Any
) -> tuple[dict[str, Tokens], state.EngineStats]:
  """Runs requests as `complete` does; returns their tokens."""
  done, stats = complete(runner, requests, **options)
  return tokens_of(done), stats


def tokens_of(done: dict[str, types.Completion]) -> dict[str, Tokens]:
  return {
    name: (list(c.token_ids), list(c.logprobs)) for name, c in done.items()
  }


def assert_same(got: dict[str, Tokens], expected: dict[str, Tokens]) -> None:
  """The same tokens, with the same probabilities but for rounding."""
  assert got.keys() == expected.keys()
  for request_id, (tokens, logprobs) in expected.items():
    assert got[request_id][0] == tokens, request_id
    np.testing.assert_allclose(got[request_id][1], logprobs, atol=2e-4)

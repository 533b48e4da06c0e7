# SPDX-License-Identifier: Apache-2.0
"""Samples tokens on the device.

The random numbers of a token are those of `fold_in(fold_in(key, seed),
position)`. The high half of the seed's 64 bits makes the key, and the low half
is folded in. So a request's tokens depend on its seed alone, and not on its
batch, chunks, preemptions or parallelism.

What is asked acts on the float32 logits l in vLLM's order, by its formulas:

  0. structured_outputs       minus infinity, where the grammar forbids a token
  1. logit_bias b             l + b
  2. repetition_penalty r     l / r where l > 0, else l * r; tokens of the
                              prompt or the output
  3. frequency_penalty f      l - f * n; tokens that the output has n times
  4. presence_penalty p       l - p; tokens of the output
  5. allowed_token_ids, bad_token_ids, bad_words, and before min_tokens what
     could end the output     minus infinity
  6. temperature 0            the largest, the first of equal ones
  7. temperature t            l / t
  8. min_p m                  tokens at least m times as likely as the likeliest
  9. top_k k                  the k likeliest of these
 10. top_p p                  the likeliest of these that make up p of them
 11. seed                     one of these is drawn

0 is a program of its own (`masking`), 1 to 5 are `adjusting`'s. Tokens as
likely as the last that a filter keeps are kept, too: of top-p's, vLLM keeps
some. Thresholds are found without sorting, on GPUs by one kernel
(`pallas_kernels.filter_threshold`).

Log-probabilities (`SamplingParams.logprobs_mode`) are of the logits as they
came, of these after 7, or of those that the token is drawn from, after 10 (or
after 5, where the largest is taken).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import filter_threshold
from sarathi_jax.runner import batch
from sarathi_jax.runner import logprobs as logprobs_lib
from sarathi_jax.runner import told as told_lib

_NEVER = -jnp.inf
_VOID = -1  # where no token may be sampled


class Adjust(NamedTuple):
  """How to adjust the logits of some rows.

  Attributes:
    is_asked: [S] bool, of which.
    apply: returns the adjusted logits; minus infinity is never sampled.
  """

  is_asked: Array
  apply: Callable[[Array], Array]


class Tell(NamedTuple):
  """What to tell of some rows beside the token.

  Attributes:
    modes: [S] int32, `SamplingParams.telling`.
    named: [S, N] int32, tokens whose log-probabilities are told.
  """

  modes: Array
  named: Array


# `SamplingParams.telling` of the modes that are not 'raw'.
_TEMPERATURE, _PROCESSED = 2, 3


def filter_logits(
  logits: Float[Array, 'S V'],
  top_k: Int[Array, ' S'],
  top_p: Float[Array, ' S'],
  min_p: Float[Array, ' S'],
) -> Float[Array, 'S V']:
  """Sets the logits of tokens that must not be sampled to minus infinity.

  Args:
    logits: float32, divided by the temperature, less the row's largest.
    top_k: how many of the likeliest tokens to keep; 0 for all.
    top_p: keep the likeliest tokens that make up this probability.
    min_p: keep tokens at least this fraction as likely as the likeliest.
  """
  # Of a row that has a NaN, none are likely enough: all its logits are.
  logits = jnp.where(logits >= jnp.log(min_p)[:, None], logits, _NEVER)
  least = filter_threshold.least_kept(logits, top_k, top_p)
  return jnp.where(logits >= least[:, None], logits, _NEVER)


def sample(
  logits: Float[Array, 'S V'],
  temperature: Float[Array, ' S'],
  top_k: Int[Array, ' S'],
  top_p: Float[Array, ' S'],
  min_p: Float[Array, ' S'],
  seeds: Int[Array, 'S 2'],
  positions: Int[Array, ' S'],
  adjust: Adjust | None = None,
  tell: Tell | None = None,
  allowed: Bool[Array, 'S V'] | None = None,
  *,
  deterministic: bool = False,
) -> tuple[batch.StepOutput, told_lib.ToldArrays | None]:
  """Samples one token a row.

  Does no work that no row of the batch asks for.

  Args:
    logits: float32.
    temperature: 0 for the likeliest token.
    top_k, top_p, min_p: see `filter_logits`.
    seeds: of the requests, see `batch.BatchArrays`.
    positions: of the sampled tokens in their sequences.
    adjust: adjusts logits before anything else; None if none are.
    tell: what to tell beside the token; None for nothing.
    allowed: the tokens that may be sampled, whatever adjusts them; None: all.
    deterministic: whether what one row asks for leads others by no other
      branch, which XLA may round otherwise.

  Returns:
    Token ids (int32) and their log-probabilities (float32) as each row asks, by
    default under `logits` as given. These are finite, or NaN where logits are
    NaN, infinite, or all minus infinity, adjusted or not; such a row's token is
    void. And what is told of the rows that ask, zeros if none does.
  """
  is_drawn = temperature > 0
  asked = logits if allowed is None else jnp.where(allowed, logits, _NEVER)

  def scale(logits: Array) -> Array:
    # With 0 as the largest, a low temperature makes no logit infinite.
    scaled = logits - logits.max(axis=-1, keepdims=True)
    return scaled / jnp.where(is_drawn, temperature, 1)[:, None]

  def filtered(logits: Array) -> Array:
    """Returns what tokens are drawn from; greedy rows have no filters."""
    return lax.cond(
      (is_drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any(),
      lambda x: filter_logits(
        x,
        jnp.where(is_drawn, top_k, 0),
        jnp.where(is_drawn, top_p, 1),
        jnp.where(is_drawn, min_p, 0),
      ),
      lambda x: x,
      scale(logits),
    )

  def draw(chances: Array, greedy: Array) -> Array:
    def noise(seed: Array, position: Array) -> Array:
      # The program's default generator may depend on the batch.
      low, high = seed.astype(jnp.uint32)
      key = jax.random.wrap_key_data(
        jnp.stack([jnp.uint32(0), high]), impl='threefry2x32'
      )
      key = jax.random.fold_in(jax.random.fold_in(key, low), position)
      return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = logprobs_lib.argmax(chances + jax.vmap(noise)(seeds, positions))
    return jnp.where(is_drawn, drawn, greedy)

  def nothing() -> told_lib.ToldArrays | None:
    return None if tell is None else logprobs_lib.zeros(*tell.named.shape)

  def keep(asked: Array, greedy: Array) -> Any:
    del asked
    return greedy, nothing()

  def draw_all(asked: Array, greedy: Array) -> Any:
    return draw(filtered(asked), greedy), nothing()

  def do_all(asked: Array, greedy: Array) -> Any:
    adjusted = asked
    if adjust is not None:
      adjusted = lax.cond(
        adjust.is_asked.any(), adjust.apply, lambda x: x, asked
      )
      greedy = logprobs_lib.argmax(adjusted)
    chances, tokens = lax.cond(
      is_drawn.any(),
      lambda x: ((y := filtered(x)), draw(y, greedy)),
      lambda x: (x, greedy),
      adjusted,
    )
    if tell is None:
      told = None
    else:
      mode = tell.modes[:, None]
      told = lax.cond(
        (mode > 0).any(),
        lambda: logprobs_lib.tell(
          jnp.where(
            mode == _PROCESSED,
            chances,
            jnp.where(mode == _TEMPERATURE, scale(logits), logits),
          ),
          tokens,
          tell.named,
        ),
        nothing,
      )
    return jnp.where((adjusted == _NEVER).all(-1), _VOID, tokens), told

  picks = [keep, draw_all]
  which = is_drawn.any().astype(jnp.int32)
  for asks in (adjust and adjust.is_asked, tell and tell.modes > 0):
    if asks is not None:
      picks[2:] = [do_all]
      which = jnp.where(asks.any(), 2, which)
  if deterministic:
    picks, which = [do_all], jnp.int32(0)
  tokens, told = lax.switch(which, picks, asked, logprobs_lib.argmax(asked))
  if allowed is not None:
    tokens = jnp.where((asked == _NEVER).all(-1), _VOID, tokens)
  is_void = tokens == _VOID
  tokens = jnp.maximum(tokens, 0)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  total = jax.nn.logsumexp(logits, axis=-1)  # Finite if the logits are sane.
  logprobs = chosen - total
  if tell is not None:
    logprobs = jnp.where(tell.modes > 0, told.logprobs, logprobs)
  logprobs = jnp.maximum(logprobs, jnp.finfo(jnp.float32).min)
  output = batch.StepOutput(
    tokens, jnp.where(jnp.isfinite(total) & ~is_void, logprobs, jnp.nan)
  )
  return output, told

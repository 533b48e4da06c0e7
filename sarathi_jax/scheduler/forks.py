# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin at the end of another's prefill, and share its pages.

Of a request's n sequences the first one computes the prompt, and all sample
after its last token. The full pages stay shared. The page that the prompt fills
in part is the first sequence's: any other has a copy made of it when it is
about to write to it, and holds it until then, whatever becomes of the first.
"""

from __future__ import annotations

from sarathi_jax import types
from sarathi_jax.scheduler import pages as pages_lib
from sarathi_jax.scheduler import sequence

Sequence = sequence.Sequence


def num_own_pages(seq: Sequence, pool: pages_lib.PagePool, num: int) -> int:
  """Returns a fork's own pages of the first `num` tokens.

  Args:
    seq: the sequence whose fork it is, before the end of its prefill.
    pool: of the pages.
    num: at least the tokens of the prefill.
  """
  return pool.num_for(num) - len(seq.tokens) // pool.page_size


def begin(
  fork: Sequence, first: Sequence, pool: pages_lib.PagePool, step: int
) -> types.Chunk:
  """Begins a fork with the batch that ends the prefill of `first`.

  Args:
    fork: has a slot, and maybe pages of its own for what comes next.
    first: the sequence whose fork it is.
    pool: of the pages.
    step: of the batch.

  Returns:
    Its chunk.
  """
  num = first.num_computed
  num_full = num // pool.page_size
  fork.pages[:0] = pool.share(first.pages[:num_full])
  fork.page_table = tuple(fork.pages)
  fork.room = len(fork.pages) * pool.page_size
  if num % pool.page_size:
    (fork.copy_from,) = pool.share([first.pages[num_full]])
    fork.room = num
  fork.num_computed = fork.prefill_len = num
  fork.keys, fork.contents = first.keys.copy(), first.contents.copy()
  # Which others find already: that of 8,000 takes a millisecond to look up.
  fork.num_registered, fork.full_at = first.num_registered, first.full_at
  fork.num_prefilled = fork.prompt_len
  fork.first_scheduled_time = first.first_scheduled_time
  fork.num_pending = fork.num_in_flight = 1
  fork.last_step = step
  setup = None
  if fork.setup is not None:
    setup = fork.setup._replace(tokens=tuple(fork.tokens))
    fork.is_set_up = True
  return types.Chunk(
    fork.key,
    fork.slot,
    num,
    (),
    0,
    fork.page_table,
    False,
    1,
    fork.prompt_len,
    fork.seed,
    fork.request.sampling,
    setup,
    rope_len=fork.rope_len,
  )


def needs_page(seq: Sequence, pool: pages_lib.PagePool) -> bool:
  """Whether a decode without room needs one more page for its next token."""
  # A copy is not needed of what nobody else has any more.
  return pool.num_for(seq.num_computed + 1) > len(seq.pages) and (
    seq.copy_from is None or pool.num_holders(seq.copy_from) > 1
  )


def own_shared_page(
  seq: Sequence, pool: pages_lib.PagePool
) -> list[tuple[int, int]]:
  """Gives a fork a page of its own for the one that it shares in part.

  Args:
    seq: the sequence. It has the page for the copy, or `needs_page` no more.
    pool: of the pages.

  Returns:
    The page to copy and the copy; none if the page itself is its own now.
  """
  source, seq.copy_from = seq.copy_from, None
  assert source is not None
  copies = []
  place = seq.num_computed // pool.page_size
  if place < len(seq.pages):
    pool.give_back([source])
    copies = [(source, seq.pages[place])]
  else:
    seq.pages.append(source)
    seq.page_table = tuple(seq.pages)
  seq.room = len(seq.pages) * pool.page_size
  return copies


def release(seq: Sequence, pool: pages_lib.PagePool) -> None:
  """Gives back all pages of a sequence."""
  pool.give_back(seq.pages)
  if seq.copy_from is not None:
    pool.give_back([seq.copy_from])
  seq.pages = []
  seq.page_table = ()
  seq.copy_from = None

# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin at the end of another's prefill, and share its pages.

Of a request's n sequences the first one computes the prompt, and all sample
after its last token. The full pages stay shared. The page that the prompt fills
in part is the first sequence's: any other has a copy made of it when it is
about to write to it, and holds it until then, whatever becomes of the first.
"""

from __future__ import annotations

from sarathi_jax import page_groups
from sarathi_jax import types
from sarathi_jax.scheduler import grouped
from sarathi_jax.scheduler import pages as pages_lib
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import urgency

Sequence = sequence.Sequence


def num_own_pages(
  seq: Sequence, pool: pages_lib.PagePool, num: int, num_groups: int
) -> int:
  """Returns a fork's own pages of the first `num` tokens.

  Args:
    seq: the sequence whose fork it is, before the end of its prefill.
    pool: of the pages.
    num: at least the tokens of the prefill.
    num_groups: of layers.
  """
  return (pool.num_for(num) - len(seq.tokens) // pool.page_size) * num_groups


def begin_all(
  chunks: list[types.Chunk],
  seqs: list[Sequence],
  running: list[Sequence],
  pool: pages_lib.PagePool,
  step: int,
  num_groups: int,
) -> tuple[types.Fork, ...]:
  """Begins the forks of the prefills that end.

  Args:
    chunks: of the batch.
    seqs: their sequences, to which it adds the forks.
    running: all that run, by urgency, to which it adds them, too.
    pool, step, num_groups: see `begin`.
  """
  forks = []
  for row in reversed(range(len(chunks))):
    if not chunks[row].is_prefill:
      break  # Prefills come last.
    if chunks[row].samples and seqs[row].forks:
      for fork in seqs[row].forks:
        chunk = begin(fork, seqs[row], pool, step, num_groups)
        forks.append(types.Fork(row, chunk))
        urgency.insert(running, fork)
        seqs.append(fork)
      seqs[row].forks = []
  return tuple(forks)


def begin(
  fork: Sequence,
  first: Sequence,
  pool: pages_lib.PagePool,
  step: int,
  num_groups: int,
) -> types.Chunk:
  """Begins a fork with the batch that ends the prefill of `first`.

  Args:
    fork: has a slot, and maybe pages of its own for what comes next.
    first: the sequence whose fork it is.
    pool: of the pages.
    step: of the batch.
    num_groups: of layers.

  Returns:
    Its chunk.
  """
  num = first.num_computed
  num_full = num // pool.page_size
  shared, rest = num_full * num_groups, (num_full + 1) * num_groups
  pool.share(page_groups.held(first.pages[:shared]))
  fork.pages[:0] = first.pages[:shared]
  fork.num_behind = first.num_behind.copy()
  fork.page_table = grouped.table_of(fork.pages)
  fork.room = len(fork.pages) // num_groups * pool.page_size
  if num % pool.page_size:
    fork.copy_from = tuple(pool.share(first.pages[shared:rest]))
    fork.room = num
  fork.num_computed = fork.prefill_len = num
  fork.keys, fork.contents = first.keys.copy(), first.contents.copy()
  # Which others find already: that of 8,000 takes a millisecond to look up.
  fork.num_registered, fork.full_at = first.num_registered, first.full_at
  fork.keeps_to_itself = first.keeps_to_itself
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
    adapter=fork.adapter_slot,
  )


def needs_pages(
  seq: Sequence, pool: pages_lib.PagePool, num_groups: int
) -> bool:
  """Whether a decode without room needs one more place for its next token."""
  # A copy is not needed of what nobody else has any more. Of the first group,
  # which has the widest window, pages are held the longest.
  return pool.num_for(seq.num_computed + 1) * num_groups > len(seq.pages) and (
    not seq.copy_from or pool.num_holders(seq.copy_from[0]) > 1
  )


def own_shared_page(
  seq: Sequence, pool: pages_lib.PagePool
) -> list[tuple[int, int]]:
  """Gives a fork pages of its own for those that it shares in part.

  Args:
    seq: the sequence. It has the pages for the copies, or `needs_pages` no
      more.
    pool: of the pages.

  Returns:
    Each page to copy and its copy; none if the pages themselves are its own
    now.
  """
  sources, seq.copy_from = seq.copy_from, ()
  num_groups = len(sources)
  copies: list[tuple[int, int]] = []
  start = seq.num_computed // pool.page_size * num_groups
  if start < len(seq.pages):
    pool.give_back(sources)
    own = seq.pages[start : start + num_groups]
    copies = list(zip(sources, own, strict=True))
  else:
    seq.pages += sources
    seq.page_table = grouped.table_of(seq.pages)
  seq.room = len(seq.pages) // num_groups * pool.page_size
  return copies


def release(seq: Sequence, pool: pages_lib.PagePool) -> None:
  """Gives back all pages of a sequence."""
  pool.give_back(page_groups.held(seq.pages))
  pool.give_back(seq.copy_from)
  seq.pages = []
  seq.num_behind = []
  seq.page_table = ()
  seq.copy_from = ()

# SPDX-License-Identifier: Apache-2.0
"""Finds the beginnings of sequences in the pages of others, and of the past.

Pages are registered when the batch that wrote them has completed, so none is
found that a failed step wrote. A request that begins with what another is just
computing waits for it, page by page, rather than computing it, too.

Full pages are shared. Where a sequence goes on as a page begins, full or not,
the page is copied: the copy is its own, and holds these tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import math

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax import types
from sarathi_jax.scheduler import grouped
from sarathi_jax.scheduler import page_log
from sarathi_jax.scheduler import pages as pages_lib
from sarathi_jax.scheduler import passing
from sarathi_jax.scheduler import prefixes
from sarathi_jax.scheduler import sequence

Sequence = sequence.Sequence
# Steps that a request waits for another one that computes what it needs.
_MOST_STEPS = 256
# The part of a page that is worth a copy.
_LEAST = 4  # a fourth


class PrefixCache:
  """Shares pages between sequences that begin alike.

  Args:
    config: the scheduler's.
    pool: of the pages.

  Attributes:
    num_looked_up: tokens of the sequences admitted for the first time, if they
      were looked for.
    num_found: those that were in pages already.
    num_found_again: those of preempted sequences.
  """

  def __init__(
    self, config: config_lib.SchedulerConfig, pool: pages_lib.PagePool
  ) -> None:
    self._config = config
    self._pool = pool
    self._is_on = config.prefix_cache
    self._windows = config.windows
    self._num_groups = len(config.windows)
    self._has_windows = any(config.windows)
    self._finds = config.prefix_cache and not config.prefix_cache_misses
    self._least = max(1, pool.page_size // _LEAST)
    self._dynamic_rope_len = config.dynamic_rope_len
    # Which sequence computes the page of a key that is not registered.
    self._coming: dict[bytes, Sequence] = {}
    self.num_looked_up = 0
    self.num_found = 0
    self.num_found_again = 0

  def find(self, seq: Sequence) -> list[int]:
    """Returns the pages that hold the beginning of a waiting sequence.

    At least one token is left to compute. They are not held yet, so they are
    only valid until a page is taken.
    """
    if not self._is_on:
      return seq.found
    if seq.found_at != self._pool.num_forgotten:
      seq.found = []
    self.guess(seq)
    return seq.found

  def guess(self, seq: Sequence) -> int:
    """Returns how many places `find` would, but for what was forgotten since.

    It looks only for what comes after the pages that were found before.
    """
    if not self._is_on:
      return 0
    if not seq.found:
      seq.found_at = self._pool.num_forgotten
    num_found = len(seq.found) // self._num_groups
    num_places = (len(seq.tokens) - 1) // self._pool.page_size
    if num_found < num_places:
      self._make_keys(seq, num_places)
      # Of what is not computed there are no log-probabilities to tell.
      if self._finds and seq.prompt_logprobs is None:
        self._find_more(seq, num_found, num_places)
    return len(seq.found) // self._num_groups

  def _find_more(self, seq: Sequence, num_found: int, num_places: int) -> None:
    if self._windows == page_groups.ONE_GROUP:
      seq.found += self._pool.find(seq.keys, num_found, num_places)
      return
    now = self._pool.num_registrations, self._pool.num_forgotten
    if seq.found_after != now:
      seq.found_after, seq.found_at = now, self._pool.num_forgotten
      seq.found = grouped.find(
        num_places,
        self._windows,
        self._pool.page_size,
        lambda place, group: self._pool.page_of(
          prefixes.key_in(seq.keys[place], group)
        ),
      )

  def num_missing(self, seq: Sequence) -> int:
    """Returns the tokens of a waiting sequence that are to be computed."""
    num_found = len(self.find(seq)) // self._num_groups
    return len(seq.tokens) - num_found * self._pool.page_size

  def guess_missing(self, seq: Sequence) -> int:
    """As `num_missing`, or fewer: it is not looked for again at each step.

    Neither counts what is found within a page.
    """
    return len(seq.tokens) - self.guess(seq) * self._pool.page_size

  def looked_for(self, request: types.Request) -> Sequence:
    """Returns a sequence to look for, of a request that is not added yet.

    Any thread may ask.
    """
    return Sequence.of(request, self._config, 0, 0)

  def by_found(self, few: Iterable[Sequence]) -> Iterator[Sequence]:
    """Yields waiting sequences, the one of which the most is found first."""
    return passing.by_found(
      tuple(few),
      self.guess,
      lambda seq: len(self.find(seq)) // self._num_groups,
    )

  def is_coming(self, seq: Sequence, step: int) -> bool:
    """Whether a waiting sequence should wait for what another computes.

    Args:
      seq: the sequence.
      step: the number of the next step.
    """
    if not self._coming or seq.prompt_logprobs is not None:
      return False
    num_found = len(self.find(seq)) // self._num_groups
    keys = seq.keys
    if num_found >= (len(seq.tokens) - 1) // self._pool.page_size:
      return False
    if keys[num_found] not in self._coming:
      return False
    seq.waits_since = step if seq.waits_since is None else seq.waits_since
    return step - seq.waits_since < _MOST_STEPS

  def begin(self, seq: Sequence) -> list[tuple[int, int]]:
    """Gives a sequence that is admitted the pages that were found for it.

    At least one more page of each group is free.

    Returns:
      Pages (from, to) to copy before anything is computed.
    """
    found = self.find(seq)
    num_found = len(found) // self._num_groups
    num_tokens = num_found * self._pool.page_size
    self._pool.share(page_groups.held(found))
    seq.pages = list(found)
    if self._has_windows:
      seq.num_behind = grouped.num_behind(found, self._num_groups)
    copies = []
    if beginning := self._find_within(seq, num_found):
      sources, num_within = beginning
      copies = self._pool.take_for_copies(sources)
      seq.pages += [own for _, own in copies]
      num_tokens += num_within
    seq.page_table = grouped.table_of(seq.pages)
    seq.num_computed = num_tokens
    self._set_registered(seq, num_found)
    seq.keeps_to_itself = False
    seq.full_at = 0  # Its first token tells that all of the prompt is there.
    seq.found, seq.found_after = [], None
    seq.waits_since = None
    if seq.num_preemptions:
      self.num_found_again += num_tokens
    else:
      if self._is_on and seq.prompt_logprobs is None:
        self.num_looked_up += len(seq.tokens)
      self.num_found += num_tokens
      seq.num_cached = num_tokens
    seq.num_prefilled = max(seq.num_prefilled, min(num_tokens, seq.prompt_len))
    if self._finds:
      num_full = len(seq.tokens) // self._pool.page_size
      self._make_keys(seq, num_full)
      for key in seq.keys[num_found:num_full]:
        self._coming.setdefault(key, seq)
    # A page that was the only free one has these tokens already.
    return [(source, own) for source, own in copies if source != own]

  def _find_within(
    self, seq: Sequence, num_pages: int
  ) -> tuple[list[int], int] | None:
    """Returns pages that begin as `seq` goes on, and how many tokens do.

    There is one of each group.
    """
    if not self._finds or seq.prompt_logprobs is not None:
      return None
    start = num_pages * self._pool.page_size
    # One is left to compute.
    stop = min(start + self._pool.page_size, len(seq.tokens) - 1)
    found = self._pool.beginnings.find(
      self._parent(seq, num_pages), prefixes.pack(seq.tokens[start:stop])
    )
    if found is None or found.num_tokens < self._least:
      return None
    pages = [
      page
      for group in range(self._num_groups)
      if (page := self._pool.page_of(prefixes.key_in(found.key, group)))
      is not None
    ]
    return (pages, found.num_tokens) if len(pages) == self._num_groups else None

  def register(self, seq: Sequence, num_tokens: int) -> None:
    """Lets others find the pages of tokens [0, num_tokens).

    Args:
      seq: a running sequence.
      num_tokens: what is in the cache for sure.
    """
    num_pages = num_tokens // self._pool.page_size
    if not self._is_on or seq.keeps_to_itself:
      self._set_registered(seq, num_pages)
      return
    self._make_keys(seq, num_pages)
    for i in range(seq.num_registered, num_pages):
      key = seq.keys[i]
      at = i * self._num_groups
      is_new = self._pool.register(
        seq.pages[at], key, self._parent(seq, i), seq.contents[i]
      )
      for group in range(1, self._num_groups):
        self._pool.register(
          seq.pages[at + group], prefixes.key_in(key, group), tokens=None
        )
      if is_new and self._pool.log is not None:
        parent = seq.keys[i - 1] if i else None
        self._pool.log.store(
          page_log.Stored(
            key, parent, seq.contents[i], self._namespace(seq.request)
          )
        )
      if self._coming.get(key) is seq:
        del self._coming[key]
    self._set_registered(seq, num_pages)
    self._register_rest(seq, num_tokens)

  def _register_rest(self, seq: Sequence, num_tokens: int) -> None:
    """Registers the page that tokens [0, num_tokens) fill in part."""
    num_pages, num_within = divmod(num_tokens, self._pool.page_size)
    if not self._is_on or seq.keeps_to_itself or num_within < self._least:
      return
    at = num_pages * self._num_groups
    if at == len(seq.pages):
      return  # The page is that of the sequence whose fork it is.
    self._make_keys(seq, num_pages)
    parent = self._parent(seq, num_pages)
    tokens = prefixes.pack(seq.tokens[num_tokens - num_within : num_tokens])
    key = prefixes.key_of(parent, tokens)
    self._pool.register(seq.pages[at], key, parent, tokens, in_part=True)
    for group in range(1, self._num_groups):
      self._pool.register(
        seq.pages[at + group],
        prefixes.key_in(key, group),
        tokens=None,
        in_part=True,
      )

  def end(self, seq: Sequence, num_tokens: int) -> None:
    """Tells that a sequence computes no more; before its pages are freed.

    Args:
      seq: the sequence.
      num_tokens: what is in the cache for sure; 0 for nothing.
    """
    self._register_rest(seq, num_tokens)
    if self._coming:
      for key in seq.keys[seq.num_registered :]:
        if self._coming.get(key) is seq:
          del self._coming[key]
    self._set_registered(seq, 0)

  def forget(self, running: Iterable[Sequence]) -> None:
    """Lets nothing be found of what is there, nor of what comes of it.

    Args:
      running: all that have pages, which they keep to themselves.
    """
    for seq in running:
      seq.keeps_to_itself = True
    self._pool.unregister_all()
    self._coming.clear()

  def keep_log(self) -> None:
    """Notes from now on what can be found; forgets what was there before."""
    self._pool.unregister_all()
    if self._finds:
      self._pool.log = page_log.PageLog()

  def _set_registered(self, seq: Sequence, num_pages: int) -> None:
    seq.num_registered = num_pages
    seq.full_at = (
      (num_pages + 1) * self._pool.page_size
      if self._is_on or self._has_windows
      else math.inf
    )

  def _make_keys(self, seq: Sequence, num_pages: int) -> None:
    if len(seq.keys) < num_pages:
      prefixes.extend(
        seq.keys,
        seq.contents,
        self._root(seq.request) if not seq.keys else b'',
        seq.tokens,
        num_pages,
        self._pool.page_size,
      )

  def _parent(self, seq: Sequence, num_pages: int) -> bytes:
    """Returns the key before the page after so many, of which it has keys."""
    return seq.keys[num_pages - 1] if num_pages else self._root(seq.request)

  def _root(self, request: types.Request) -> bytes:
    return prefixes.root(
      page_size=self._pool.page_size, **self._extras(request)
    )

  def _namespace(self, request: types.Request) -> str:
    """Returns what tells a request's pages apart, for routers."""
    extras = self._extras(request)
    return request.cache_salt + ''.join(
      f' {name}={value}' for name, value in extras.items() if name != 'salt'
    )

  def _extras(self, request: types.Request) -> dict[str, str | int]:
    """Returns what sets a request's pages apart from others' of its tokens."""
    extras: dict[str, str | int] = {}
    if request.cache_salt:
      extras['salt'] = request.cache_salt
    if (adapter := request.adapter) is not None:
      extras |= {'adapter': adapter.name, 'generation': adapter.generation}
    if (rope_len := self._dynamic_rope_len) is None:
      return extras
    # Up to this length positions are rotated alike.
    prompt_len, max_len = sequence.lens_of(request, self._config)
    if self._config.rope_counts_outputs:
      if max_len > rope_len:
        extras['rope_len'] = 'long'
    elif prompt_len > rope_len:
      extras['rope_len'] = prompt_len
    return extras

# SPDX-License-Identifier: Apache-2.0
"""What VllmEngine tells of the KV cache, and how it is told to forget it.

Routers are told as smg's own servicers tell them: a stream begins with a
snapshot, its batches are numbered without a gap, who asks for what is kept no
more is told OUT_OF_RANGE, and who reads too slowly DATA_LOSS; then smg asks for
a snapshot. A page's hash is a name for it. What smg compares with a prompt are
the tokens: it hashes them itself, under the namespace. The engine's load comes
with each batch, and in batches of its own. Imports no JAX.
"""

from __future__ import annotations

import array
import asyncio
from collections.abc import Iterator, Sequence
import contextlib
import math
import time
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2 as pb

from sarathi_jax import errors
from sarathi_jax.scheduler import page_log
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.protocols import status
from sarathi_jax.server.protocols import vllm_loads
from sarathi_jax.server.telling import kv_journal

Context = grpc.aio.ServicerContext[Any, Any]
_UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
_LOOK_S = 0.05  # between two looks whether nothing runs
_HASH_BYTES = 8


class CacheCalls:
  """The calls that are about the cache.

  Args:
    frontend: reaches the engine.
    journal: what the cache holds; None to tell nobody.
    loads: tells the engine's load.
    may_flush: whether whoever reaches us, and gets by the tokens, if there are
      any, may have the cache forgotten.
  """

  def __init__(
    self,
    frontend: frontend_lib.Frontend,
    journal: kv_journal.KvJournal | None,
    loads: vllm_loads.Loads,
    *,
    may_flush: bool,
  ) -> None:
    self._frontend = frontend
    self._journal = journal
    self._loads = loads
    self._may_flush = may_flush

  async def subscribe(
    self, request: pb.SubscribeKvEventsRequest, context: Context
  ) -> None:
    """Writes batches until the caller leaves."""
    async with status.reported(context):
      page_size = self._frontend.engine.info.page_size
      if self._journal is None:
        await context.abort(
          _UNIMPLEMENTED,
          'SubscribeKvEvents: needs --kv_events, as other machines can reach '
          'this server.',
        )
      assert self._journal is not None
      # smg takes a call that is not answered for a server that hangs.
      await context.send_initial_metadata(())
      try:
        async with contextlib.aclosing(
          self._journal.follow(request.start_sequence_number)
        ) as batches:
          sample = 0
          async for batch in batches:
            message = message_of(batch, page_size)
            if (load := self._journal.load) is not None:
              sample += 1
              message.load.CopyFrom(self._loads.record_of(load, sample))
              message.load.load_only = not batch.events
            await context.write(message)
      except errors.UnsupportedError as error:  # smg asks no more, then.
        await context.abort(_UNIMPLEMENTED, status.message_of(error))

  async def flush(
    self, request: pb.FlushCacheRequest, context: Context
  ) -> pb.FlushCacheResponse:
    """Forgets what prompts could begin with, once nothing runs or waits."""
    async with status.reported(context):
      if not self._may_flush:
        await context.abort(
          _UNIMPLEMENTED,
          'FlushCache: needs --control, as other machines can reach this '
          'server.',
        )
      if not (math.isfinite(request.timeout_s) and request.timeout_s >= 0):
        raise errors.InvalidRequestError(
          f'timeout_s={request.timeout_s}: must be finite, and >= 0.'
        )
      until = time.monotonic() + request.timeout_s
      while not await self._frontend.engine_thread.call(
        lambda engine: engine.reset_prefix_cache()
      ):
        if time.monotonic() >= until:
          return pb.FlushCacheResponse(
            success=False,
            message=f'timeout_s={request.timeout_s}: requests run or wait; '
            'sarathi.v1.Control.ResetCache recomputes them',
          )
        await asyncio.sleep(_LOOK_S)
      return pb.FlushCacheResponse(
        success=True, message='the prefix cache is empty'
      )


def message_of(batch: kv_journal.Batch, page_size: int) -> pb.KvEventBatch:
  """Returns the message of a batch; of pages that follow, in one event."""
  message = pb.KvEventBatch(
    sequence_number=batch.sequence, timestamp=batch.time, dp_rank=0
  )
  if batch.part is not None:
    message.snapshot.index = batch.part.place
    message.snapshot.count = batch.part.num_parts
    message.snapshot.blocks = batch.part.num_pages
  for place, run in enumerate(_runs(batch.events), 1):
    # As smg's servicers have it, none of a snapshot has an id.
    event = message.events.add(event_id=0 if batch.part else place)
    match run[0]:
      case page_log.Stored(_, parent, _, namespace):
        if parent is not None:
          event.stored.parent_block_hash = hash_of(parent)
        if namespace:
          event.stored.cache_salt = namespace
        for page in run:
          event.stored.blocks.add(
            block_hash=hash_of(page.key),
            token_ids=array.array('i', page.tokens),
            block_size=page_size,
          )
      case page_log.Removed():
        event.removed.block_hashes.extend(hash_of(page.key) for page in run)
      case page_log.Cleared():
        event.cleared.SetInParent()
  return message


def hash_of(key: bytes) -> int:
  """Returns a page's key in short: a name that is unique in practice."""
  return int.from_bytes(key[:_HASH_BYTES], 'big', signed=True)


def _runs(events: Sequence[page_log.Event]) -> Iterator[list[Any]]:
  """Yields what one event can tell: removals, or pages each after another."""
  run: list[Any] = []
  for event in events:
    if run and not _goes_on(run[-1], event):
      yield run
      run = []
    run.append(event)
  if run:
    yield run


def _goes_on(last: page_log.Event, event: page_log.Event) -> bool:
  match last, event:
    case page_log.Stored(), page_log.Stored():
      return event.parent == last.key
    case page_log.Removed(), page_log.Removed():
      return True
    case _:
      return False

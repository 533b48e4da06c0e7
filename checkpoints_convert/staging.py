# SPDX-License-Identifier: Apache-2.0
"""The folder that one process writes to until it becomes the target."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil

from sarathi_jax import errors


@contextlib.contextmanager
def staging(target: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  """Makes an empty folder beside the target, and locks it within the block.

  Removes it if the block raises.

  Args:
    target: the folder that it is to become; see `publish`.
    num_bytes: the disk space needed.

  Raises:
    BusyError: another process converts to the target.
    CheckpointError: the disk has too little space left.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  folder = _staging_of(target)
  folder.mkdir(exist_ok=True)
  try:
    lock = os.open(folder, os.O_RDONLY)
  except FileNotFoundError as e:  # another conversion has just ended
    raise _busy(target) from e
  try:
    _lock(lock, folder, target)
    _empty(folder)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
      raise errors.CheckpointError(
        f'target={str(target)!r}: needs {num_bytes} bytes, but the disk has '
        f'{free} left.'
      )
    yield folder
  except BaseException as e:
    if not isinstance(e, BusyError):
      shutil.rmtree(folder, ignore_errors=True)
    raise
  finally:
    os.close(lock)


class BusyError(errors.CheckpointError):
  """Another process converts to the same target."""


def _staging_of(target: pathlib.Path) -> pathlib.Path:
  return target.parent / f'.{target.name}.converting'


def wait_for_other(target: pathlib.Path) -> None:
  """Waits until no other process converts to a target.

  By then it is done, or was killed: its lock is on the folder that it writes
  to, and ends with the process, however that ends.
  """
  target = pathlib.Path(os.path.abspath(target))
  try:
    lock = os.open(_staging_of(target), os.O_RDONLY)
  except FileNotFoundError:
    return
  try:
    fcntl.flock(lock, fcntl.LOCK_SH)
  finally:
    os.close(lock)


def _lock(lock: int, folder: pathlib.Path, target: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ours = os.path.samestat(os.fstat(lock), os.stat(folder))
  except (BlockingIOError, FileNotFoundError):
    ours = False
  if not ours:
    raise _busy(target)


def _busy(target: pathlib.Path) -> BusyError:
  return BusyError(
    f'target={str(target)!r}: another conversion is writing it now.'
  )


def _empty(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


def publish(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Syncs what was written to disk, and then gives it the target's name."""
  _sync(folder)
  os.rename(folder, target)
  _sync_one(target.parent)


def _sync(folder: pathlib.Path) -> None:
  """Syncs every file and folder to disk."""
  for parent, _, names in os.walk(folder):
    for name in names:
      _sync_one(pathlib.Path(parent, name))
    _sync_one(pathlib.Path(parent))


def _sync_one(path: pathlib.Path) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)

# SPDX-License-Identifier: Apache-2.0
"""Packs all that a check found into one file, small enough to be sent back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import os
import pathlib
import tarfile

MOST_BYTES = 16 * 2**20
_LOG_BYTES = 2**18  # of the end of each log; the rest is of no use
_BUFFERED = 2**18  # that gzip may not have written yet, at least


def pack(
  folders: Mapping[str, pathlib.Path],
  archive: pathlib.Path,
  most_bytes: int = MOST_BYTES,
) -> list[str]:
  """Packs folders, small files first, and as much as there is room for.

  A reader never sees half an archive.

  Args:
    folders: what to pack, by name in the archive; only the ends of logs.
    archive: the file, a .tar.gz.
    most_bytes: the most bytes of the archive.

  Returns:
    Names in the archive of files that there was no room for.
  """
  archive.parent.mkdir(parents=True, exist_ok=True)
  part = archive.with_name(f'{archive.name}.part')
  left_out = []
  with part.open('wb') as raw, tarfile.open(fileobj=raw, mode='w:gz') as tar:
    for size, path, name in sorted(_files(folders)):
      # Counts as if compression made nothing smaller.
      if raw.tell() + size + _BUFFERED > most_bytes:
        left_out.append(name)
        continue
      info = tar.gettarinfo(str(path), name)
      info.size = size
      with path.open('rb') as file:
        file.seek(-size, os.SEEK_END)
        tar.addfile(info, file)
  part.replace(archive)
  return left_out


def _files(
  folders: Mapping[str, pathlib.Path],
) -> Iterator[tuple[int, pathlib.Path, str]]:
  """Yields (its last bytes that are wanted, file, name in the archive)."""
  for name, folder in folders.items():
    for path in folder.rglob('*'):
      if path.is_file():
        size = path.stat().st_size
        if path.suffix == '.log':
          size = min(size, _LOG_BYTES)
        yield size, path, f'{name}/{path.relative_to(folder)}'

# SPDX-License-Identifier: Apache-2.0
"""Finds CUDA's own compiler, ptxas, and reads what it reports of kernels."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import threading

_INSTALL = "install the extra, in the source tree: pip install -e '.[aot]'"


_MOSAIC_DUMPS = 'MOSAIC_GPU_DUMP_TO'
_mosaic_lock = threading.Lock()


class UnavailableError(RuntimeError):
  """Something needed to compile for GPUs is not installed; names it."""


def missing() -> str | None:
  """Returns what has to be installed and is not; None if nothing."""
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)):
    return f"JAX's CUDA plugin is not installed; {_INSTALL}"
  if find() is None:
    return f'ptxas and libdevice of CUDA are not installed; {_INSTALL}'
  return None


def find() -> pathlib.Path | None:
  """Finds the folder with bin/ptxas, of NVIDIA's wheels or an installed CUDA.

  Returns None if there is none.
  """
  found = []
  for module in ('nvidia.cu13', 'nvidia.cuda_nvcc'):
    try:
      spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      continue
    found += spec.submodule_search_locations or [] if spec else []
  for tool in ('ptxas', 'nvcc'):
    if path := shutil.which(tool):
      found.append(str(pathlib.Path(path).resolve().parent.parent))
  found.append('/usr/local/cuda')
  return next(
    (
      path
      for path in map(pathlib.Path, found)
      if (path / 'bin' / 'ptxas').exists()
      and (path / 'nvvm' / 'libdevice').exists()
    ),
    None,
  )


def spying(folder: pathlib.Path) -> pathlib.Path:
  """Makes a CUDA toolkit whose ptxas logs its verbose output.

  Args:
    folder: gets the toolkit, and the logs in its folder log.

  Returns:
    The toolkit's folder.
  """
  real = find()
  assert real is not None
  root = folder / 'cuda'
  (root / 'bin').mkdir(parents=True)
  (folder / 'log').mkdir()
  (root / 'nvvm').symlink_to(real / 'nvvm')
  for tool in (real / 'bin').iterdir():
    if tool.name != 'ptxas':
      (root / 'bin' / tool.name).symlink_to(tool)
  ptxas = shlex.quote(str(real / 'bin' / 'ptxas'))
  log = shlex.quote(str(folder / 'log')) + '/$$'
  # XLA reads why ptxas failed from standard error.
  (root / 'bin' / 'ptxas').write_text(f"""#!/bin/sh
case "$*" in *--version*|*--input-as-string*) exec {ptxas} "$@";; esac
{ptxas} -v "$@" 2> {log}
status=$?
[ $status = 0 ] || cat {log} >&2
exit $status
""")
  (root / 'bin' / 'ptxas').chmod(0o755)
  return root


def read_log(folder: pathlib.Path) -> str:
  """Returns all that the ptxas of `spying` logged, the latest at the end."""
  logs = sorted((folder / 'log').iterdir(), key=lambda p: p.stat().st_mtime_ns)
  return '\n'.join(log.read_text() for log in logs)


@contextlib.contextmanager
def mosaic_dumps(folder: pathlib.Path) -> Iterator[None]:
  """Has Mosaic dump what it compiles within the block: PTX and ptxas's log.

  Admits one caller at a time, for Mosaic reads it from the environment.

  Args:
    folder: is made, for the dumps.
  """
  folder.mkdir()
  with _mosaic_lock:
    before = os.environ.get(_MOSAIC_DUMPS)
    os.environ[_MOSAIC_DUMPS] = str(folder)
    try:
      yield
    finally:
      del os.environ[_MOSAIC_DUMPS]
      if before is not None:
        os.environ[_MOSAIC_DUMPS] = before

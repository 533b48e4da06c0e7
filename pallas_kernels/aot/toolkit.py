# SPDX-License-Identifier: Apache-2.0
"""Finds CUDA's own tools, ptxas above all, and keeps what it says and makes."""

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


def missing(*, disassembly: bool = False) -> str | None:
  """Returns what has to be installed and is not; None if nothing.

  Args:
    disassembly: whether `disassembly` is to be used.
  """
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)):
    return f"JAX's CUDA plugin is not installed; {_INSTALL}"
  if find() is None:
    return f'ptxas and libdevice of CUDA are not installed; {_INSTALL}'
  if disassembly and find_disassembler() is None:
    return f'nvdisasm of CUDA is not installed; {_INSTALL}'
  return None


def find() -> pathlib.Path | None:
  """Finds the folder with bin/ptxas, of NVIDIA's wheels or an installed CUDA.

  Returns None if there is none.
  """
  return next(
    (
      path
      for path in _folders('ptxas', 'nvcc')
      if (path / 'bin' / 'ptxas').exists()
      and (path / 'nvvm' / 'libdevice').exists()
    ),
    None,
  )


def find_disassembler() -> pathlib.Path | None:
  """Finds nvdisasm, of NVIDIA's wheels or an installed CUDA."""
  return next(
    (
      path / 'bin' / 'nvdisasm'
      for path in _folders('nvdisasm')
      if (path / 'bin' / 'nvdisasm').exists()
    ),
    None,
  )


def _folders(*tools: str) -> Iterator[pathlib.Path]:
  """Yields where tools of CUDA may be; these are looked for in PATH."""
  for module in ('nvidia.cu13', 'nvidia.cuda_nvcc'):
    try:
      spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      continue
    yield from map(
      pathlib.Path, (spec and spec.submodule_search_locations) or ()
    )
  for tool in tools:
    if path := shutil.which(tool):
      yield pathlib.Path(path).resolve().parent.parent
  yield pathlib.Path('/usr/local/cuda')


def spying(folder: pathlib.Path) -> pathlib.Path:
  """Makes a CUDA toolkit whose ptxas logs its verbose output.

  Args:
    folder: gets the toolkit, the logs in its folder log, and in cubin what was
      compiled.

  Returns:
    The toolkit's folder.
  """
  real = find()
  assert real is not None
  root = folder / 'cuda'
  (root / 'bin').mkdir(parents=True)
  (folder / 'log').mkdir()
  (folder / 'cubin').mkdir()
  (root / 'nvvm').symlink_to(real / 'nvvm')
  for tool in (real / 'bin').iterdir():
    if tool.name != 'ptxas':
      (root / 'bin' / tool.name).symlink_to(tool)
  ptxas = shlex.quote(str(real / 'bin' / 'ptxas'))
  log = shlex.quote(str(folder / 'log')) + '/$$'
  cubin = shlex.quote(str(folder / 'cubin')) + '/$$'
  # XLA reads why ptxas failed from standard error.
  (root / 'bin' / 'ptxas').write_text(f"""#!/bin/sh
case "$*" in *--version*|*--input-as-string*) exec {ptxas} "$@";; esac
{ptxas} -v "$@" 2> {log}
status=$?
[ $status = 0 ] || cat {log} >&2
for argument; do
  [ "$last" = -o ] && [ $status = 0 ] && cp "$argument" {cubin}
  last=$argument
done
exit $status
""")
  (root / 'bin' / 'ptxas').chmod(0o755)
  return root


def read_log(folder: pathlib.Path) -> str:
  """Returns all that the ptxas of `spying` logged, the latest at the end."""
  logs = sorted((folder / 'log').iterdir(), key=lambda p: p.stat().st_mtime_ns)
  return '\n'.join(log.read_text() for log in logs)


def read_cubins(folder: pathlib.Path) -> list[bytes]:
  """Returns what the ptxas of `spying` compiled: ELF files, of a kernel each
  or of several."""
  return [path.read_bytes() for path in sorted((folder / 'cubin').iterdir())]


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

# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the facts that a result is nothing without."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

_PACKAGES = ('jax', 'jaxlib', 'numpy', 'sarathi-jax', 'tokenizers')


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor()


def machine() -> dict[str, Any]:
  """The host; a benchmark that uses a device adds its name."""
  return {
    'cpu': _cpu(), 'cores': os.cpu_count(),
    'load': os.getloadavg()[0], 'python': platform.python_version(),
    'versions': {p: v for p in _PACKAGES if (v := _version(p))}}


def _without_folder(value: Any) -> Any:
  """A path of this machine says nothing elsewhere, but for its last name."""
  is_path = isinstance(value, str) and os.path.isabs(value)
  return os.path.basename(value) if is_path else value


def write_json(path: str | None, benchmark: str, flags: Any,
               results: Any, **more: Any) -> None:
  """Writes results with their circumstances; does nothing without a path.

  Args:
    path: the file.
    benchmark: its module's name; its flags, and the engine's, are kept.
    flags: absl's FLAGS.
    results: anything that JSON can hold.
    **more: further facts, such as the device.
  """
  if not path:
    return
  # absl names the main module by its file, others by their dotted names.
  ours = (f'{benchmark.replace(".", "/")}.py', f'.{benchmark}',
          'sarathi_jax.cli.flags')
  values = {
    flag.name: _without_folder(flag.value)
    for module, defined in flags.flags_by_module_dict().items()
    if module.endswith(ours) for flag in defined}
  pathlib.Path(path).write_text(json.dumps({
    'benchmark': benchmark, 'date': datetime.date.today().isoformat(),
    'machine': machine(), **more, 'flags': values, 'results': results,
  }, indent=1) + '\n')

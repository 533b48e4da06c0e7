# SPDX-License-Identifier: Apache-2.0
"""Disassembles kernels: the machine code (SASS) of what ptxas compiled."""

from __future__ import annotations

from collections.abc import Collection, Iterable
import pathlib
import re
import subprocess
import tempfile

from pallas_kernels.aot import toolkit

# A line of Mosaic's: how threads wait, place and instruction.
_WITH_WAITS = re.compile(
  r'^ *[^ :]+(?::[^ :]+)+ +(/\*[0-9a-f]+\*/.*?) *$', re.M
)
_SECTION = re.compile(r'^\s*\.section\s+\.text\.([^\s,]+),', re.M)


def disassemble(
  cubins: Iterable[bytes], names: Collection[str]
) -> dict[str, str]:
  """Returns kernel -> its code, as nvdisasm prints it.

  Args:
    cubins: of `cases.Result`.
    names: the kernels; others are left out.

  Raises:
    toolkit.UnavailableError: there is no nvdisasm, or no compiler.
  """
  if reason := toolkit.missing(disassembly=True):
    raise toolkit.UnavailableError(reason)
  tool = toolkit.find_disassembler()
  assert tool is not None
  found: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as temp:
    file = pathlib.Path(temp) / 'cubin'
    for cubin in cubins:
      # Starting nvdisasm takes a third of a second, and a step has hundreds.
      if not any(f'.text.{name}\0'.encode() in cubin for name in names):
        continue
      file.write_bytes(cubin)
      text = subprocess.run(
        [tool, '--print-code', file],
        capture_output=True,
        text=True,
        check=True,
      ).stdout
      found |= {k: v for k, v in split(text).items() if k in names}
  return found


def read_mosaic(dumps: pathlib.Path) -> dict[str, str]:
  """Returns kernel -> its code as nvdisasm prints it, from Mosaic's dumps.

  Args:
    dumps: the folder that `toolkit.mosaic_dumps` had it dump to. Without
      nvdisasm it has no code.
  """
  return {
    file.stem.rpartition('_')[0]: _WITH_WAITS.sub(r'\1 ;', file.read_text())
    for file in sorted(dumps.glob('*.sass_ctrl'))
  }


def split(text: str) -> dict[str, str]:
  """Returns kernel -> its lines, of what nvdisasm prints."""
  _, *parts = _SECTION.split(text)
  return dict(zip(parts[::2], parts[1::2], strict=True))

# SPDX-License-Identifier: Apache-2.0
"""What a process has had in memory."""

from __future__ import annotations

import pathlib


def peak() -> int:
  """The most bytes that this process has had resident.

  Not `ru_maxrss`, which starts from that of the process that started it.
  """
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split('VmHWM:')[1].split()[0]) * 1024

# SPDX-License-Identifier: Apache-2.0
"""What ptxas and XLA say of kernels, read from pieces of their logs."""

from __future__ import annotations

from pallas_kernels.aot import kernels


def test_ptxas_log_is_read() -> None:
  log = """\
ptxas warning : Registers are spilled to local memory in function 'rpa__1', \
48 bytes spill stores, 52 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rpa__1' for 'sm_80'
ptxas info    : Function properties for rpa__1
    56 bytes stack frame, 48 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 381.139 ms
ptxas info    : Compiling entry function 'merge' for 'sm_80'
ptxas info    : Function properties for merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
  assert kernels.parse_ptxas(log) == {'rpa__1': (255, 100), 'merge': (40, 0)}


def test_launches_are_read() -> None:
  thunks = """\
001: kCustomKernel [source | next=002 (1)] rpa__1 grid: [480, 1, 1] threads: \
[128, 1, 1]  shared_memory: 53248 bytes
002: kCopy [prev=001 (1) | next=003 (1)] copy.1
003: kKernel [prev=001 (1) | sink        ] fusion.2 grid: [2, 1, 1] threads: \
[32, 4, 1]  shared_memory: 0 bytes
"""
  assert kernels.parse_launches(thunks) == {
    'rpa__1': (128, 53248),
    'fusion.2': (128, 0),
  }


def test_graphs_are_counted() -> None:
  thunks = """\
000: kCommandBuffer [source       | next=512 (1)]
    001: kCustomKernel [source        | next=002 (1) ] fusion grid: [1, 1, 1]
    002: kConditional  [prev=001 (1)  | sink ]
      false_branch:
        003: kCopy         [source        | sink         ] kCopy
004: kConditional   [prev=000 (1) | next=513 (1)]
  false_branch:
    000: kCommandBuffer [source | sink]
        005: kCopy         [source        | sink         ] kCopy
    006: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        007: kCustomKernel [source | sink] compare grid: [1, 1, 1]
"""
  assert kernels.parse_graphs(thunks) == (
    2,
    ['kConditional', 'kWhile', 'kCustomKernel'],
  )

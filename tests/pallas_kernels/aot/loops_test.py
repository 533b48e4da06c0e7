# SPDX-License-Identifier: Apache-2.0
"""Loops are found in machine code, and estimated, as worked out by hand."""

from __future__ import annotations

import pathlib

import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.aot import disassembly
from pallas_kernels.aot import estimates
from pallas_kernels.aot import kernels
from pallas_kernels.aot import loops
from pallas_kernels.aot import toolkit

_AMPERE = """
.text.attend_small:
  /*0000*/ LDG.E.128 R2, desc[UR12][R2.64] ;
.L_x_6:
  /*0010*/ @!P0 LDG.E R26, desc[UR12][R18.64] ;
.L_x_1:
  /*0020*/ DEPBAR.LE SB0, 0x2 ;
  /*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
  /*0040*/ HMMA.16816.F32.BF16 R20, R44.reuse, R32, RZ ;
  /*0050*/ BRA.DIV UR4, `(.L_x_9) ;
.L_x_8:
  /*0060*/ HMMA.1688.F32.BF16 R20, R44, R32, RZ ;
  /*0070*/ LDGSTS.E.BYPASS.LTC128B.128 [R19], [R22], !P1 ;
  /*0080*/ @!P1 LDG.E.U8 R19, desc[UR12][R42.64] ;
  /*0090*/ LDGDEPBAR ;
  /*00a0*/ @P0 BRA `(.L_x_1) ;
.L_x_0:
  /*00b0*/ DEPBAR.LE SB0, 0x0 ;
.L_x_3:
  /*00c0*/ DEPBAR.LE SB0, 0x1 ;
  /*00d0*/ @!P5 BRA `(.L_x_3) ;
  /*00e0*/ @P3 BRA `(.L_x_3) ;
  /*00f0*/ BRA `(.L_x_6) ;
.L_x_9:
  /*0100*/ WARPSYNC.COLLECTIVE R1, `(.L_x_8) ;
.L_x_7:
  /*0110*/ BRA `(.L_x_7);
  /*0120*/ NOP;
"""
_HOPPER = """
.L_x_1:
  /*1f20*/ HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ ;
  /*2110*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
  /*2d70*/ HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12], R24 ;
  /*3330*/ @P6 BRA `(.L_x_1) ;
"""
_LISTING = """
	.headerflags	@"EF_CUDA_SM90"
//--------------------- .text.first        --------------------------
	.section	.text.first,"ax",@progbits
first:
  /*0000*/ EXIT ;
//--------------------- .text.second__1        --------------------------
	.section	.text.second__1,"ax",@progbits
  /*0000*/ NOP ;
"""


def test_inner_loops_are_counted() -> None:
  """Neither the outer loop, nor the trap behind the code."""
  pipeline, waiting = loops.parse(_AMPERE)
  assert pipeline == loops.Loop(
    instructions=9,
    matrix=2,
    flops=2 * 16 * 8 * (16 + 8),
    loads=((128, 1), (8, 1)),
    waits=(2,),
  )
  assert waiting == loops.Loop(3, 0, 0, (), (1,))


def test_a_warps_part_of_a_warpgroups_product() -> None:
  (loop,) = loops.parse(_HOPPER)
  assert (loop.instructions, loop.matrix) == (4, 2)
  assert loop.flops == 2 * 64 * (64 + 128) * 16 // 4
  assert loop.waits == ()  # It is products that are waited for.


def test_kernels_of_a_file_are_told_apart() -> None:
  found = disassembly.split(_LISTING)
  assert list(found) == ['first', 'second__1']
  assert 'EXIT' in found['first'] and 'EXIT' not in found['second__1']


def test_what_mosaic_dumps_is_read(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'attend_small_0.sass_ctrl').write_text("""
\t.section\t.text.attend_small_mosaic_gpu_kernel,"ax",@progbits
.L_x_5:
   -:-:2:Y:01        /*0050*/                 LDGSTS.E.BYPASS.128 [R2], [R4.64]
   2:-:-:-:04        /*0060*/                   DEPBAR.LE SB0, 0x1
   -:-:-:-:04        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4
   1:-:-:Y:05        /*0080*/              @!P2 BRA `(.L_x_5)
""")
  code = disassembly.read_mosaic(tmp_path)
  assert list(code) == ['attend_small']
  (loop,) = loops.parse(code['attend_small'])
  assert (loop.instructions, loop.matrix, loop.waits) == (4, 1, (1,))
  assert loop.loads == ((128, 1),)


@pytest.mark.parametrize(
  ('name', 'bound'),
  [('attend_small__1', 'memory'), ('attend_chunks', 'matrix')],
)
def test_what_bounds_a_loop(name: str, bound: str) -> None:
  """By A100's rates: 108 multiprocessors, 1.41 GHz, 312 TF, 2.04 TB/s."""
  loop = loops.Loop(200, 64, 64 * 4096, ((128, 8), (32, 1)), (2,))
  kernel = kernels.Kernel(name, True, 128, 96, 0, 0, 4)
  found = estimates.estimate(loop, kernel, gpu_targets.get('a100'))
  assert found.issue == pytest.approx(200 * 4 / 4 / 1.41)
  assert found.matrix == pytest.approx(4 * 64 * 4096 * 108 / 312e3)
  # 32-bit loads are of numbers that threads share.
  assert found.memory == pytest.approx(8 * 16 * 128 * 108 / 2039.04)
  assert found.bound == bound


def test_a_missing_disassembler_is_named(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(toolkit.importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(toolkit, 'find', pathlib.Path)
  monkeypatch.setattr(toolkit, '_folders', lambda *tools: ())
  assert toolkit.missing() is None
  with pytest.raises(
    toolkit.UnavailableError, match=r"nvdisasm.*pip install -e '\.\[aot\]'"
  ):
    disassembly.disassemble([], ())

# SPDX-License-Identifier: Apache-2.0
"""Compiling for GPUs that are not here; `python -m pallas_kernels.aot`.

`toolkit` finds ptxas, `compiler` has XLA compile for a GPU of `gpu_targets`,
`kernels` reads what came out, `cases` judges it. `disassembly` has the machine
code of what came out, `loops` counts in it, `estimates` says what bounds it;
`launches` and `collectives` read a program's text.
`report` and `main` are the command; `sarathi_jax.plan` compiles whole steps.
"""

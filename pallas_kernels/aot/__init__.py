# SPDX-License-Identifier: Apache-2.0
"""Compiling for GPUs that are not here; `python -m pallas_kernels.aot`.

`toolkit` finds ptxas, `compiler` has XLA compile for a GPU of `gpu_targets`,
`kernels` reads what came out, `cases` judges it, `step` does so for a model's
whole step, `report` and `main` are the command.
"""

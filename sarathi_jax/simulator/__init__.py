# SPDX-License-Identifier: Apache-2.0
"""The engine without a GPU: its scheduler and loop, on a virtual clock.

`workload` makes requests, `cost_model` says how long a step takes, `runner`
lets the real engine believe it; `simulate` puts them together. `calibrate`,
`capacity` and `report` are programs. Must not import JAX.
"""

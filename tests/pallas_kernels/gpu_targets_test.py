# SPDX-License-Identifier: Apache-2.0
"""What a multiprocessor holds, worked out by hand."""

from __future__ import annotations

import pytest

from pallas_kernels import gpu_targets


@pytest.mark.parametrize(
  ('device', 'usage', 'expected'),
  [
    ('a100', (128, 168, 53248), 3),  # by registers and shared memory
    ('a40', (128, 168, 53248), 1),  # by shared memory
    ('a40', (128, 40, 0), 12),  # by threads
    ('a40', (32, 16, 0), 16),  # by blocks
    ('a100', (32, 16, 0), 32),
    ('h100', (128, 255, 0), 2),  # by registers
    ('h100', (1024, 65, 0), 0),  # more registers than there are
    ('a40', (128, 40, 101377), 0),
  ],
)
def test_blocks_that_fit(
  device: str, usage: tuple[int, int, int], expected: int
) -> None:
  assert gpu_targets.get(device).blocks_that_fit(*usage) == expected


@pytest.mark.parametrize(
  ('device', 'shared_memory'),
  [('a100', 166912), ('a40', 101376), ('h100', 232448)],
)
def test_targets(device: str, shared_memory: int) -> None:
  target = gpu_targets.get(device)
  assert target.shared_memory_per_block == shared_memory  # as NVIDIA says
  text = target.text_proto()
  assert text.count('{') == text.count('}')
  assert f'device_description_str: "{target.device_kind}"' in text
  assert ('ACCELERATED_FEATURES' in text) == (device == 'h100')


@pytest.mark.parametrize(
  ('compute_capability', 'expected'),
  [
    ('8.0', 'a100'),  # A100, A800
    ('9.0', 'h100'),
    ('9.0a', 'h100'),  # GH200, H800, H20
    ('10.0', 'h100'),  # B200
    ('8.6', 'a40'),
    ('8.9', 'a40'),  # L40S: its shared memory is A40's, too
    ('99.0', 'a40'),
    ('', 'a40'),
  ],
)
def test_what_gpus_are_alike(compute_capability: str, expected: str) -> None:
  assert gpu_targets.alike(compute_capability) == expected


@pytest.mark.parametrize(
  ('device_kind', 'expected'),
  [
    ('NVIDIA H100 80GB HBM3', 989.4e12),
    ('NVIDIA H200', 989.4e12),
    ('NVIDIA A100 80GB PCIe', 312e12),
    ('NVIDIA H100 PCIe', None),
    ('NVIDIA H100 NVL', None),
    ('NVIDIA B200', None),
  ],
)
def test_rates_of_the_very_device(
  device_kind: str, expected: float | None
) -> None:
  assert gpu_targets.matmul_flops(device_kind) == expected

# SPDX-License-Identifier: Apache-2.0
"""What the server tells of itself: metrics, logs, spans, traces."""

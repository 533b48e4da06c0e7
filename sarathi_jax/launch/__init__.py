# SPDX-License-Identifier: Apache-2.0
"""From flags to a loaded engine, told on the way, on one host or several."""

# SPDX-License-Identifier: Apache-2.0
"""One module for each protocol, and what they share: checks, status codes."""

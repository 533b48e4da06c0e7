# SPDX-License-Identifier: Apache-2.0
"""Who may call, and how much: tokens, TLS, tenants, bounds."""

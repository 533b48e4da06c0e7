# SPDX-License-Identifier: Apache-2.0
"""Makes flags into a loaded engine, on one host or several, and reports it."""

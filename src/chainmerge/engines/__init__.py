# SPDX-License-Identifier: Apache-2.0
"""Those who write images; the caller holds the locks and has decided."""

# SPDX-License-Identifier: Apache-2.0
"""What the public functions return: frozen records, whose fields are the keys of the JSON."""

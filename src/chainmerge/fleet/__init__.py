# SPDX-License-Identifier: Apache-2.0
"""Merges on many hosts: jobs in a database, and a worker on each host that runs its own.

Nothing here is imported by the rest of the package, and what the extra ``fleet`` installs only
where it is used.
"""

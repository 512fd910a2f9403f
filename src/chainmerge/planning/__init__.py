# SPDX-License-Identifier: Apache-2.0
"""What a merge will do, and why not: decided from facts, before anything is written.

:mod:`~chainmerge.planning.gathering` collects the facts; :mod:`~chainmerge.planning.plan`,
:mod:`~chainmerge.planning.refusals` and what they import decide, and read nothing.
"""

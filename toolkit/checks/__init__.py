"""Check the devices of a host and what a container makes of them.

Three tiers: the host (its kernel's files), the image (what its torch was built
for) and the device (what the container computes). Every finding has a stable
id, a status, what was seen and expected, and a remedy.
"""

from __future__ import annotations

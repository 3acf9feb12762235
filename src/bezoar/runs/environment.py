"""Environment: what a figure depends on beside the question. Versions, the commit, the device."""

from __future__ import annotations

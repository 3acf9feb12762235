"""Environment: what a figure depends on beside the question. Versions, the commit, the device."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any





"""Makes the builders of tiny models importable, however pytest was called."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bge_models`

"""What an import costs. Which package may import which is checked by `lint-imports` (pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_reading_and_cutting_scans_imports_no_torch() -> None:
    """Otherwise each of Ray's workers for the stages before training would take seconds and 200 MB for nothing."""
    code = (
        "import sys, logonet.data.preparing, logonet.distributed.executor; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0

"""What several test files share."""

from __future__ import annotations

from typing import Any

from logonet import train


def tiny_backbone() -> dict[str, Any]:
    from logonet.backbones import logonet

    return {"name": "logonet", **logonet.TINY}


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what depends on the machine."""
    return [{k: v for k, v in e.items() if k not in train.TIMINGS} for e in history]

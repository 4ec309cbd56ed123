"""Pictures for people, as PNG bytes, and the one self-contained HTML page every stage writes."""

from logonet.report.drawing import shown
from logonet.report.page import PAGE, run_page
from logonet.report.pretraining import (
    MAX_CHAIN_SLICES,
    MAX_CLUSTERERS,
    MAX_CODES,
    MAX_EXEMPLARS,
    chain_picture,
    clusters_picture,
    contact_sheet,
)
from logonet.report.training import curves

__all__ = [
    "MAX_CHAIN_SLICES",
    "MAX_CLUSTERERS",
    "MAX_CODES",
    "MAX_EXEMPLARS",
    "PAGE",
    "chain_picture",
    "clusters_picture",
    "contact_sheet",
    "curves",
    "run_page",
    "shown",
]

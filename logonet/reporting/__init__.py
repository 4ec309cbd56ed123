"""Pictures for people, as PNG bytes, and the one self-contained HTML page every stage writes."""

from logonet.reporting.page import lineage, run_page, transfer_section
from logonet.reporting.pretraining import chain_picture, clusters_picture, contact_sheet
from logonet.reporting.results import compare_picture, organ_boxes
from logonet.reporting.segmentation import cases_overlay
from logonet.reporting.study import label_curves, latex, mean_ranks, wide
from logonet.reporting.sweeping import heat_axes, heat_map, importance_bars, parallel, progress, proxy_scatter
from logonet.reporting.training import curves

__all__ = [
    "cases_overlay",
    "chain_picture",
    "clusters_picture",
    "compare_picture",
    "contact_sheet",
    "curves",
    "heat_axes",
    "heat_map",
    "importance_bars",
    "label_curves",
    "latex",
    "lineage",
    "mean_ranks",
    "organ_boxes",
    "parallel",
    "progress",
    "proxy_scatter",
    "run_page",
    "transfer_section",
    "wide",
]

"""Named full configs. A recipe is a function; its docstring says on what data and hardware, in what time
and with what result it ran. ``python jobs/pretrain.py --list-recipes`` prints them.

Hours by `logonet plan` are for datasets as large as the paper's, rest on a quarter of a GPU's data-sheet peak, and are
not measured.

Each of the five papers has a file here, whose recipes follow its text; docs/papers.md sets them beside the papers'
tables. `scaled` makes a recipe small enough to try on two cores.
"""

from __future__ import annotations

from logonet.recipes import general, glmae, logonet, medcontext, simtrot, uxnet3d
from logonet.recipes.scale import scaled as scaled

_FILES = (logonet, general, uxnet3d, glmae, simtrot, medcontext)
PRETRAINING = {name: make for file in _FILES for name, make in file.PRETRAINING.items()}
FINETUNING = {name: make for file in _FILES for name, make in file.FINETUNING.items()}

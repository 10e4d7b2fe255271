"""How far training moved each module in magnitude and in direction: the paper's weight-decomposition analysis.

Per output row j, with W0 the pretrained and W the trained weight (Eq. 3 and 4 of arXiv 2402.09353):

    dM = mean_j | m[j] - ||W0[j]|| |          m[j] = ||W[j]||, or DoRA's magnitude parameter
    dD = mean_j (1 - cos(W[j], W0[j]))        rows that are zero in W0 or W have no direction and are left out

W0 is the base layer's weight as it is: with PiSSA and other initialisations that change it, the changed one. Weights
that are sharded across processes (FSDP, ZeRO-3) have to be saved first and read by `decompose_folder`.

change.py measures one module and decomposition.py all of a model; callback.py records during training, history.py says
what a record is, correlation.py and plots.py evaluate the records, and command.py does all of it for saved runs:
`python -m dora_peft.analysis --help`.
"""

from .callback import DecompositionCallback
from .change import Change, compare_low_rank, compare_weights
from .command import load_base, main, read_run
from .correlation import Correlation, correlate, correlate_by_step
from .decomposition import decompose, decompose_folder
from .history import History, to_history
from .plots import draw_correlations, draw_pattern, draw_trajectories, layer_kind

__all__ = [
    "Change",
    "Correlation",
    "DecompositionCallback",
    "History",
    "compare_low_rank",
    "compare_weights",
    "correlate",
    "correlate_by_step",
    "decompose",
    "decompose_folder",
    "draw_correlations",
    "draw_pattern",
    "draw_trajectories",
    "layer_kind",
    "load_base",
    "main",
    "read_run",
    "to_history",
]

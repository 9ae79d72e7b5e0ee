"""Import path of timm, which is installed in a separate folder.

timm needs torchvision, whose wheels on the package index have operators that look for CUDA. Beside
a CPU build of torch they do not load, and take timm and transformers with them; two operators that
are declared first cure it. Import this module before timm. A user's torchvision fits a user's
torch: the installed packages know nothing of this.
"""

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "vision"

if importlib.util.find_spec("timm") is None and FOLDER.is_dir():
    sys.path.append(str(FOLDER))

if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    # Kept, as the declarations go when it goes.
    DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import ipa_timm  # noqa: E402, F401  (where timm is missing, this says so, with the cure)

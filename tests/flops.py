"""Operations of products with weights, as torch counts them: those of attention are of another kind, and rows of zeros do not count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf.models import linear

BY_ONEDNN = torch.ops.mkldnn._linear_pointwise


def _of_onednn(rows: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows) * weight[0]


def counted(run: Callable[[], object]) -> int:
    with patch.object(linear, "STEP", 1), FlopCounterMode(display=False, custom_mapping={BY_ONEDNN: _of_onednn}) as counter:
        run()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm, BY_ONEDNN))

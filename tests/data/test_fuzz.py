"""No file gives a traceback, and no row that is taken says anything else than its file: RLHF_FUZZ=20000 pytest tests/data/test_fuzz.py"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tests.data.fuzz import trial


def test_mutated_files(tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for seed in range(int(os.environ.get("RLHF_FUZZ", "400"))):
        try:
            found += trial(seed, tmp_path)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        for path in tmp_path.iterdir():
            path.unlink()
    print(dict(found))
    assert min(found["taken"], found["quarantined"], found["refused"]) > 0

"""Preference pairs that a benchmark makes, as a source of params.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "chosen", "rejected", "messages", "question", "answer", "text")
NONE = dict.fromkeys(("text", "sft", "reward", "ppo", "judge", "heldout"), 0)


def source(file: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write pairs to a file; the source, from whose rows the reward model alone learns."""
    wanted = ({key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in wanted), encoding="utf-8")
    found: dict[str, Any] = {"name": file.stem, "format": "pairs", "path": str(file), "hub": None, "revision": None, "hub_split": None}
    return json.dumps(found | {"split": NONE | {"reward": 1}, "weight": 1, "columns": {name: name for name in COLUMNS}})

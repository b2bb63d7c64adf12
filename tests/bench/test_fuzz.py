"""Some of the mutations of bench/faults/fuzz.py; RLHF_FUZZ in the environment asks for more."""

from __future__ import annotations

import os

from bench.faults.fuzz import CASES, fuzz

MUTATIONS = int(os.environ.get("RLHF_FUZZ", "400"))


def test_what_people_edit_is_read_as_it_stands_or_refused() -> None:
    counts, wrong = fuzz(MUTATIONS, seed=7)
    assert not wrong, "\n".join(wrong)
    for kind in CASES:
        assert counts[f"{kind} loaded"], counts
        assert counts[f"{kind} refused"], counts

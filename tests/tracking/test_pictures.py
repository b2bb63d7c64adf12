"""Pictures of tables: drawn once, and taken again while the table is the same."""

from __future__ import annotations

from pathlib import Path

from rlhf.tracking import pictures


def test_a_table_that_stayed_the_same_is_not_drawn_again(tmp_path: Path) -> None:
    kept, table = tmp_path / "kept", tmp_path / "sft.csv"
    table.write_text("step,loss\n1,2\n2,1\n", encoding="utf-8")
    pictures.draw_all({table: {"x": "step"}}, kept)
    (first,) = kept.iterdir()
    drawn = table.with_suffix(".png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    first.write_bytes(b"kept")  # what is taken from there is seen
    pictures.draw_all({table: {"x": "step"}}, kept)
    assert table.with_suffix(".png").read_bytes() == b"kept"
    table.write_text("step,loss\n1,2\n2,0\n", encoding="utf-8")
    pictures.draw_all({table: {"x": "step"}}, kept)
    (other,) = kept.iterdir()
    assert other != first
    assert table.with_suffix(".png").read_bytes() not in (b"kept", drawn)

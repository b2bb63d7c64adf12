"""YAML."""

from __future__ import annotations

import pytest

from rlhf.documents import YAMLError, load_yaml


def test_plain_values_alone() -> None:
    assert load_yaml("a: [1, 2.5e-3, null, yes]\nb: 'x: y'\n") == {"a": [1, 2.5e-3, None, True], "b": "x: y"}
    with pytest.raises(YAMLError, match="could not determine a constructor"):
        load_yaml("a: !!python/object/apply:os.system ['true']")

"""YAML that DVC has written: dvc.lock and .dvc files. What people write, rlhf/config/text.py reads."""

from __future__ import annotations

from typing import Any

import yaml

YAMLError = yaml.YAMLError  # what load_yaml raises


def load_yaml(text: str) -> Any:
    """What a YAML text holds; plain values alone.

    Raises:
        YAMLError: it is no YAML.
    """
    # libyaml: ten times as fast, and a run reads dvc.lock many times
    return yaml.load(text, Loader=yaml.CSafeLoader)

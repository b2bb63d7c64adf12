"""Prefect flows."""

import tasks  # noqa: F401  it sets what Prefect reads at its own import

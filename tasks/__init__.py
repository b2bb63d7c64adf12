"""Prefect tasks of the flow. Importing this package sets what Prefect reads once, at its own import: nothing is reported to anyone."""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# without PREFECT_API_URL a server lives as long as the flow; it may be slow to start on a busy machine
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "WARNING")

"""Imports Ray Serve before the tests do: its models still use what pydantic is about to drop, and warn of it."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray.serve  # noqa: F401 - for the models to be made

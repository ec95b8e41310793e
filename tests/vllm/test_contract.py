"""The contract of every engine, held by vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deployments.engine.api import Engine
from tests.contract.test_engine_contract import *  # noqa: F403 - the suite itself
from tests.contract.test_engine_contract import Maker


@pytest.fixture
def maker(make: Callable[[int], Engine]) -> Maker:
    return Maker("vllm", make)

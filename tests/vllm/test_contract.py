"""The contract of every engine, held by vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deployments.engine.api import Engine
from tests.contract import test_engine_contract as suite
from tests.contract.engines import Maker

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})


@pytest.fixture
def maker(make: Callable[[int], Engine]) -> Maker:
    return Maker("vllm", make)

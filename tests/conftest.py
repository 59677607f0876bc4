"""What every test shares: no network, no telemetry, and the same hypothesis examples in every run."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st

# Before anything imports Flower or Hugging Face: both read their environment once.
os.environ |= {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

from fedapt.privacy.randomness import SimulationRandomness
from fedapt.protocols.layout import AdapterLayout

from .layouts import layouts

st.register_type_strategy(AdapterLayout, layouts())
settings.register_profile("plain", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("deep", derandomize=True, deadline=None, max_examples=100)  # `make test-slow`
settings.load_profile("plain")


@pytest.fixture
def one_stream_of_secrets() -> Iterator[None]:
    """The operating system's octets from a key, for audits alone: a false alarm would else come now and then."""
    with patch("os.urandom", SimulationRandomness(1).octets):
        yield


def pytest_configure(config: pytest.Config) -> None:
    # typer, which Flower imports as well, uses names that click has deprecated; we can change neither.
    config.addinivalue_line("filterwarnings", r"ignore:'click\.:DeprecationWarning")

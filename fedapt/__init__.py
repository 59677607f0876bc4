"""fedapt: federated fine-tuning of adapters.

    result = fedapt.simulate(model=peft_model, clients=[dataset, …], recipe="fedsvd", rounds=10)
    strategy = fedapt.strategy("fedsvd")  # in FedAvg's place in a Flower ServerApp of your own

Nothing heavy is imported before it is used.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import simulate
    from .protocols.spec import RunSpec
    from .server.strategy import strategy
    from .simulation import Result, run

__version__ = _version("fedapt")
__all__ = ["Result", "RunSpec", "__version__", "run", "simulate", "strategy"]

_HOMES = {
    "simulate": "api",
    "strategy": "server.strategy",
    "run": "simulation",
    "Result": "simulation",
    "RunSpec": "protocols.spec",
}


def __getattr__(name: str) -> Any:
    """Public names on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedapt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

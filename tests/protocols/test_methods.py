"""The table of adapter methods is whole, and its one exact statement holds."""

from typing import get_args

from fedapt.protocols.methods import METHODS
from fedapt.protocols.spec import Adapter


def test_every_method_of_the_spec_is_in_the_table() -> None:
    assert set(METHODS) == set(get_args(Adapter.model_fields["method"].annotation))


def test_every_row_says_what_is_linear() -> None:
    assert all(
        method.linear.startswith(("yes", "no")) and method.summary and method.paper for method in METHODS.values()
    )

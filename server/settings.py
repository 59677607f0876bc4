"""The operator's file, `server.toml`: where the server listens, what sites are told, and where runs are kept."""

import tomllib
from pathlib import Path
from typing import Self

from pydantic import Field

from ..protocols.errors import SpecError
from ..protocols.identity import checked_address
from ..protocols.spec import Section
from .link.limits import Limits

NAME = "server.toml"

TEMPLATE = """\
# The federation's server. Keys and certificates lie beside this file, and belong to nobody else.

listen = "{listen}"
address = "{address}"       # what join tokens tell the sites
store = "store.sqlite"      # or postgresql+psycopg://user@host/fedapt, its password in the environment (PGPASSWORD)
runs = "runs"               # adapters, metrics and reports

[limits]                    # bytes and seconds; what is not here has its default
# result_bytes = 1073741824 # a node's description of the model; its updates are held to what the run needs
# streams_per_address = 1000
# silence = 20.0            # a node that said nothing for so long is gone
# absence = 30.0            # a round does not wait longer for one that is
"""


class ServerSettings(Section):
    """Paths are relative to the file's folder."""

    listen: str = "0.0.0.0:7443"
    address: str
    store: str = "store.sqlite"
    runs: Path = Path("runs")
    limits: Limits = Field(default_factory=Limits)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises SpecError where the file is not there, or holds what it may not."""
        path = folder / NAME
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(f"{path}: no such file; `fedapt server init` makes one") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SpecError(f"{path}: cannot be read ({error})") from None
        found = cls.check(raw, where=str(path))
        checked_address(found.address)
        store = found.store if "://" in found.store else str(folder / found.store)
        return found.model_copy(update={"store": store, "runs": folder / found.runs})


def write_settings(folder: Path, address: str, listen: str) -> Path:
    """A commented file; one that is there already stays as it is."""
    path = folder / NAME
    if not path.exists():
        path.write_text(TEMPLATE.format(address=checked_address(address), listen=listen), encoding="utf-8")
    return path

"""Whether a round has the answers that it needs, and what becomes of it where it never will.

| too few answers, because of              | the round                                                     |
|------------------------------------------|---------------------------------------------------------------|
| nodes that may answer yet                | stays open: RunError                                          |
| nodes whose own cap on ε leaves no room  | is not released, and the run ends                             |
| … while enough of all nodes have room    | is passed over without a change, as a draw of nobody would be |

Such caps are of privacy of examples: a node's account is its own affair, and all that it tells is that there is no room.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from ..privacy.ledger import NO_ROOM
from ..protocols.errors import RunError
from ..protocols.spec import RunSpec
from ..protocols.update import Update

logger = logging.getLogger(__name__)


class Quorum:
    """One run's rule. `spent` are the nodes that have said of themselves that their caps leave no room.

    They are asked again all the same, because a site may raise its cap.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.spent: set[int] = set()
        client_level = spec.privacy.unit == "client"
        # A private round is released whoever has failed, unless the spec says otherwise: that it was not would tell.
        self.least = spec.participation.minimum if client_level else max(1, spec.participation.minimum)

    def taken(
        self,
        what: str,
        cohort: Collection[int],
        updates: Sequence[Update],
        reasons: Sequence[tuple[int, str]],
        everybody: Callable[[], Iterable[int]],
    ) -> Sequence[Update] | None:
        """The updates to release the round with, of those that came; None where the run ends. `what` names it in messages.

        `reasons` are (node, why it gave none), and `everybody` gives the nodes that are there. Raises RunError where
        nodes that have not answered may do so yet.
        """
        if self.spec.privacy.unit == "example":
            self.spent |= {node for node, reason in reasons if NO_ROOM in reason}
            self.spent -= {update.node for update in updates}
        least = min(self.least, len(cohort))
        if len(updates) >= least:
            return updates
        if self._have_room(cohort) >= least:
            why = reasons[0][1] if reasons else "no answer"
            raise RunError(
                f"{what}: {len(updates)} of {len(cohort)} nodes took part within "
                f"{self.spec.participation.deadline_seconds:g} s, and {least} are needed ({why}). "
                "It stays open: start the run again to go on with it."
            )
        if self._have_room(everybody()) >= self.least:
            logger.warning("%s is passed over: the caps of too many of its nodes are spent", what)
            return []
        return None

    @property
    def ending(self) -> str:
        """Why a run ends for which `taken` was None."""
        if self.least == 1:
            return "every site's cap on epsilon is spent: the run ends here"
        return f"fewer sites than participation.minimum = {self.least} have room under their caps on epsilon: the run ends here"

    def _have_room(self, nodes: Iterable[int]) -> int:
        """How many of the nodes have not said that they have no room; `least` of them are counted at most."""
        return len(list(islice((node for node in nodes if node not in self.spent), self.least)))

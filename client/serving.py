"""A site's process: the link, the worker behind it, and how both end."""

import asyncio
import logging
import signal
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..protocols import link_pb2 as pb
from ..protocols.link import NAME_KEY
from .dialling import channel_of, node_of
from .duties import Duties
from .enrolment import SiteKeys
from .kept import Kept
from .link import Backoff, Link
from .resident import RESULTS, Resident, Save
from .site import Site
from .status import Status, is_paused

logger = logging.getLogger(__name__)


def serve(site: Site, folder: Path, save: Save, *, once: bool = False, backoff: Backoff | None = None) -> None:
    """Stay with the server until Ctrl-C or SIGTERM; with `once`, until it has taken the update of one round.

    Raises RejectedError where the server refuses this node for good, TrustError where there is no key to show it, or
    where its certificate has run out; and, before it connects, PrivacyError and OutputError where the site's ledger is
    broken or cannot be used, for it would then refuse round after round.
    """
    if site.train.threads is not None:
        torch.set_num_threads(site.train.threads)
    status = Status(folder)
    resident = Resident(site, node_of(site.server), folder, save=save, status=status)
    asyncio.run(_serve(resident, once, backoff))


async def _serve(resident: Resident, once: bool, backoff: Backoff | None) -> None:
    site, folder = resident.site, resident.folder

    def closed(received: pb.Received) -> None:
        if once and received.question == resident.trained:
            leave("its one round is done")

    def resting() -> str:
        return "paused" if is_paused(folder) else "" if site.schedule.allows(datetime.now()) else "outside its hours"

    def leave(reason: str) -> None:
        logger.info("leaving: %s", reason)
        own.leave(reason)
        resident.halfway.stop()

    def interrupted() -> None:
        for number in SIGNALS:  # a second one ends the process as it would end any other
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # and not Python's, which would wait for the work's thread
        leave("this node was stopped")

    duties = Duties(resident, Kept(folder / RESULTS), resting=resting, closed=closed)
    own = Link(
        channel_of(site.server),
        duties,
        backoff=backoff,
        connected=resident.status.connected,
        metadata=[] if site.server.plaintext is None else [(NAME_KEY, site.server.plaintext)],
        renewal=Certificate(site.server.keys) if site.server.plaintext is None else None,
        rank=site.train.most_rank or 0,
    )
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, interrupted)
    await own.run()


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Certificate:
    """The renewal of a site's certificate."""

    def __init__(self, keys: Path) -> None:
        self.keys = SiteKeys(keys)

    def due(self) -> bytes | None:
        return self.keys.request() if self.keys.renewal_due(datetime.now(UTC)) else None

    def accept(self, chain: bytes) -> None:
        self.keys.accept(chain)

    def require_valid(self) -> None:
        self.keys.require_valid(datetime.now(UTC))

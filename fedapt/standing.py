"""How a site's client stands, read from its folder: nothing is asked of the process that may be running there."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .client.enrolment import SiteKeys
from .client.site import Site
from .client.status import is_paused, is_served, read_status
from .protocols.identity import TrustError

LEDGERS = "accounts"


def standing(folder: Path) -> dict[str, Any]:
    """`running`, `paused`, what the process last said of itself, `spent` (None: nothing) and the certificate's end."""
    running = is_served(folder)
    facts = {"folder": str(folder), "running": running, "paused": is_paused(folder), **read_status(folder)}
    if not running:
        facts |= {"connected": False, "doing": "nothing"}
    site = Site.load(folder)
    facts["spent"] = _spent(folder, site.policy.delta)
    facts["most_epsilon"] = site.policy.most_epsilon
    facts["server"], facts["expires"], facts["warning"] = site.server.address, None, None
    if site.server.plaintext is None:
        facts |= _certificate(SiteKeys(site.server.keys), datetime.now(UTC))
    return facts


def standing_text(facts: Mapping[str, Any]) -> str:
    state = "paused" if facts["paused"] else "running" if facts["running"] else "not running"
    link = f"connected since {facts['since']}" if facts["connected"] else f"not connected ({facts.get('why') or '-'})"
    lines = [f"{state}; {facts['server']}: {link if facts['running'] else 'not connected'}"]
    if facts["running"]:
        lines.append(f"doing        {facts.get('doing', 'idle')}")
    for row in facts.get("rounds", []):
        loss = f", loss {row['loss']:.4g}" if "loss" in row else ""
        reason = f": {row['reason']}" if "reason" in row else ""
        lines.append(f"{row['at']}  {row['run']} round {row['round']}: {row['kind']}{loss}{reason}")
    if facts["spent"] is not None:
        spent, most = facts["spent"], facts["most_epsilon"]
        cap = f" of {most:g}" if most is not None else ""
        lines.append(f"privacy      epsilon {spent['epsilon']:.4f}{cap} at delta {spent['delta']:g}, over all runs")
    if facts["expires"] is not None:
        lines.append(f"certificate  until {datetime.fromisoformat(facts['expires']):%Y-%m-%d}, renewed by itself")
    if facts["warning"] is not None:
        lines.append(f"WARNING      {facts['warning']}")
    return "\n".join(lines)


def _certificate(keys: SiteKeys, now: datetime) -> dict[str, str | None]:
    """When it `expires`, and a `warning` where it is due to be renewed, which a node that is connected does by itself."""
    expires, warning = keys.peer.expires, None
    try:
        keys.require_valid(now)
        if keys.renewal_due(now):
            warning = (
                f"the certificate ends in {(expires - now).days} days, and is renewed only while this site is connected: "
                "run `fedapt client start` before, or the site has to join again with a new token"
            )
    except TrustError as error:
        warning = str(error)
    return {"expires": expires.isoformat(), "warning": warning}


def _spent(folder: Path, delta: float) -> dict[str, float] | None:
    """ε of all that the site's ledger holds; None where nothing was charged."""
    files = sorted((folder / LEDGERS).glob("*.sqlite"))
    if not files:
        return None
    from .privacy.ledger import SiteLedger

    spent = [SiteLedger(file).ledger().spent(delta).epsilon for file in files]
    return {"epsilon": max(spent), "delta": delta}

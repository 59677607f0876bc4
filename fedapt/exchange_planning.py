"""What exchanges of codes will cost: bytes, as the run counts them, and how long a segment of the lattice lasts."""

from .client.zeroth import PROBE_TOKENS
from .protocols.exchange import PROOF_EVERY, Step, Terms, terms_of
from .protocols.spec import RunSpec
from .server.exchanges import wire_bytes
from .server.pacing import Pace


def exchange_traffic(spec: RunSpec, answering: int) -> tuple[int, int]:
    """Bytes down and up of one node that takes part in every exchange of a run, of `answering` nodes each.

    It is in step throughout: whoever joins late is sent what it lacks, beside this.
    """
    terms, numbers = terms_of(spec), range(1, spec.run.rounds + 1)
    steps = {proven: _step(terms, answering, proven) for proven in (False, True)}
    each = [
        wire_bytes(spec, terms, number, steps[(number - 1) % PROOF_EVERY == 0] if number > 1 else None)
        for number in numbers
    ]
    return sum(down for down, _ in each), sum(up for _, up in each)


def longest_segment(spec: RunSpec, answering: int) -> int:
    """Exchanges that one segment of the lattice holds, whatever nodes send. Raises SpecError where it holds none."""
    terms = terms_of(spec)
    return Pace(spec, answering * terms.directions, terms.code.largest).longest_segment


def probes_together(spec: RunSpec) -> int:
    """Probes whose rows run as one batch, at full length."""
    points = 2 * spec.zeroth.directions if spec.zeroth.sides == "two" else 1 + spec.zeroth.directions
    return max(1, min(points, PROBE_TOKENS // (spec.local.batch_size * spec.model.max_length)))


def _step(terms: Terms, answering: int, proven: bool) -> Step:
    body = bytes(4 * terms.directions if terms.mode == "shared" else answering * terms.record)
    return Step(1, 1, 0, 1, 0, body, bytes(32) if proven else b"")

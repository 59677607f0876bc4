"""What one node, one address or one frame may cost the server. All of it can be set in the server's file."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from ...protocols.spec import Section


class Limits(Section):
    """Sizes in bytes, times in seconds.

    `result_bytes` is the most that any answer has; of a run whose layout is known, an answer has no more than it needs.
    A node that said nothing for `silence` is taken for gone; one that is gone for `absence` in a round fails that round.
    """

    result_bytes: PositiveInt = 1 << 30
    streams_per_address: PositiveInt = 1000
    connections_handshake: PositiveFloat = 10.0
    hello: PositiveFloat = 10.0
    beat: Annotated[float, Field(ge=0.01, le=3600)] = 5.0
    silence: PositiveFloat = 20.0
    absence: PositiveFloat = 30.0
    revocation_poll: PositiveFloat = 0.5

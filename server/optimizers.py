"""Server optimizers: the aggregate of a round, taken as a step, moves the state.

| here         | FedOpt (arXiv 2003.00295) | meaning                            |
|--------------|---------------------------|------------------------------------|
| `change`     | Δ_t                       | the round's aggregate              |
| `buffers`    | m_t, v_t                  | first and second moments           |

Pure functions: buffers go in and come out, so that a store can keep them and FedSVD can rotate them.
"""

import numpy as np

from ..protocols.layout import Flat
from ..protocols.spec import Recipe

Buffers = dict[str, Flat]
ADAM_BETAS, ADAM_TAU = (0.9, 0.99), 1e-3


def step(change: Flat, buffers: Buffers, settings: Recipe) -> tuple[Flat, Buffers]:
    """The step to add (fp32, like `change`), and the buffers for the next round ({} at the first)."""
    rate = np.float32(settings.learning_rate)
    match settings.optimizer:
        case "sgd":
            return rate * change, {}
        case "nesterov":
            decay = np.float32(settings.momentum)
            momentum = decay * buffers.get("momentum", np.zeros_like(change)) + change
            return rate * (change + decay * momentum), {"momentum": momentum}
        case "adam":
            beta1, beta2 = (np.float32(b) for b in ADAM_BETAS)
            zero = np.zeros_like(change)
            first = beta1 * buffers.get("first", zero) + (1 - beta1) * change
            second = beta2 * buffers.get("second", zero) + (1 - beta2) * change**2
            adapted = rate * first / (np.sqrt(second) + np.float32(ADAM_TAU))
            return adapted.astype(np.float32), {"first": first, "second": second}

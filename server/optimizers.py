"""Server optimizers: the aggregate of a round, taken as a step, moves the state.

| here         | papers    | meaning                                                                              |
|--------------|-----------|--------------------------------------------------------------------------------------|
| `change`     | Δ_t       | the round's aggregate                                                                |
| `momentum`   | m_t       | first moment: linear in the state, so FedSVD rotates it with the state               |
| `second`     | v_t       | second moment: of each value (Adam), or one number a tensor (NovoGrad)               |

FedOpt (arXiv 2003.00295, algorithm 2) is Adam here. NovoGrad (arXiv 1905.11286, algorithm 1) divides a whole tensor by
its root mean square; that number does not change when a tensor is rotated, so NovoGrad is the adaptive optimizer that
is legal where a basis turns.

Pure functions: buffers go in and come out, so that a store can keep them.
"""

import numpy as np

from ..protocols.layout import AdapterLayout, Flat
from ..protocols.spec import Recipe

Buffers = dict[str, Flat]
ADAM_BETAS, ADAM_TAU = (0.9, 0.99), 1e-3
NOVOGRAD_BETA, NOVOGRAD_TAU = 0.98, 1e-8


def step(change: Flat, buffers: Buffers, settings: Recipe, layout: AdapterLayout) -> tuple[Flat, Buffers]:
    """The step to add (fp32, like `change`, over `layout`), and the buffers for the next round ({} at the first)."""
    rate = np.float32(settings.learning_rate)
    decay = np.float32(settings.momentum)
    momentum = buffers.get("momentum", np.zeros_like(change))
    match settings.optimizer:
        case "sgd":
            return rate * change, {}
        case "nesterov":
            momentum = decay * momentum + change
            return rate * (change + decay * momentum), {"momentum": momentum}
        case "adam":
            beta1, beta2 = (np.float32(b) for b in ADAM_BETAS)
            momentum = beta1 * momentum + (1 - beta1) * change
            second = beta2 * buffers.get("second", np.zeros_like(change)) + (1 - beta2) * change**2
            adapted = rate * momentum / (np.sqrt(second) + np.float32(ADAM_TAU))
            return adapted.astype(np.float32), {"momentum": momentum, "second": second}
        case "novograd":
            squares = mean_squares(change, layout)
            second = (
                np.float32(NOVOGRAD_BETA) * buffers.get("second", squares) + np.float32(1 - NOVOGRAD_BETA) * squares
            )
            sizes = [tensor.size for tensor in layout.tensors]
            scale = np.repeat(np.sqrt(second) + np.float32(NOVOGRAD_TAU), sizes)
            momentum = decay * momentum + (1 - decay) * change / scale
            return (rate * momentum).astype(np.float32), {"momentum": momentum, "second": second}


def mean_squares(change: Flat, layout: AdapterLayout) -> Flat:
    """The mean square of each tensor, fp32, (tensors,); 0 for an empty one."""
    tensors = layout.split(change)
    means = [np.mean(np.square(tensors[t.name], dtype=np.float64)) if t.size else 0.0 for t in layout.tensors]
    return np.asarray(means, np.float32)

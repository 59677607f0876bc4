"""Adapter methods: what `[adapter] method` may be, and how far a mean of what it trains is a mean of what it does.

Pure data, for `fedapt recipes`. Every method but `lora` goes with the recipe `fedit`, the mean of each trained tensor. Where
ΔW (or the logits) are affine in what is trained, that mean is the mean of the nodes' changes; elsewhere it holds to
first order only. A classifier trained beside an adapter multiplies with its features, so together they are bilinear.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`linear` says in words what the model is linear in, as far as it is."""

    name: str
    summary: str
    paper: str
    linear: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lora",
            "low-rank factors, ΔW = s·B·A",
            "LoRA, arXiv 2106.09685",
            "no: bilinear in A and B; yes where A is fixed",
        ),
        Method(
            "dora",
            "LoRA with a trained magnitude for each row of the weight",
            "DoRA, arXiv 2402.09353",
            "no: magnitude × direction",
        ),
        Method(
            "adalora",
            "P·Λ·Q with fixed ranks, because nodes would prune differently",
            "AdaLoRA, arXiv 2303.10512",
            "no: trilinear",
        ),
        Method(
            "vera",
            "two vectors around shared random projections",
            "VeRA, arXiv 2310.11454",
            "no: bilinear in its two vectors",
        ),
        Method(
            "nola",
            "factors that are sums of seeded random matrices, whose coefficients are trained",
            "NOLA, arXiv 2310.02556",
            "no: bilinear in the coefficients of A and those of B; yes in each of the two",
        ),
        Method(
            "ia3",
            "a scale for each output of the targets",
            "(IA)³, arXiv 2205.05638",
            "yes, each module's ΔW",
        ),
        Method(
            "prompt",
            "virtual tokens before the text",
            "prompt tuning, arXiv 2104.08691",
            "no: through attention",
        ),
        Method(
            "prefix",
            "keys and values before the text in every layer",
            "prefix tuning, arXiv 2101.00190",
            "no: keys pass a softmax",
        ),
        Method(
            "bottleneck",
            "a small network behind attention and feed-forward",
            "Houlsby adapters, arXiv 1902.00751",
            "no: two layers and a nonlinearity",
        ),
        Method("bias", "every bias of the base", "BitFit, arXiv 2106.10199", "yes in the biases; the network is not"),
        Method("head", "the classifier alone", "linear probing", "yes, the logits of a linear classifier"),
        Method(
            "full",
            "every parameter, for small models",
            "FedAvg, arXiv 1602.05629",
            "yes in the weights; the network is not",
        ),
    )
}

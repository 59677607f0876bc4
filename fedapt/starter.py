"""The spec that `fedapt init` writes: it runs as it is, offline, and says what each key is for."""

from .protocols.legality import recipe_of
from .protocols.recipes import RECIPES
from .protocols.spec import RunSpec

STARTER = """\
# A fedapt run. Check it with `fedapt plan`, run it with `fedapt simulate`.

[run]
name = "first"
rounds = 10
seed = 7                        # the same spec and seed give the same adapter, byte for byte
# patience = 3                  # stop after so many evaluations without progress

[model]
base = "builtin:byte-llama"     # any Hugging Face id or local folder
task = "causal-lm"              # causal-lm | sequence-classification | prompted-classification | image-classification
# labels = 2                    # classes, for the classification tasks
# template = "{{text}} It was"    # of prompted-classification, with verbalizers = ["terrible", "great"]
max_length = 128                # tokens
precision = "fp32"              # of the frozen base: fp32 | bf16; adapters are always fp32

[adapter]
method = "lora"                 # with recipe "fedit" also dora | adalora | vera | ia3 | prompt | prefix | bottleneck |
                                # nola | bias | head | full
# virtual_tokens = 16           # of a prompt or a prefix
# bottleneck = 16               # inner width of a bottleneck
# bases = 64                    # of nola: numbers that travel for each factor
# layers = [4, 5]               # only these transformer blocks
# public = "public.jsonl"       # with recipe.initial_a = "eva": A starts from it
rank = 8
alpha = 16                      # the product is scaled by alpha / rank
targets = "all-linear"          # or names of modules: ["query", "value"]
# ranks = [2, 4, 8]             # what sites can afford; for recipes that mix ranks
# start = "runs/before/adapter" # begin from an adapter that is there already

[recipe]
name = "{recipe}"{pad}# {summary}
# optimizer = "nesterov"        # of the server: {optimizers}
# aggregator = "mean"           # or against bad nodes: geometric-median | krum | multi-krum | clip | median | …
                                # or by what helps: fisher | greedy-soup
# weighting = "examples"        # clip, median, trimmed-mean and geometric-median need "uniform"

[local]
optimizer = "adamw"             # adamw | sgd
learning_rate = 5e-3
batch_size = 8
steps = 4                       # batches a round; or epochs = 1

[participation]
sampling = "fixed"              # all | fixed | poisson
rate = 0.05                     # share of the nodes in a round

[wire]
codec = "int8"                  # of updates: fp32 | bf16 | int8 | fp4 | top-k | seed-projection
# density = 0.1                 # the share of the values that top-k sends

# [fleet]                       # a simulation's devices: the report then says what a deployment would take
# examples_per_second = 10      # of the median device
# uplink_mbps = 5
# dropout = 0.1

[data]
source = "builtin:stdlib"       # .jsonl, .csv, .parquet, a hub dataset, builtin:stdlib, builtin:digits
# evaluation = "test.jsonl"     # without it, `holdout` of the source is kept for evaluation
holdout = 0.1
evaluation_limit = 256         # examples scored after a round

[data.partition]
kind = "natural"                # iid | dirichlet | pathological | by-column | natural
column = "module"
# clients = 100                 # for the kinds that draw
"""


FIRST_ORDER_ALONE = """\
steps = 4                       # batches a round; or epochs = 1
"""
WIRE = STARTER[STARTER.index("[wire]") : STARTER.index("[data]")]
ZEROTH = """\
[zeroth]                        # a round is one exchange: one byte a direction goes up, and everybody's come down
directions = 16                 # that a node probes in an exchange
radius = 1e-2                   # of a probe
code = "int8"                   # int8 | log8 | 1-bit

"""


def starter_spec(recipe: str) -> str:
    """The text for a recipe. Raises SpecError for an unknown name."""
    check = {"model": {"base": "x", "task": "causal-lm"}, "recipe": {"name": recipe}}
    known = recipe_of(RunSpec.check(check, where="--recipe"))
    text = STARTER.replace(FIRST_ORDER_ALONE, "").replace(WIRE, ZEROTH) if known.zeroth else STARTER
    return text.format(
        recipe=recipe,
        pad=" " * max(1, 24 - len(recipe)),
        summary=RECIPES[recipe].summary,
        optimizers=" | ".join(known.server_optimizers),
    )

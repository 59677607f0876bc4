"""One step of DP-SGD: the cohort of examples beside Opacus' hooks, on a Hugging Face encoder.

    python benchmarks/dpsgd.py --model FOLDER [--text FILE.jsonl] [--threads 2] [--repeat 9] [--json]

A step is 32 examples' gradients, clip, sum, noise and SGD; LoRA of rank 8 on query and value, and a new classifier. Ours
draws exact noise from the operating system; Opacus draws floating-point noise (`secure_mode` off) and runs without
dropout, as we do. The two take turns, so that a busy machine slows both; figures are medians.

    32 tokens            every example has 32 tokens, and adapters are in every block
    32 tokens, last two  adapters are in the last two blocks: what is below is frozen and runs once an example
    text                 the `text` of FILE, cut at 64 tokens: Opacus gets batches padded to their longest
    text, last two       both
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedapt.client.adapted import adapt
from fedapt.client.private import PrivateTrainer
from fedapt.client.tasks import Examples, SequenceClassification
from fedapt.client.trainer import Member
from fedapt.kernels.cohort import Batched
from fedapt.privacy.example_level import ExampleLevel
from fedapt.privacy.randomness import SecretRandomness
from fedapt.protocols.spec import Local

BATCH, LENGTH, CUT = 32, 32, 64
LOCAL = Local(optimizer="sgd", learning_rate=0.1, batch_size=BATCH, steps=1)


def model_of(folder: str, layers: list[int] | None) -> Any:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], layers_to_transform=layers, task_type="SEQ_CLS"
    )
    return get_peft_model(base, config)


def of_length(length: int) -> Examples:
    random = np.random.default_rng(0)
    ids = [random.integers(1000, 20000, length) for _ in range(BATCH)]
    return Examples(ids, list(random.integers(0, 2, BATCH)), np.arange(BATCH))


def of_text(folder: str, file: str) -> Examples:
    """A random batch of the file's lines."""
    with open(file, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    chosen = np.random.default_rng(0).choice(len(texts), BATCH, replace=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([texts[i] for i in chosen], truncation=True, max_length=CUT)["input_ids"]
    return Examples([np.array(row) for row in ids], list(np.arange(BATCH) % 2), np.arange(BATCH))


def ours(model: Any, examples: Examples) -> Callable[[], object]:
    adapted = adapt(model, SequenceClassification(None, CUT))
    names = list(adapted.parameter_names.values())
    mechanism = ExampleLevel(1.0, 1.0, BATCH, BATCH, adapted.layout.size)
    trainer = PrivateTrainer(
        adapted, Batched(model, names), adapted.layout, LOCAL, lambda _: mechanism, lambda _: SecretRandomness()
    )
    member = Member([np.arange(BATCH)], 0)
    return lambda: trainer.train(examples, [member])


def opacus(model: Any, examples: Examples) -> Callable[[], object]:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    hooked = GradSampleModule(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    stock = torch.optim.SGD(trained, lr=LOCAL.learning_rate)
    optimizer = DPOptimizer(stock, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH)
    rows = [torch.tensor(ids) for ids in examples.inputs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = torch.tensor([int(label) for label in examples.labels])

    def step() -> None:
        optimizer.zero_grad()
        logits = hooked(input_ids=ids, attention_mask=mask).logits
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels))
        optimizer.step()

    return step


def seconds(method: Callable[[], object]) -> float:
    started = time.perf_counter()
    method()
    return time.perf_counter() - started


def compared(model: Any, examples: Examples, repeat: int) -> dict[str, float]:
    """Median seconds of a step, both ways."""
    methods = {"opacus": opacus(copy.deepcopy(model), examples), "cohort": ours(model, examples)}
    for method in methods.values():
        method()  # compiled and warm, frozen blocks kept
    turns = [{name: seconds(method) for name, method in methods.items()} for _ in range(repeat)]
    return {name: median(turn[name] for turn in turns) for name in methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    whole = model_of(arguments.model, None)
    upper = [whole.config.num_hidden_layers - 2, whole.config.num_hidden_layers - 1]
    cases: dict[str, tuple[Any, Examples]] = {
        "32 tokens": (whole, of_length(LENGTH)),
        "32 tokens, last two": (model_of(arguments.model, upper), of_length(LENGTH)),
    }
    if arguments.text:
        text = of_text(arguments.model, arguments.text)
        cases |= {
            "text": (model_of(arguments.model, None), text),
            "text, last two": (model_of(arguments.model, upper), text),
        }
    results = {name: compared(*case, arguments.repeat) for name, case in cases.items()}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, times in results.items():
        ratio = times["opacus"] / times["cohort"]
        print(f"{name:22} cohort {times['cohort']:.3f} s   Opacus {times['opacus']:.3f} s   {ratio:.2f}×")


if __name__ == "__main__":
    main()

"""Pre-train the byte-level Llama-shaped base model that `fedapt demo` adapts.

    python scripts/pretrain_base.py --out client/builtin/byte-llama --minutes 20

The text is the prose of Python's language reference as Python itself ships it (`pydoc_data.topics`, PSF licence),
so the base has read *about* code but has seen none of the modules that the demo's clients hold. Weights are stored
in bfloat16: 1.8 M parameters in less than 4 MB.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
HELD_OUT = 0.05


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a BPE without merges over the 256 byte symbols, plus the three special tokens."""
    specials = ["<|pad|>", "<|bos|>", "<|eos|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        model_max_length=1024,
    )


def base_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def random_batch(tokens: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(tokens) - CONTEXT, (size,), generator=generator)
    return torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [float(model(input_ids=rows, labels=rows).loss) for rows in torch.split(windows, 32)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()

    tokenizer = byte_tokenizer()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    cut = int(len(tokens) * (1 - HELD_OUT))
    train, held_out = tokens[:cut], tokens[cut:]

    model = base_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} bytes of prose")
    start, step, budget = time.monotonic(), 0, options.minutes * 60
    while (elapsed := time.monotonic() - start) < budget:
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * elapsed / budget)))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        rows = random_batch(train, options.batch, generator)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            seen = step * options.batch * CONTEXT / len(train)
            print(f"step {step} epoch {seen:.1f} loss {loss.item():.3f} held-out {held_out_loss(model, held_out):.3f}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"held-out {held_out_loss(model.float(), held_out):.3f} nats a byte; saved to {options.out}")


if __name__ == "__main__":
    main()

"""A tiny BERT with LoRA, made here and random, and a task that every client has its own examples of."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

WORDS, LENGTH = 16, 8


def new_model() -> PeftModel:
    """The same frozen base on every side; the adapter's values come from the server."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **size))
    random = torch.Generator().manual_seed(7)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1, generator=random)
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))


def examples(client: int, count: int = 200) -> dict[str, torch.Tensor]:
    """Rows of words; the label says whether more of them are from the first half of the vocabulary."""
    random = torch.Generator().manual_seed(client)
    words = torch.randint(WORDS, (count, LENGTH), generator=random)
    return {"input_ids": words, "labels": ((words < WORDS // 2).sum(dim=1) > LENGTH // 2).long()}

"""A stock client: it loads what it gets, trains, and answers with its tensors and its number of examples."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lora_app.task import examples, new_model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    model, rows = new_model(), examples(int(context.node_config["partition-id"]))
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    for name, parameter in model.named_parameters():
        for factor in "AB":
            if f".lora_{factor}." in name:
                parameter.requires_grad_(factor in message.content["config"]["trained-factors"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(int(context.run_config["steps"])):
        optimizer.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"loss": loss.item(), "num-examples": len(rows["labels"])})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
@torch.no_grad()
def evaluate(message: Message, context: Context) -> Message:
    model, rows = new_model().eval(), examples(1000 + int(context.node_config["partition-id"]))
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    hits = model(input_ids=rows["input_ids"]).logits.argmax(dim=1) == rows["labels"]
    metrics = MetricRecord({"accuracy": hits.float().mean().item(), "num-examples": len(hits)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

"""The Flower ClientApp: the seam `client.train` for exactly one message, a cohort of one."""

from collections.abc import Callable, Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from ..protocols.records import (
    assignment_from_records,
    description_to_records,
    evaluation_to_records,
    rank_to_records,
    update_to_records,
)
from .client import Client

ClientOf = Callable[[Context], Client]


def client_app(client_of: ClientOf, scoring_of: ClientOf | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """A ClientApp around a function that gives the client of a context (and is expected to keep it loaded).

    `scoring_of` gives the client over what scores come from, where that is other data; `mods` are Flower's.
    """
    app = ClientApp(mods=list(mods))

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return Message(description_to_records(client_of(context).describe()), reply_to=message)

    @app.query("rank")
    def rank(message: Message, context: Context) -> Message:
        return Message(rank_to_records(client_of(context).most_rank), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (update,) = client_of(context).train([assignment_from_records(message.content)])
        return Message(update_to_records(update), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = (scoring_of or client_of)(context)
        assignment = assignment_from_records(message.content)
        client.load(assignment)
        scores = client.evaluate(assignment.node)
        metrics = scores.metrics(client.adapted.task)
        return Message(evaluation_to_records(assignment, len(scores.loss), metrics), reply_to=message)

    return app

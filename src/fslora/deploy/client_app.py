"""Flower's ClientApp: one message in, one message out. What goes wrong here goes back as an error with its text."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fslora.deploy import desk
from fslora.deploy.flower import from_flower, to_flower

app = ClientApp()


def hello(message: Message, context: Context) -> Message:
    """Answers who this site is."""
    return Message(to_flower(desk.hello(context.run_config, context.node_config)), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Answers a round's letter."""
    record = desk.train(from_flower(message.content), context.run_config, context.node_config)
    return Message(to_flower(record), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Answers an examination."""
    record = desk.evaluate(from_flower(message.content), context.run_config, context.node_config)
    return Message(to_flower(record), reply_to=message)


app.query("hello")(hello)
app.train()(train)
app.evaluate()(evaluate)

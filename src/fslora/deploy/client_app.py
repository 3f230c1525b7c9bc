"""Flower's ClientApp: one message in, one message out. What goes wrong here goes back as an error with its text."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fslora.deploy.messages import from_flower, to_flower
from fslora.deploy.relay import ask

app = ClientApp()


def hello(message: Message, context: Context) -> Message:
    """Answers who this site is."""
    return Message(to_flower(ask("hello", None, context.run_config, context.node_config)), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Answers a round's letter."""
    letter = from_flower(message.content)
    return Message(to_flower(ask("train", letter, context.run_config, context.node_config)), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Answers an examination."""
    letter = from_flower(message.content)
    return Message(to_flower(ask("evaluate", letter, context.run_config, context.node_config)), reply_to=message)


app.query("hello")(hello)
app.train()(train)
app.evaluate()(evaluate)

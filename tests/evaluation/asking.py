"""Prompts for an endpoint, what it answers to them, and when it fails."""

from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.endpoint import Endpoint

KEY = "sk-harmless-example-0123456789"


def echo(body):
    return "echo " + body["messages"][-1]["content"]


def prompts(count):
    return [ask(f"prompt {number}") for number in range(count)]


def answers(endpoint, conversations, done=()):
    """Replies by position; a position that comes twice is an error."""
    found = {}
    for position, reply in endpoint.replies(conversations, done):
        assert position not in found
        found[position] = reply
    return found


def only(server, **options):
    """The one reply of a server to one prompt."""
    return answers(Endpoint("judge", base_url=server.base_url, **options), prompts(1))[0]


def always(fault):
    return lambda number, body: fault


def first(count, fault):
    return lambda number, body: fault if number < count else None

"""Between our sites and Flower's messages.

A request carries the common weights and the round's number. A reply carries the site's weights, and
beside them who it is, what it was given and its ledger's entry; or, where a site refuses, the
reason. How much a site counts is the server's business and in no reply.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from dpfast.errors import PrivacyError
from dpfast.federated.flower.arrays import to_arrays, to_weights
from dpfast.federated.site import Scores, Site, Update
from dpfast.federated.weights import Weights
from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import (
        ArrayRecord,
        ConfigRecord,
        Context,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp

__all__ = [
    "WEIGHT",
    "client_app",
    "copy_message",
    "evaluation",
    "questions",
    "read_name",
    "read_scores",
    "read_update",
    "weighted",
]

# Flower tells of each round on its own; people see ours.
logging.getLogger("flwr").setLevel(logging.ERROR)

_LOG = logging.getLogger("dpfast.federated")
WEIGHT = "weight"
_ARRAYS, _CONFIG, _METRICS, _SITE = "arrays", "config", "metrics", "site"
_ROUND = "server-round"


def evaluation(weights: ArrayRecord, round_number: int, nodes: Iterable[int]) -> list[Message]:
    """Requests for scores."""
    config = ConfigRecord({_ROUND: round_number})
    content = RecordDict({_ARRAYS: weights, _CONFIG: config})
    return [Message(content, node, MessageType.EVALUATE) for node in nodes]


def questions(nodes: Iterable[int]) -> list[Message]:
    """Requests for names."""
    return [Message(RecordDict({}), node, MessageType.QUERY) for node in nodes]


def client_app(open_site: Callable[[Context], AbstractContextManager[Site]]) -> ClientApp:
    """Flower's side of a site.

    Args:
      open_site: from Flower's context, which knows the node, to its site, for one message.
    """
    app = ClientApp()

    def guarded(answer: Callable[[Site, Message], Message]) -> Callable[..., Message]:
        """What went wrong may name files or patients: the whole of it is for the site's log."""

        def handler(message: Message, context: Context) -> Message:
            name = ""
            try:
                with open_site(context) as site:
                    name = site.name
                    return answer(site, message)
            except PrivacyError as error:
                return _without_weights(message, name, "refused", str(error))
            except Exception as error:
                _LOG.exception("%s: a request failed", name or "site")
                return _without_weights(message, name, "failed", type(error).__name__)

        return handler

    app.query()(guarded(_named))
    app.train()(guarded(_trained))
    app.evaluate()(guarded(_evaluated))
    return app


def _named(site: Site, message: Message) -> Message:
    return Message(RecordDict({_SITE: ConfigRecord({"name": site.name})}), reply_to=message)


def _evaluated(site: Site, message: Message) -> Message:
    scores = site.evaluate(to_weights(message.content[_ARRAYS]))
    about = ConfigRecord({"name": site.name, "scores": json.dumps(scores)})
    return Message(RecordDict({_SITE: about}), reply_to=message)


def _trained(site: Site, message: Message) -> Message:
    round_number = int(str(message.content.config_records[_CONFIG][_ROUND]))
    update = site.train(round_number, to_weights(message.content[_ARRAYS]))
    about: dict[str, Any] = {
        "name": update.site,
        "status": "trained",
        "round": update.round,
        "given": update.given,
        "privacy": json.dumps(update.privacy),
    }
    content = RecordDict(
        {
            _ARRAYS: to_arrays(update.weights),
            _METRICS: MetricRecord({WEIGHT: 1.0}),
            _SITE: ConfigRecord(about),
        }
    )
    return Message(content, reply_to=message)


def _without_weights(message: Message, site: str, status: str, reason: str) -> Message:
    about = ConfigRecord({"name": site, "status": status, "reason": reason})
    return Message(RecordDict({_SITE: about}), reply_to=message)


def read_update(message: Message) -> Update:
    """A site's reply.

    Raises:
      PrivacyError: the site refused. ValueError: it failed, or the reply is not one.
    """
    about = _about(message)
    if about.get("status") == "refused":
        raise PrivacyError(str(about.get("reason")))
    if about.get("status") == "failed":
        raise ValueError(f"{about.get('reason')!s}; the site's log has the rest")
    try:
        return Update(
            site=str(about["name"]),
            round=int(str(about["round"])),
            given=str(about["given"]),
            weights=to_weights(message.content[_ARRAYS]),
            privacy=_entry(str(about["privacy"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a reply without its parts: {type(error).__name__}") from error


def _entry(text: str) -> dict[str, Any]:
    """A ledger's entry that can be written down again: an object without NaN and infinities."""
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise TypeError("entry")
    json.dumps(entry, allow_nan=False)
    return entry


def read_name(message: Message) -> str:
    """Which site says that it is there.

    Raises:
      ValueError: the reply does not say.
    """
    try:
        return str(_about(message)["name"])
    except KeyError:
        raise ValueError("a reply that does not say which site it is from") from None


def read_scores(message: Message) -> Scores:
    """A site's scores.

    Raises:
      ValueError: it failed, or the reply is not one.
    """
    try:
        scores: Scores = json.loads(str(_about(message)["scores"]))
        if {type(each) for each in scores.values()} != {list}:
            raise TypeError("scores")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"a reply without its scores: {error}") from error
    return scores


def weighted(message: Message, weights: Weights, weight: float) -> Message:
    """A reply as a strategy is to see it: checked weights, and the server's own say of how much."""
    content = RecordDict({_ARRAYS: to_arrays(weights), _METRICS: MetricRecord({WEIGHT: weight})})
    return copy_message(message, content)


def copy_message(message: Message, content: RecordDict) -> Message:
    """Another content from and to the same; Flower has no public way to say so."""
    make: Any = Message
    copied: Message = make(content=content, metadata=message.metadata)
    return copied


def _about(message: Message) -> ConfigRecord:
    if message.has_error():
        raise ValueError(message.error.reason or f"error {message.error.code}")
    about = message.content.get(_SITE)
    if not isinstance(about, ConfigRecord):
        raise ValueError("a reply that does not say which site it is from")
    return about

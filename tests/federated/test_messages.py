"""Messages through Flower's own serialisation, as they go over a network."""

import math

import numpy as np
import pytest

pytest.importorskip("flwr")

from contextlib import nullcontext

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from dpfast.errors import PrivacyError
from dpfast.federated import Update
from dpfast.federated.flower.in_process import InProcessGrid
from dpfast.federated.flower.messages import (
    client_app,
    evaluation,
    questions,
    read_name,
    read_scores,
    read_update,
    to_arrays,
    to_weights,
)
from dpfast.federated.weights import digest

WEIGHTS = {
    "a.weight": np.random.default_rng(0).normal(size=(3, 1, 5)).astype(np.float32),
    "scalar": np.float32(0.1) * np.ones(()),
    "wide": np.array([1e-300, -0.0, math.pi]),
    "empty": np.zeros((0, 4), np.float32),
}
PRIVACY = {"epsilon": 1.25, "delta": 1e-5, "reasons": ["ä"], "nested": {"steps": 3}}


class Fake:
    """A site whose answers are known."""

    name = "north / ä"

    def __init__(self, error=None):
        self.error = error

    def train(self, round_number, weights):
        if self.error is not None:
            raise self.error
        return Update(self.name, round_number, digest(weights), weights, PRIVACY)

    def evaluate(self, weights):
        if self.error is not None:
            raise self.error
        return {"dice": [0.5, None], "hausdorff95": [1.0, None]}


def over_the_network(message):
    """What comes out at the other end."""
    contents = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


def asked(site, message):
    """A site's reply, both ways over the network."""
    app = client_app(lambda context: nullcontext(site))
    return over_the_network(app(over_the_network(message), Context(1, 2, {}, RecordDict(), {})))


@pytest.fixture(autouse=True)
def _run_of_messages():
    grid = InProcessGrid({})
    yield
    grid.close()


def training():
    content = {"arrays": to_arrays(WEIGHTS), "config": ConfigRecord({"server-round": 7})}
    return Message(RecordDict(content), 2, MessageType.TRAIN)


def test_weights_arrive_with_every_bit():
    assert digest(to_weights(to_arrays(WEIGHTS))) == digest(WEIGHTS)
    update = read_update(asked(Fake(), training()))
    assert (update.site, update.round) == ("north / ä", 7)
    assert update.given == digest(update.weights) == digest(WEIGHTS)
    assert {k: v.dtype for k, v in update.weights.items()} == {
        k: v.dtype for k, v in WEIGHTS.items()
    }
    assert update.privacy == PRIVACY


def test_names_and_scores_arrive():
    assert read_name(asked(Fake(), questions([2])[0])) == "north / ä"
    scores = read_scores(asked(Fake(), evaluation(to_arrays(WEIGHTS), 1, [2])[0]))
    assert scores == {"dice": [0.5, None], "hausdorff95": [1.0, None]}


def test_a_refusal_arrives_with_its_reason():
    with pytest.raises(PrivacyError, match="nothing is left"):
        read_update(asked(Fake(PrivacyError("nothing is left")), training()))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_went_wrong_at_a_site_stays_there(kind, caplog):
    site = Fake(OSError("/patients/jane_doe.nii.gz cannot be read"))
    message = training() if kind == "train" else evaluation(to_arrays(WEIGHTS), 1, [2])[0]
    reply = asked(site, message)
    contents = b"".join(each.deflate() for each in get_all_nested_objects(reply).values())
    assert b"jane_doe" not in contents
    assert b"OSError" in contents
    assert "jane_doe" in caplog.text
    with pytest.raises(ValueError, match="OSError" if kind == "train" else "without its scores"):
        (read_update if kind == "train" else read_scores)(reply)


def test_a_reply_of_something_else_is_no_update():
    reply = asked(Fake(), evaluation(to_arrays(WEIGHTS), 1, [2])[0])
    with pytest.raises(ValueError, match="without its parts"):
        read_update(reply)


@pytest.mark.parametrize("said", ['{"epsilon": NaN}', '{"epsilon": 1e999}', "[]", "[" * 100_000])
def test_a_ledgers_entry_that_cannot_be_kept_is_no_update(said):
    reply = asked(Fake(), training())
    reply.content["site"]["privacy"] = said
    with pytest.raises(ValueError, match="without its parts"):
        read_update(reply)

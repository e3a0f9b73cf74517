"""Flower's grid with every site in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

from dpfast.federated.flower.messages import client_app, copy_message
from dpfast.federated.site import Site
from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InProcessGrid"]

_SERVER_NODE, _RUN, _TASK = 1, 1, 1


class InProcessGrid(Grid):
    """Flower's grid with every site in this process, one after the other.

    Sites get real messages and give real replies. An exception at a site becomes the error reply
    that a deployment would bring.

    Attributes:
      one_at_a_time: whoever asks should ask one site after the other, so that the replies of all
        are never in memory together.

    Args:
      sites: by name; nodes are numbered from 2 in the order of the names.
    """

    one_at_a_time = True

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.nodes = {2 + number: name for number, name in enumerate(sorted(sites))}
        self._sites = dict(sites)
        self._app = client_app(
            lambda context: nullcontext(self._sites[self.nodes[context.node_id]])
        )
        self._replies: dict[str, Message] = {}
        # Networks, engines and messages leave cycles behind. What is here already (libraries, data)
        # need not be searched whenever Python's collector comes by.
        gc.collect()
        gc.freeze()
        self.set_run(Run.create_empty(_RUN))

    def close(self) -> None:
        """Let the collector see again what was there before."""
        gc.unfreeze()

    def set_run(self, run: Run) -> None:
        """See Flower; the identity is the process's, so that there is one run in it at a time."""
        self._run = run
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = _SERVER_NODE
        TaskIdentity.task_id = _TASK

    @property
    def run(self) -> Run:
        """See Flower."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See Flower."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Sequence[int]:
        """See Flower."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """See Flower; the sites do their work at once."""
        pushed = []
        for message in messages:
            number = str(len(self._replies))
            self._replies[number] = self._answer(message)
            pushed.append(number)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """See Flower."""
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """See Flower; nobody is waited for, so `timeout` does nothing."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        # A shallow copy: the same containers go to every site.
        own = copy_message(message, RecordDict(dict(message.content)))
        context = Context(_RUN, node, {}, RecordDict(), {})
        try:
            return self._app(own, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

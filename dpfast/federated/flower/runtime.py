"""Work that a SuperLink or a SuperNode hands out, done in this process.

Flower would start a process for every message and run in it the code that came with the run. Here
the code is what is installed: a site runs nothing that a server sends, and Torch is loaded once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast site", extra="federated"):
    import httpx
    from flwr.app import Context, Error, Message
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import run_from_proto
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
    )
    from flwr.serverapp import Grid
    from flwr.supercore.constant import TaskType
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid.http_grid import HttpGrid
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

__all__ = ["Runtime", "answer_next", "serving_grid"]

_POLL_SECONDS = 0.5
_PART_SECONDS = 60.0  # in which some part of a message must come
_TRIES = 5  # more would wait for a SuperLink that is gone
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True)
class Runtime:
    """Where a SuperLink or SuperNode hands out its work.

    Attributes:
      address: HOST:PORT.
      secret: that it shares with those who may take work.
      root_certificates: PEM; None: plain HTTP, within this machine alone.
    """

    address: str
    secret: bytes
    root_certificates: bytes | None = None

    def client(self, *interceptors: Any) -> Any:
        """A connection; it fails at once where nobody listens, for both ends are on one machine."""
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.root_certificates is None,
            root_certificates=self.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="dpfast"), *interceptors],
        )

    def acquire(self, kind: str, seconds: float) -> str | None:
        """The token of the next piece of work; None: there was none in time."""
        client = self.client(
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=_ACQUIRE)
        )
        deadline = time.monotonic() + seconds
        try:
            while True:
                # Whoever hands out the work may be about to start or to end.
                with suppress(httpx.HTTPError):
                    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
                    if found.HasField("task") and found.token:
                        return str(found.token)
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
        finally:
            client.close()


def answer_next(runtime: Runtime, app: ClientApp, seconds: float) -> bool:
    """Answer the next message that a SuperNode has; False: there was none in time."""
    token = runtime.acquire(TaskType.CLIENT_APP, seconds)
    if token is None:
        return False
    client = runtime.client(RuntimeTokenHttpInterceptor(token))
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beat.start()
    try:
        # The bundle that came with the run is left as it is: nothing of it is run.
        impatient: Any = _Impatient(client)
        message, context, _, _ = pull_task_input(impatient)
    except Exception:
        # A run that ended while the server was gone; or the SuperNode is gone itself.
        with suppress(httpx.HTTPError):
            push_task_output(client, None, SubStatus.FAILED, "the message never came")
        beat.stop()
        client.close()
        return False
    try:
        push_message(client, _answer(app, message, context), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    except httpx.HTTPError:
        return False  # the SuperNode is gone; what was trained is kept, and given when asked again
    except BaseException:
        push_task_output(client, context, SubStatus.FAILED, "the site stopped")
        raise
    finally:
        beat.stop()
        client.close()
    return True


class _LostMessageError(Exception):
    """A message whose parts do not come, as of a run that ended while the server was gone."""


class _Impatient:
    """A connection that does not wait for parts of a message for ever.

    Args:
      client: to a SuperNode.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._last = client, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullObject(self, request: Any) -> Any:  # noqa: N802  Flower's name
        """A part, or word that it is not there yet."""
        answer = self._client.PullObject(request)
        if answer.object_available:
            self._last = time.monotonic()
        elif time.monotonic() - self._last > _PART_SECONDS:
            raise _LostMessageError
        return answer


def _answer(app: ClientApp, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception as error:
        reason = type(error).__name__
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


@contextmanager
def serving_grid(runtime: Runtime, seconds: float) -> Iterator[Grid]:
    """The grid of the run that a SuperLink has, for as long as it is conducted here.

    Raises:
      RuntimeError: there was no run in time.
    """
    token = runtime.acquire(TaskType.SERVER_APP, seconds)
    if token is None:
        raise RuntimeError(f"serving_grid: the SuperLink must have a run, got none in {seconds} s")
    grid = HttpGrid(
        runtime.address,
        insecure=runtime.root_certificates is None,
        root_certificates=runtime.root_certificates,
        token=token,
    )
    grid._retry_invoker.max_tries = _TRIES
    client = grid._runtime_client
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beat.start()
    status, details = SubStatus.FAILED, "the server stopped"
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = given.task_id
        TaskIdentity.run_id = given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        yield grid
        status, details = SubStatus.COMPLETED, ""
    finally:
        # The SuperLink may be gone, and with it who would have wanted to know.
        with suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        beat.stop()
        grid.close()

"""A real Jupyter kernel for tests."""

import contextlib
import os
import queue
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import worker_forks
from jupyter_client.manager import KernelManager


@dataclass
class Cell:
    """What came of a cell."""

    status: str = ""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """As a front end would keep them: clear_output empties the list."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """All that was ever displayed."""
    updates: list[str] = field(default_factory=list)
    """Values that widgets were given, in order."""
    widgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """State in which each widget was made, by its comm's id."""

    @property
    def text(self) -> str:
        """All plain text, of streams, values and errors."""
        return "\n".join(_texts(output) for output in self.outputs)

    def mime(self, kind: str) -> list[str]:
        """The outputs' contents of that type."""
        return [output["data"][kind] for output in self.outputs if kind in output.get("data", {})]


def _texts(output: dict[str, Any]) -> str:
    if "traceback" in output:
        return "\n".join(output["traceback"])
    return output.get("text") or output["data"].get("text/plain", "")


class Kernel:
    """Runs code as a front end does."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, code: str) -> str:
        """Send a cell; its message id, for `finish`. One that fails must not have the next one aborted."""
        return self.client.execute(code, stop_on_error=False)

    def finish(self, message: str, timeout: float = 240) -> Cell:
        """Collect a cell's outputs until it is idle."""
        cell = Cell()
        end = time.monotonic() + timeout
        while True:
            reply = self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
            if reply["parent_header"].get("msg_id") != message:
                continue
            kind, content = reply["msg_type"], reply["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind == "clear_output":
                cell.outputs.clear()
            elif kind == "comm_open":
                cell.widgets[content["comm_id"]] = content["data"].get("state", {})
            elif kind == "update_display_data":
                for output in cell.outputs:
                    if output.get("transient") == content["transient"]:
                        output["data"] = content["data"]
            elif kind in ("stream", "display_data", "execute_result", "error"):
                cell.outputs.append(content)
                cell.shown.append(dict(content))
            elif kind == "comm_msg" and "value" in content["data"].get("state", {}):
                cell.updates.append(content["data"]["state"]["value"])
        while True:  # the reply says whether a front end would go on to the next cell
            answer = self.client.get_shell_msg(timeout=60)
            if answer["parent_header"].get("msg_id") == message:
                cell.status = answer["content"]["status"]
                return cell

    def run(self, code: str, timeout: float = 240) -> Cell:
        """Run a cell to its end."""
        return self.finish(self.start(code), timeout)

    def send(self, widget: str, data: dict[str, Any], timeout: float = 60) -> Cell:
        """What a front end sends a widget, by its comm's id; what came of it, updated displays as outputs."""
        message = self.client.session.msg("comm_msg", {"comm_id": widget, "data": data})
        self.client.shell_channel.send(message)
        cell = Cell(status="ok")
        while True:
            reply = self.client.get_iopub_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            kind, content = reply["msg_type"], reply["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return cell
            if kind in ("update_display_data", "stream", "error"):
                cell.outputs.append(content)
            elif kind == "comm_msg" and "value" in content["data"].get("state", {}):
                cell.updates.append(content["data"]["state"]["value"])

    def complete(self, code: str) -> list[str]:
        """What Tab offers at the end of this code."""
        return self.client.complete(code, reply=True, timeout=60)["content"]["matches"]

    def interrupt(self) -> None:
        """Press ■."""
        self.manager.interrupt_kernel()


@contextlib.contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """A fresh kernel of this environment, working in `folder`; its workers are forks (see `worker_forks`)."""
    manager = KernelManager(kernel_name="python3")
    with tempfile.TemporaryDirectory(prefix="ipython-", ignore_cleanup_errors=True) as profile:
        manager.start_kernel(cwd=str(folder), env={**os.environ, **worker_forks.ipython_profile(Path(profile))})
        running = Kernel(manager)
        try:
            yield running
        finally:
            running.client.stop_channels()
            manager.shutdown_kernel(now=True)


def wait_until(condition, timeout: float = 120) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise queue.Empty("the condition was never met")
        time.sleep(0.05)

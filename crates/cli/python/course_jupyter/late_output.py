"""evcxr sends a cell's stderr from a thread of its own, and on a busy machine the last lines come
after the message that the cell has ended. nbclient stops listening there, and a panic could go
unseen: here it listens a moment longer."""

from queue import Empty

from jupyter_client.utils import ensure_async
from nbclient import NotebookClient
from nbclient.client import CellExecutionComplete

# Seconds to listen after the end.
MOMENT = 0.1

_until_complete = NotebookClient._async_poll_output_msg


async def _and_a_moment_longer(self, parent_msg_id, cell, cell_index):
    await _until_complete(self, parent_msg_id, cell, cell_index)
    while True:
        try:
            message = await ensure_async(self.kc.iopub_channel.get_msg(timeout=MOMENT))
        except Empty:
            return
        if message["parent_header"].get("msg_id") == parent_msg_id:
            try:
                self.process_message(message, cell, cell_index)
            except CellExecutionComplete:
                pass


def listen_for_it():
    """Changes nbclient for this process."""
    NotebookClient._async_poll_output_msg = _and_a_moment_longer

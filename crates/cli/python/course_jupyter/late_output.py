"""evcxr sends a cell's stderr from a thread of its own, and on a busy machine the last lines come
after the message that the cell has ended. nbclient stops listening there, and a panic could go
unseen. Here it listens a moment longer, gives what comes later to the cell that wrote it, and after
the last cell asks the kernel for a word on stderr: what was written before has then come too."""

from queue import Empty

from nbclient import NotebookClient
from nbclient.client import CellExecutionComplete
from nbclient.util import ensure_async, run_hook, run_sync

from .failures import stderr_of

# Seconds to listen after the end of a cell: most late lines come now, before the next cell begins.
MOMENT = 0.1
# Seconds within which the kernel must compile and run the cell that writes the last word.
PATIENCE = 300
LAST_WORD = "-- nothing more on stderr --"

_execute_cell = NotebookClient.async_execute_cell


async def _until_complete_and_a_moment_longer(self, parent_msg_id, cell, cell_index):
    """In place of nbclient's loop, which ends with the cell and drops all that others wrote."""
    vars(self).setdefault("_ran", {})[parent_msg_id] = (cell, cell_index)
    complete = False
    while True:
        try:
            message = await _message(self, MOMENT if complete else None)
        except Empty:
            return
        complete |= _take(self, message) == parent_msg_id


async def _execute_and_hear_all(self, cell, cell_index, *args, **options):
    cell = await _execute_cell(self, cell, cell_index, *args, **options)
    code = [i for i, c in enumerate(self.nb.cells) if c.cell_type == "code" and c.source.strip()]
    # Of a cell that has failed the kernel keeps the source, for the failing line: ask nothing more.
    rust = self.nb.metadata.get("kernelspec", {}).get("name") == "rust"
    if rust and code and cell_index == code[-1] and not stderr_of(cell):
        await _hear_the_rest(self, cell, cell_index)
    for late, index in vars(self).pop("_late", []):
        await run_hook(self.on_cell_executed, cell=late, cell_index=index, execute_reply=None)
    return cell


async def _hear_the_rest(self, cell, cell_index):
    ask = await ensure_async(self.kc.execute(f'eprintln!("{LAST_WORD}");', store_history=False))
    while True:
        try:
            message = await _message(self, PATIENCE)
        except Empty:
            raise TimeoutError(f"the kernel no longer answers ({PATIENCE} s)") from None
        if LAST_WORD in message["content"].get("text", ""):
            return
        if message["parent_header"].get("msg_id") == ask:
            if message["msg_type"] == "error":
                raise RuntimeError("\n".join(message["content"]["traceback"]))
            # evcxr names the cell that runs now, which wrote nothing yet.
            if message["msg_type"] == "stream":
                _keep(self, message, cell, cell_index)
        else:
            _take(self, message)


async def _last_word(self):
    await _hear_the_rest(self, *list(vars(self)["_ran"].values())[-1])


# Waits for all that was written to stderr so far; each cell of the client then holds its own.
last_word = run_sync(_last_word)


async def _message(self, timeout):
    return await ensure_async(self.kc.iopub_channel.get_msg(timeout=timeout))


def _take(self, message):
    """Gives a message to its cell; returns the cell's id when it was that of its end."""
    parent = message["parent_header"].get("msg_id")
    cell, cell_index = vars(self)["_ran"].get(parent, (None, None))
    if cell is None:
        return None
    if message["msg_type"] == "stream" and parent != list(vars(self)["_ran"])[-1]:
        _keep(self, message, cell, cell_index)
        return None
    try:
        self.process_message(message, cell, cell_index)
    except CellExecutionComplete:
        return parent
    return None


def _keep(self, message, cell, cell_index):
    """Adds what a cell wrote after its end."""
    self.process_message(message, cell, cell_index)
    vars(self).setdefault("_late", []).append((cell, cell_index))


def listen_for_it():
    """Changes nbclient for this process."""
    NotebookClient._async_poll_output_msg = _until_complete_and_a_moment_longer
    NotebookClient.async_execute_cell = _execute_and_hear_all
    NotebookClient.execute_cell = run_sync(_execute_and_hear_all)

# evcxr answers "ok" for a cell that panicked or whose `?` met an error: it only writes to stderr.
# So in this course a cell that writes to stderr has failed, unless it is tagged `stderr-ok`.
from course_jupyter.failures import OUTPUT_TIMEOUT, STARTUP_TIMEOUT, raise_on_error, raise_on_stderr
from course_jupyter.late_output import listen_for_it

listen_for_it()
c = get_config()  # noqa: F821
c.ExecutePreprocessor.on_cell_executed = raise_on_stderr
c.ExecutePreprocessor.on_cell_error = raise_on_error
c.ExecutePreprocessor.startup_timeout = STARTUP_TIMEOUT
c.ExecutePreprocessor.iopub_timeout = OUTPUT_TIMEOUT
c.ExecutePreprocessor.raise_on_iopub_timeout = True

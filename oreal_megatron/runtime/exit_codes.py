"""Process exit codes. docs/reference/exit_codes.md tells users about them."""

BAD_INPUT = 2  # the input must be fixed first
STOPPED = 3  # results would be invalid: look at the message, then resume
PREEMPTED = 4  # stopped by a signal after saving: start again
LOST = 5  # hung, or a rank or a node was lost: start again
UNFIT = 6  # the plan does not fit the GPUs, or the rehearsal found a fault
INTERRUPTED = 130  # Ctrl-C where there was nothing to save; the shell's convention, 128 + SIGINT

FINAL = (BAD_INPUT, STOPPED, PREEMPTED, INTERRUPTED)  # restarting at once, on the same nodes, would not help

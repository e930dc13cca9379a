"""Errors whose message is shown to the user as it stands; the command line turns each into an exit code."""


class ConfigError(ValueError):
    """Bad input found before anything was loaded (exit code 2)."""


class RunStopped(RuntimeError):
    """The results of further steps would be invalid; the run can be resumed (exit code 3).

    Raised on all ranks at once, so that none is left waiting for the others.
    """


class Preempted(RunStopped):
    """The scheduler asked the run to end in the middle of a step; it can be resumed (exit code 4).

    Raised on all ranks at once.
    """

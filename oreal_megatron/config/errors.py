"""Errors whose message is shown to the user as it stands; the command line turns each into an exit code."""


class ConfigError(ValueError):
    """Bad input found before anything was loaded (exit code 2)."""


class RunStopped(RuntimeError):
    """The run cannot continue honestly, and can be resumed (exit code 3).

    Raised on all ranks at once, so that none is left waiting for the others.
    """


class Preempted(RunStopped):
    """A signal (SIGTERM, SIGUSR1, Ctrl-C) asked the run to stop; the last whole step is saved (exit code 4).

    Raised on all ranks at once.
    """

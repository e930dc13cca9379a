"""Messages by rank and level, and what stays quiet."""

from __future__ import annotations

import logging

import pytest

from oreal_megatron.runtime import logging_setup


@pytest.fixture
def package_logger():
    """Logger of the package, with its handlers as they were afterwards."""
    logger = logging.getLogger("oreal_megatron")
    handlers, level = logger.handlers, logger.level
    yield logging.getLogger("oreal_megatron.somewhere")
    logger.handlers, logger.level = handlers, level


@pytest.mark.parametrize(
    ("rank", "printed"),
    [
        ("0", "oreal: said\noreal: a warning\n"),
        ("3", "oreal (rank 3): a warning\n"),
    ],
)
def test_information_is_said_once_and_warnings_by_every_rank(package_logger, monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    logging_setup.set_up()
    logging_setup.set_up()  # not twice
    package_logger.debug("detail")
    package_logger.info("said")
    package_logger.warning("a warning")
    assert capsys.readouterr().err == printed


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    logging_setup.quiet_environment()
    assert logging_setup.os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert logging_setup.os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_errors_of_a_quiet_library_still_show():
    logging_setup.set_up()
    for name in logging_setup.LEVELS:
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)

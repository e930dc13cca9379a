"""Arguments of vLLM's engine that a recipe passes on as they are; unknown names and refused values are ConfigErrors."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator, Mapping

from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from oreal_megatron.config import ConfigError
from oreal_megatron.config.suggestions import suggest

FIX = "correct the value, or remove the argument"


def check_names(arguments: Mapping[str, object]) -> None:
    """Raise ConfigError for an argument that the installed vLLM does not have."""
    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"engine.vllm: vLLM has no argument {name!r}{suggest(name, known)}")


@contextlib.contextmanager
def reported_refusals(arguments: Mapping[str, object]) -> Iterator[None]:
    """Raise ConfigError for an error of vLLM between its arguments and the start of its engine."""
    try:
        yield
    except Exception as error:
        if not arguments or _has_engine_begun(error):
            raise
        raise ConfigError(_describe_refusal(error, arguments)) from error


def _has_engine_begun(error: BaseException) -> bool:
    """Return whether an error was raised within the construction of vLLM's engine, which follows its configuration."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is LLMEngine.__init__.__code__ for frame, _ in frames)


def _describe_refusal(error: Exception, arguments: Mapping[str, object]) -> str:
    """Return a message with the arguments at fault as far as vLLM names them, else with all, and vLLM's reason."""
    if isinstance(error, ValidationError):
        reason = "; ".join(": ".join(map(str, (*fault["loc"], fault["msg"]))) for fault in error.errors())
        reason = reason.replace("Value error, ", "").removesuffix(".")  # pydantic's words for an error of vLLM's checks
    else:
        reason = f"{type(error).__name__}: {error}"
    named = [name for name in arguments if name in reason] or list(arguments)
    values = ", ".join(f"engine.vllm.{name} = {arguments[name]!r}" for name in named)
    return f"vLLM refuses {values}: {reason}; {FIX}"

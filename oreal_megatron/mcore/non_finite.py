"""Search for the first value of a model that is not finite: a parameter, or a module's output in a forward pass."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from oreal_megatron.mcore.gpt_model import unwrap


def first_parameter(chunks: list[Any]) -> str:
    """Describe the first parameter of this rank with a value that is not finite; "" if there is none."""
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            wrong = ~parameter.detach().isfinite()
            if wrong.any():
                index = [int(i) for i in torch.unravel_index(wrong.flatten().int().argmax(), wrong.shape)]
                value = float(parameter.detach()[tuple(index)])
                return f"parameter {_global_name(chunk, name)} is {value} at {index} ({int(wrong.sum())} such values)"
    return ""


@contextlib.contextmanager
def watched_outputs(chunks: list[Any]) -> Iterator[list[str]]:
    """Collect the names of modules whose outputs are not finite, in the order of the forward passes inside."""
    names: list[str] = []

    def note(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if any(not tensor.isfinite().all() for tensor in _floating(output)):
            names.append(name)

    with contextlib.ExitStack() as hooks:
        for chunk in map(unwrap, chunks):
            for name, module in chunk.named_modules():
                if name:
                    handle = module.register_forward_hook(partial(note, _global_name(chunk, name)))
                    hooks.callback(handle.remove)
        yield names


def _floating(output: Any) -> Iterator[Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def _global_name(chunk: GPTModel, name: str) -> str:
    """Return a name on a pipeline stage with the layer's number in the whole model, from 0."""
    match = re.match(r"decoder\.layers\.(\d+)(.*)", name)
    return f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}{match[2]}" if match else name

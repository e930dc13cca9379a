"""One rank of a world that is not there: tensors without data on torch's meta device, a process group that is torch's
fake one, and a record of everything this rank would have said to others.

Megatron runs as it is, but for the stand-ins of `_patches`. What depends on data is taken to be: every number 1, every
flag False, every mask full, every gathered object this rank's own.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.fx.experimental import _config as tracing
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

from oreal_megatron.mcore import cpu_shim

BACKEND = "cpu:fake,meta:fake"
UNANSWERED = ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_")  # torch has no meta kernel
INPUT_ONLY = ("gather_",)  # the first rank alone has outputs
ROOT = {"broadcast_": 2, "gather_": 3, "scatter_": 3, "reduce_": 3}  # its place among the arguments
_NEW_GROUP = dist.new_group

_device._device_constructors()  # remembers torch's factories at its first call, which must not find the stand-ins


class Call(NamedTuple):
    """A collective, or one end of a message."""

    operation: str
    group: tuple[int, ...]  # global ranks
    sizes: tuple[int, ...]  # bytes of each tensor
    peer: int = -1  # global rank, of a message
    dtypes: tuple[str, ...] = ()
    root: int = -1  # of the group, of a broadcast and its like


class Record(TorchDispatchMode):
    """What a rank called, in order; and the shapes that earlier or later pipeline stages would tell it."""

    def __init__(self, world: int):
        super().__init__()
        self.world = tuple(range(world))
        self.groups: list[tuple[int, ...]] = []  # as dist.new_group was asked for them
        self.calls: list[Call] = []
        self.shapes: list[list[int]] = []  # of each micro-batch between pipeline stages
        self.told = [0, 0]  # from the previous stage, from the next one

    def expect(self, shapes: list[list[int]]) -> None:
        """The shapes that the micro-batches of the next update have between pipeline stages."""
        self.shapes, self.told = shapes, [0, 0]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self.calls.append(_call(function.overloadpacket.__name__, args))
            if function.overloadpacket.__name__ in UNANSWERED:
                return FakeWork().boxed()
        elif function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype is not torch.bool and (1.0 if args[0].is_floating_point() else 1)
        return function(*args, **(kwargs or {}))

    def new_group(self, ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        members = self.world if ranks is None else tuple(ranks)
        self.groups.append(members)
        group = _NEW_GROUP(list(members), backend=BACKEND)
        _name_backend(group)
        return group

    def all_gather_object(self, everyones: list, mine: Any, group: Any = None) -> None:
        ranks = tuple(dist.get_process_group_ranks(group)) if group else self.world
        self.calls.append(Call("all_gather_object", ranks, ()))
        everyones[:] = [mine] * len(everyones)

    def shapes_told(self, communicator: Any, to_next: Any, to_previous: Any, previous: bool, following: bool) -> tuple:
        """In place of the message that announces the shape of the next one."""
        answer = [[0, 0, 0], [0, 0, 0]]
        for side, wanted in enumerate((previous, following)):
            if wanted:
                answer[side] = self.shapes[self.told[side] % len(self.shapes)]
                self.told[side] += 1
        return tuple(answer)


def _name_backend(group: Any) -> None:
    """Of a group with a backend for each device torch wants to know which is the first, or it warns at the end."""
    if isinstance(group, dist.ProcessGroup):
        group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)


def _call(operation: str, args: tuple) -> Call:
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    ranks = tuple(dist.get_process_group_ranks(group))
    if operation == "barrier":
        return Call(operation, ranks, ())
    tensors = list(_tensors(args[1] if operation in INPUT_ONLY else args))
    sizes, dtypes = tuple(tensor.nbytes for tensor in tensors), tuple(str(tensor.dtype) for tensor in tensors)
    if operation in ("send", "recv_"):
        return Call(operation, ranks, sizes, ranks[args[2]], dtypes)
    root = args[ROOT[operation]] if operation in ROOT else -1
    return Call(operation, ranks, sizes, dtypes=dtypes, root=root)  # torch shows no reduction's kind to Python


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _on_meta(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same factory, for which every device that is named is the meta device."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        return factory(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))

    return made


class _FusedNorm(torch.autograd.Function):
    """Keeps what a GPU's norm keeps; elsewhere torch makes several operations of it, which keep other tensors."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shape: Sequence[int], weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty(*rows.shape[: -len(shape)], 1, dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), None, torch.empty_like(weight), None


def _patches(record: Record) -> dict[str, tuple[Any, str, Any]]:
    return cpu_shim.PATCHES | {
        "current_device": (torch.cuda, "current_device", lambda: "meta"),
        "tensor": (torch, "tensor", _on_meta(torch.tensor)),
        "zeros": (torch, "zeros", _on_meta(torch.zeros)),
        "Tensor.cpu": (Tensor, "cpu", lambda tensor: tensor),
        "l2_norm_impl": (clip_grads, "l2_norm_impl", lambda *args: (torch.ones(1), None)),  # of numbers on the host
        "rms_norm": (torch, "rms_norm", _FusedNorm.apply),
        "new_group": (dist, "new_group", record.new_group),
        "all_gather_object": (dist, "all_gather_object", record.all_gather_object),
        "shapes": (P2PCommunicator, "_communicate_shapes", lambda *args: record.shapes_told(*args)),
        "collect": (gc, "collect", lambda *args: 0),  # before each checkpoint; there is no memory to be had back
        "nonzero": (tracing, "meta_nonzero_assume_all_nonzero", True),
    }


@contextlib.contextmanager
def rank_of(world: int, rank: int) -> Iterator[Record]:
    """Be one rank of a world of so many, all of them but this one absent."""
    record, told = Record(world), sys.excepthook
    dist.init_process_group(BACKEND, rank=rank, world_size=world, store=FakeStore())
    _name_backend(dist.group.WORLD)
    try:
        with cpu_shim.standing_in(_patches(record)), torch.device("meta"), record:
            yield record
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = told  # torch's begins every line with the rank

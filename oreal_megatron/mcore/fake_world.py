"""Fake world: one rank of a simulated job.

Tensors have no data (torch's meta device), the process group is torch's fake one, and every call of this rank to others
is recorded. Megatron runs unchanged except for `_patches`. Values that depend on data are replaced: every number is 1,
every flag False, every mask full, every gathered object this rank's own.
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

from oreal_megatron.mcore import megatron_patches
from oreal_megatron.mcore.megatron_patches import Patch

BACKEND = "cpu:fake,meta:fake"
WITHOUT_META_KERNEL = ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_")
INPUT_ONLY = ("gather_",)  # only the first rank has outputs
ROOT = {"broadcast_": 2, "gather_": 3, "scatter_": 3, "reduce_": 3}  # position of the root among the arguments
_NEW_GROUP = dist.new_group

_device._device_constructors()  # caches torch's factories at its first call, which must not see the patches


class Call(NamedTuple):
    """A collective, or one end of a message."""

    operation: str
    group: tuple[int, ...]  # global ranks
    sizes: tuple[int, ...]  # bytes of each tensor
    peer: int = -1  # global rank, of a message
    dtypes: tuple[str, ...] = ()
    root: int = -1  # of the group, of a broadcast and its like


class CallRecorder(TorchDispatchMode):
    """Recorder of a rank's calls, in order; it also answers with the shapes that other pipeline stages would send."""

    def __init__(self, world: int):
        super().__init__()
        self.world = tuple(range(world))
        self.groups: list[tuple[int, ...]] = []  # in the order of dist.new_group
        self.calls: list[Call] = []
        self.shapes: list[list[int]] = []  # of each micro-batch between pipeline stages
        self.shapes_sent = [0, 0]  # from the previous stage, from the next one

    def expect(self, shapes: list[list[int]]) -> None:
        """Set the shapes of the next update's micro-batches between pipeline stages."""
        self.shapes, self.shapes_sent = shapes, [0, 0]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record collectives; answer reads of a value from the meta device."""
        if function.namespace == "c10d":
            self.calls.append(_call(function.overloadpacket.__name__, args))
            if function.overloadpacket.__name__ in WITHOUT_META_KERNEL:
                return FakeWork().boxed()
        elif function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype is not torch.bool and (1.0 if args[0].is_floating_point() else 1)
        return function(*args, **(kwargs or {}))

    def new_group(self, ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Record and create a group, in place of `dist.new_group`."""
        members = self.world if ranks is None else tuple(ranks)
        self.groups.append(members)
        group = _NEW_GROUP(list(members), backend=BACKEND)
        _set_default_backend(group)
        return group

    def all_gather_object(self, values: list[Any], own: Any, group: Any = None) -> None:
        """Record the call and return this rank's object for all, in place of `dist.all_gather_object`."""
        ranks = tuple(dist.get_process_group_ranks(group)) if group else self.world
        self.calls.append(Call("all_gather_object", ranks, ()))
        values[:] = [own] * len(values)

    def communicate_shapes(
        self, communicator: Any, to_next: Any, to_previous: Any, from_previous: bool, from_next: bool
    ) -> tuple[list[int], ...]:
        """Return the shapes of the next messages, in place of the messages that announce them."""
        shapes = [[0, 0, 0], [0, 0, 0]]
        for side, requested in enumerate((from_previous, from_next)):
            if requested:
                shapes[side] = self.shapes[self.shapes_sent[side] % len(self.shapes)]
                self.shapes_sent[side] += 1
        return tuple(shapes)


def _set_default_backend(group: Any) -> None:
    """Name the first backend of a group with one for each device; torch warns at the end otherwise."""
    if isinstance(group, dist.ProcessGroup):
        group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)


def _call(operation: str, args: tuple[Any, ...]) -> Call:
    """Return the record of a collective, from its arguments."""
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    ranks = tuple(dist.get_process_group_ranks(group))
    if operation == "barrier":
        return Call(operation, ranks, ())
    tensors = list(_tensors(args[1] if operation in INPUT_ONLY else args))
    sizes, dtypes = tuple(tensor.nbytes for tensor in tensors), tuple(str(tensor.dtype) for tensor in tensors)
    if operation in ("send", "recv_"):
        return Call(operation, ranks, sizes, ranks[args[2]], dtypes)
    root = args[ROOT[operation]] if operation in ROOT else -1
    return Call(
        operation, ranks, sizes, dtypes=dtypes, root=root
    )  # torch does not show the kind of a reduction to Python


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _on_meta(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the tensor factory with every named device replaced by the meta device."""

    def create(*args: Any, **kwargs: Any) -> Tensor:
        return factory(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))

    return create


class _FusedNorm(torch.autograd.Function):
    """Norm that saves the tensors of a GPU's norm; elsewhere torch splits it into operations that save others."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shape: Sequence[int], weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty(*rows.shape[: -len(shape)], 1, dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), None, torch.empty_like(weight), None


def _patches(recorder: CallRecorder) -> dict[str, Patch]:
    return megatron_patches.CPU_PATCHES | {
        "current_device": Patch(torch.cuda, "current_device", lambda: "meta"),
        "tensor": Patch(torch, "tensor", _on_meta(torch.tensor)),
        "zeros": Patch(torch, "zeros", _on_meta(torch.zeros)),
        "Tensor.cpu": Patch(Tensor, "cpu", lambda tensor: tensor),
        "l2_norm_impl": Patch(
            clip_grads, "l2_norm_impl", lambda *args: (torch.ones(1), None)
        ),  # of numbers on the host
        "rms_norm": Patch(torch, "rms_norm", _FusedNorm.apply),
        "new_group": Patch(dist, "new_group", recorder.new_group),
        "all_gather_object": Patch(dist, "all_gather_object", recorder.all_gather_object),
        "shapes": Patch(P2PCommunicator, "_communicate_shapes", lambda *args: recorder.communicate_shapes(*args)),
        "collect": Patch(gc, "collect", lambda *args: 0),  # runs before each checkpoint; there is no memory to free
        "nonzero": Patch(tracing, "meta_nonzero_assume_all_nonzero", True),
    }


@contextlib.contextmanager
def simulate_rank(world: int, rank: int) -> Iterator[CallRecorder]:
    """Act as one rank of a world without the other ranks."""
    recorder, excepthook = CallRecorder(world), sys.excepthook
    dist.init_process_group(BACKEND, rank=rank, world_size=world, store=FakeStore())
    _set_default_backend(dist.group.WORLD)
    try:
        with megatron_patches.replaced(_patches(recorder)), torch.device("meta"), recorder:
            yield recorder
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook  # torch's prints the rank before every line

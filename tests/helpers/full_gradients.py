"""Full gradients of a trainer, from what the ranks of a layout hold."""

from __future__ import annotations

import torch


def completed(trainer) -> None:
    """Gather the summed gradient on every replica; the distributed optimizer leaves each only its share."""
    import torch.distributed as dist

    for buffer in (buffer for chunk in trainer.chunks for buffer in chunk.buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def whole(held: dict, head: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return full tensors by head and Megatron's name, from those of tensor-parallel ranks and pipeline stages."""
    from oreal_megatron.mcore import parallel
    from oreal_megatron.models import tensors

    def gather(own: dict, group) -> list[dict]:
        """Return each rank's tensors, sent as one flat message; pickling them would take most of the test's time."""
        import torch.distributed as dist

        if group.size() == 1:
            return [own]
        shapes = [None] * group.size()
        dist.all_gather_object(shapes, {name: value.shape for name, value in own.items()}, group=group)
        sizes = [sum(shape.numel() for shape in rank.values()) for rank in shapes]
        flat = torch.cat([value.float().flatten() for value in own.values()])
        buffers = [flat.new_empty(max(sizes)) for _ in sizes]
        dist.all_gather(buffers, torch.nn.functional.pad(flat, (0, max(sizes) - len(flat))), group=group)
        return [
            {
                name: part.view(shape)
                for part, (name, shape) in zip(
                    buffer[:size].split([shape.numel() for shape in rank.values()]), rank.items(), strict=True
                )
            }
            for buffer, size, rank in zip(buffers, sizes, shapes, strict=True)
        ]

    tensor_group, pipeline_group = parallel.tensor_and_pipeline_groups()
    ranks, full = gather({entry: value.float() for entry, value in held.items()}, tensor_group), {}
    for entry in (entry for entry in held if entry.exported):
        shards = [rank[entry] for rank in ranks]
        if entry.sharding is tensors.Sharding.REPLICATED:
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"{entry.megatron} differs between ranks"
        # Without the rows that pad the vocabulary, of which there are more with more ranks.
        full[head, entry.megatron] = tensors.unshard(entry, shards)[
            : 80 if entry.sharding is tensors.Sharding.VOCABULARY else None
        ]
    return {name: value for stage in gather(full, pipeline_group) for name, value in stage.items()}


def distance(wanted: dict, got: dict) -> float:
    """The largest relative error of any tensor."""
    assert wanted.keys() == got.keys()
    return max(((got[name] - value).norm() / value.norm().clamp(min=1e-12)).item() for name, value in wanted.items())

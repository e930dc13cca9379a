"""The fused heads with the vocabulary cut over processes: the same numbers as one process, the same bits on all."""

from __future__ import annotations

import pytest
import torch

N, H, V = 24, 16, 128
REAL = 70  # of the 128 columns; of four ranks the last holds padding only
CUTS = {2: [0, 64, 128], 4: [0, 32, 64, 96, 128], "uneven": [0, 10, 128], "one column": [0, 127, 128]}


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.5
    labels = torch.randint(0, REAL, (N,), generator=generator)
    labels[:6] = torch.tensor([0, 31, 32, 63, 64, REAL - 1])  # first and last columns of shards
    labels[7] = -100
    return hidden, weight, labels


def terms():
    from oreal_kernels import LossTerms

    generator = torch.Generator().manual_seed(1)
    return LossTerms(
        torch.randn(N, generator=generator) - 4, torch.rand(N, generator=generator), torch.tensor([0, 10, N]),
        torch.tensor([1.0, -1.0]), torch.tensor([0.7, -1.1]), 30, 20, 50, 1.0, 0.5, 0.2, "k3", True, entropy_coef=0.6,
    )  # fmt: skip


def everything(cut: list[int], sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """All operations on this rank's slice of the vocabulary; what they give, gradients included."""
    import torch.distributed as dist
    from oreal_kernels import linear_logprob, linear_oreal_loss, logprob_from_logits

    group, rank = None, 0
    if len(cut) > 2:
        dist.init_process_group("gloo")
        group, rank = dist.group.WORLD, dist.get_rank()
    ranks = len(cut) - 1
    hidden, weight, labels = inputs()
    own = slice(cut[rank], cut[rank + 1])
    options = dict(vocab_size=REAL, vocab_start=cut[rank], group=group)
    even = len({stop - start for start, stop in zip(cut, cut[1:], strict=False)}) == 1
    if even:
        options.pop("vocab_start")  # equal shares are the default
    share = slice(rank * N // ranks, (rank + 1) * N // ranks) if sequence_parallel else slice(None)
    rows = torch.arange(N).flip(0)
    found = {}
    for name, budget in (("save", 2**20), ("chunks", 5 * 4 * REAL // ranks)):
        x, w = hidden[share].clone().requires_grad_(), weight[own].clone().requires_grad_()
        more = dict(options, rows=rows, sequence_parallel=sequence_parallel, budget_bytes=budget)
        logp, entropy = linear_logprob(x, w, labels.flip(0), temperature=0.8, **more)
        ((logp + 0.3 * entropy) * torch.arange(N)).sum().backward()
        found |= {f"{name}/logp": logp, f"{name}/entropy": entropy, f"{name}/dx": x.grad, f"{name}/dw": w.grad}
        y, v, main_grad = hidden[share].clone().requires_grad_(), weight[own].clone(), torch.zeros_like(weight[own])
        v.requires_grad_()
        loss, sums, _, entropy = linear_oreal_loss(
            y, v, labels.flip(0), terms(), main_grad=main_grad, loss_scale=1.0, **more
        )
        loss.backward()
        found |= {
            f"{name}/bonus/entropy": entropy,
            f"{name}/loss": loss,
            f"{name}/sums": sums,
            f"{name}/dy": y.grad,
            f"{name}/dv": main_grad,
        }
    z = (hidden @ weight[own].t()).requires_grad_()
    logp, entropy = logprob_from_logits(z, labels, softcap=4.0, **options)
    ((logp - entropy) * torch.arange(N)).sum().backward()
    found |= {"logits/logp": logp, "logits/entropy": entropy, "logits/dw": z.grad.t()}
    if group is not None:
        dist.destroy_process_group()
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("cut, sequence_parallel", [*((cut, False) for cut in CUTS), (2, True), (4, True)])
def test_any_cut_of_the_vocabulary_gives_the_same(cut, sequence_parallel, in_processes):
    wanted = everything([0, V], False)
    ranks = in_processes(len(CUTS[cut]) - 1, everything, CUTS[cut], sequence_parallel)
    for name, value in wanted.items():
        parts = [rank[name] for rank in ranks]
        kind = name.split("/")[-1]
        if kind.startswith("d"):
            cut_here = kind in ("dw", "dv") or sequence_parallel
            torch.testing.assert_close(torch.cat(parts) if cut_here else parts[-1], value, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(parts[0], value, rtol=1e-5, atol=1e-5)
        if kind in ("logp", "entropy", "loss", "sums"):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
    assert not any(rank["save/dw"][max(0, REAL - CUTS[cut][i]) :].any() for i, rank in enumerate(ranks)), "padding"

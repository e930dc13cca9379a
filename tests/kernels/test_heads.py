"""Heads against fp64 on all logits at once: values, gradients, and the cases that other kernels broke on."""

from __future__ import annotations

import pytest
import torch
from oreal_kernels import Terms, backend, linear_logprob, linear_oreal_loss, logprob_from_logits, plan
from oreal_kernels.linear_logprob import reference as linear_logprob_reference
from oreal_kernels.linear_oreal_loss import reference as linear_oreal_reference
from oreal_kernels.linear_statistics import linear_statistics
from oreal_kernels.linear_statistics import reference as linear_statistics_reference
from oreal_kernels.logprob_from_logits import reference as from_logits_reference
from torch.utils.checkpoint import checkpoint

N, H, V = 19, 24, 179  # nothing is a multiple of a block


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(n: int = N, vocabulary: int = V) -> torch.Tensor:
    labels = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(9))
    labels[:2] = torch.tensor([0, vocabulary - 1])
    return labels


def terms_of(n: int = N, kl_kind: str = "k3", seed: int = 5) -> Terms:
    """Four sequences, one of them empty, half of them right."""
    return Terms(
        reference_logp=random(n, seed=seed) - 5,
        weight=torch.rand(n, generator=torch.Generator().manual_seed(seed)),
        cu_seqlens=torch.tensor([0, n // 3, n // 3, n // 2, n]),
        reward=torch.tensor([1.0, -1.0, -1.0, 1.0]),
        advantage=torch.tensor([0.4, -0.3, -1.6, 1.2]),
        right_tokens=n,
        wrong_tokens=n // 2,
        action_tokens=2 * n,
        positive_coef=1.0,
        negative_coef=0.5,
        kl_coef=0.3,
        kl_kind=kl_kind,
        advantage_on_positives=True,
    )


def wide(terms: Terms) -> Terms:
    from dataclasses import replace

    return replace(
        terms,
        reference_logp=terms.reference_logp.double(),
        weight=terms.weight.double(),
        advantage=terms.advantage.double(),
    )


def gradients(function, hidden, weight, dtype=torch.float32):
    """Values of a function of (hidden, weight), and the gradients of its first values' sum weighted by hand."""
    x, w = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
    outputs = function(x, w)
    sum((out.double() * random(*out.shape, seed=77 + i).double()).sum() for i, out in enumerate(outputs)).backward()
    return [*(out.detach().double() for out in outputs), x.grad.double(), w.grad.double()]


def close_enough(got: list, plain: list, exact: list) -> None:
    """No further from fp64 than twice the plain torch path in the same precision, but for a rounding of the largest
    (entropies next to 0 come from sums next to 1)."""
    for place, (value, usual, wanted) in enumerate(zip(got, plain, exact, strict=True)):
        room = 2 * (usual - wanted).abs().max() + 1e-6 * wanted.abs().max() + (2e-7 if place == 1 else 1e-30)
        assert (value - wanted).abs().max() <= room, f"output {place}: {(value - wanted).abs().max()} > {room}"


CASES = {
    "plain": {},
    "temperature 0.01": dict(temperature=0.01),
    "temperature 10": dict(temperature=10.0),
    "temperature per row": dict(temperature=torch.linspace(0.5, 2.0, N)),
    "soft cap": dict(softcap=3.0, temperature=0.7),
    "padded vocabulary": dict(vocab_size=V - 45),
    "all logits far below zero": dict(shift=-40.0),
    "peaked": dict(shift=30.0),
    "save": dict(mode="save"),
    "recompute in small chunks": dict(mode="recompute", budget_bytes=8 * V * 4),
    "hybrid": dict(mode="hybrid", budget_bytes=24 * V * 4),
    "fp32 logits": dict(logits_dtype=torch.float32),
    "some rows": dict(rows=torch.arange(N - 1, -1, -1)),
}


def case_of(options: dict, dtype: torch.dtype):
    options = dict(options)
    shift = options.pop("shift", 0.0)
    hidden, weight = random(N, H).to(dtype), random(V, H, seed=1, scale=0.6).to(dtype)
    if shift:  # one hidden unit is 1 and adds the shift to every logit, or to one far likelier token
        hidden[:, 0] = 1
        weight[: V if shift < 0 else 1, 0] = shift
    return hidden, weight, labels_of(vocabulary=options.get("vocab_size", V)), options


@pytest.mark.parametrize("name", CASES)
def test_linear_logprob_and_its_gradients(name, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    exact = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, torch.float64)
    plain = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight)
    got = gradients(lambda x, w: linear_logprob(x, w, labels, **options), hidden, weight)
    close_enough(got, plain, exact)
    assert not got[3][options.get("vocab_size", V) :].any(), "padding has no gradient"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("served_by", ["native", "reference"], indirect=True)  # Triton's interpreter reads bf16 wrongly
def test_linear_logprob_in_bfloat16(name, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.bfloat16)
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    exact = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, torch.float64)
    plain = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, torch.bfloat16)
    got = gradients(lambda x, w: linear_logprob(x, w, labels, **options), hidden, weight, torch.bfloat16)
    close_enough(got, plain, exact)
    if "logits_dtype" in options:  # what it is for: the log-prob no longer sees rounded logits
        assert (got[0] - exact[0]).abs().max() < 0.1 * (plain[0] - exact[0]).abs().max()


@pytest.mark.parametrize("name", [name for name, options in CASES.items() if "rows" not in options])
def test_logprob_from_logits(name, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)
    options = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size")}

    def through(function, **more):
        return lambda x, w: function(x @ w.t(), labels, **options, **more)

    exact = gradients(through(from_logits_reference), hidden, weight, torch.float64)
    plain = gradients(through(from_logits_reference), hidden, weight)
    close_enough(gradients(through(logprob_from_logits), hidden, weight), plain, exact)
    close_enough(gradients(through(logprob_from_logits, in_place_backward=True), hidden, weight), plain, exact)


def test_gradient_in_place_spoils_the_logits_and_torch_says_so():
    logits = random(3, 5).requires_grad_()
    own = logits * 1
    logp, _ = logprob_from_logits(own, torch.tensor([0, 1, 2]), in_place_backward=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("name", [name for name, options in CASES.items() if "mode" not in options])
@pytest.mark.parametrize("budget", [8 * V * 4, 2**30])
def test_linear_oreal_loss_and_its_gradients(name, budget, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)
    labels[[3, N - 1]] = -100
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    terms = terms_of()

    def loss_of(function, terms, **options):
        return lambda x, w: [function(x, w, labels, terms, **options).loss]

    exact = gradients(loss_of(linear_oreal_reference, wide(terms), **shared), hidden, weight, torch.float64)
    plain = gradients(loss_of(linear_oreal_reference, terms, **shared), hidden, weight)
    got = gradients(loss_of(linear_oreal_loss, terms, budget_bytes=budget, **options), hidden, weight)
    close_enough(got, plain, exact)
    wanted = linear_oreal_reference(hidden.double(), weight.double(), labels, wide(terms), **shared)
    found = linear_oreal_loss(hidden, weight, labels, terms, **options)
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logp.double(), wanted.logp, rtol=1e-4, atol=1e-4)


def test_main_grad_and_loss_scale(served_by):
    """Straight into main_grad, or by way of a buffer, or as an ordinary gradient: the same sums."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    terms = terms_of()
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (linear_oreal_loss(x, w, labels, terms).loss * 3).backward()
    for scale in (3.0, torch.tensor(3.0), None):
        y, v = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        main_grad = torch.ones(V, H)
        result = linear_oreal_loss(y, v, labels, terms, main_grad=main_grad, loss_scale=scale)
        assert (scale is None) == bool((main_grad == 1).all()), "with a known scale the forward adds it already"
        (result.loss * 3).backward()
        assert v.grad is None
        torch.testing.assert_close(main_grad - 1, w.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)
    main_grad = torch.ones(V, H)
    logp, entropy = linear_logprob(hidden, weight.clone().requires_grad_(), labels, main_grad=main_grad)
    wanted = torch.autograd.grad((lambda v: linear_logprob(hidden, v, labels)[0].sum())(w), w)[0]
    (logp.sum() + 0 * entropy.sum()).backward()
    torch.testing.assert_close(main_grad - 1, wanted, rtol=1e-4, atol=1e-5)


def test_megatrons_flags_are_set():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    for zero_out, terms in ((False, terms_of()), (True, terms_of())):
        w = weight.clone().requires_grad_()
        w.grad_added_to_main_grad, w.zero_out_wgrad = False, zero_out
        linear_oreal_loss(hidden, w, labels, terms, main_grad=torch.zeros(V, H), loss_scale=1.0).loss.backward()
        assert w.grad_added_to_main_grad and w.grad.shape == w.shape
        assert not zero_out or not w.grad.any()


def test_a_second_backward_gives_the_same_or_is_refused(served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    for mode in ("save", "recompute"):
        x = hidden.clone().requires_grad_()
        logp, _ = linear_logprob(x, weight, labels, mode=mode)
        first = torch.autograd.grad(logp.sum(), x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(logp.sum(), x)[0], first)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_oreal_loss(x, w, labels, terms_of()).loss
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (x, w)), strict=True))
    loss = linear_oreal_loss(x, w, labels, terms_of(), main_grad=torch.zeros(V, H), loss_scale=1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_wrong_loss_scale_is_refused():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    loss = linear_oreal_loss(hidden.requires_grad_(), weight, labels, terms_of(), loss_scale=2.0).loss
    with pytest.raises(RuntimeError, match="differs from the loss_scale"):
        loss.backward()


def test_a_backward_that_never_runs_is_told():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    w = weight.requires_grad_()
    with pytest.warns(UserWarning, match="its backward never ran"):
        result = linear_oreal_loss(hidden, w, labels, terms_of(), main_grad=torch.zeros(V, H), loss_scale=1.0)
        del result


def test_no_grad_touches_no_gradient(served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    main_grad = torch.zeros(V, H)
    with torch.no_grad():
        quiet = linear_oreal_loss(
            hidden, weight.requires_grad_(), labels, terms_of(), main_grad=main_grad, loss_scale=1.0
        )
        logp, entropy = linear_logprob(hidden, weight, labels)
    assert not main_grad.any() and not quiet.loss.requires_grad and not logp.requires_grad
    loud = linear_oreal_loss(hidden, weight, labels, terms_of())
    assert torch.equal(quiet.loss, loud.loss.detach()) and torch.equal(quiet.logp, loud.logp)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_an_activation_checkpoint(reentrant):
    """The recomputation must not count the weight's gradient twice: right, or refused."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    wanted = torch.autograd.grad(linear_oreal_loss(x, w, labels, terms_of()).loss, (x, w))

    def run(**options):
        return checkpoint(
            lambda x: linear_oreal_loss(x, w, labels, terms_of(), **options).loss, x, use_reentrant=reentrant
        )

    main_grad = torch.zeros(V, H)
    if reentrant:
        run(main_grad=main_grad, loss_scale=1.0).backward()
    else:
        with pytest.raises(RuntimeError, match="must not be checkpointed"):
            run(main_grad=main_grad, loss_scale=1.0)
        assert not main_grad.any()
        run(main_grad=main_grad).backward()
    torch.testing.assert_close(main_grad, wanted[1])
    torch.testing.assert_close(x.grad, wanted[0])
    y = hidden.clone().requires_grad_()
    checkpoint(lambda y: linear_logprob(y, w, labels)[0].sum(), y, use_reentrant=reentrant).backward()
    torch.testing.assert_close(y.grad, torch.autograd.grad(linear_logprob(x, w, labels)[0].sum(), x)[0])


def test_ignored_rows_and_no_rows_at_all(served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    for ignored in (slice(0, 5), slice(None)):
        some = labels.clone()
        some[ignored] = -100
        x = hidden.clone().requires_grad_()
        logp, entropy = linear_logprob(x, weight, some)
        (logp.sum() + entropy.sum()).backward()
        assert not logp[ignored].any() and not entropy[ignored].any() and not x.grad[ignored].any()
        for kind in ("k1", "k3"):
            y = hidden.clone().requires_grad_()
            result = linear_oreal_loss(y, weight, some, terms_of(kl_kind=kind))
            result.loss.backward()
            assert not y.grad[ignored].any() and result.loss.isfinite()
    nothing = torch.zeros(0, dtype=torch.long)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = linear_logprob(x, w, nothing, rows=nothing)
    (logp.sum() + entropy.sum()).backward()
    linear_oreal_loss(x, w, nothing, terms_of(0), rows=nothing).loss.backward()
    assert logp.shape == (0,) and not x.grad.any() and not w.grad.any()


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    for bad in (V - 3, V, -1):
        with pytest.raises(RuntimeError, match=f"within the vocabulary of {V - 3}"):
            linear_logprob(hidden, weight, torch.full_like(labels, bad), vocab_size=V - 3)


def test_gradient_over_the_vocabulary_sums_to_zero(served_by):
    logits = random(N, V, scale=4).requires_grad_()
    logp, entropy = logprob_from_logits(logits, labels_of())
    ((logp + 0.3 * entropy) * random(N, seed=4)).sum().backward()
    assert logits.grad.sum(1).abs().max() < 1e-5


def test_small_gradients_of_a_certain_token_survive(served_by):
    """p = 1 - 1e-6: the label's gradient is that 1e-6, not 1 less a rounded 1."""
    logits = torch.tensor([[14.0, 0.0], [0.0, -14.0]]).requires_grad_()
    logprob_from_logits(logits, torch.tensor([0, 0]))[0].sum().backward()
    wanted = 1 / (1 + torch.tensor(14.0, dtype=torch.float64).exp())
    torch.testing.assert_close(logits.grad[:, 0].double(), wanted.expand(2), rtol=0.05, atol=0)


def test_infinite_logits_do_not_spread(served_by):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, -torch.inf, 2.0]]).requires_grad_()
    logp, entropy = logprob_from_logits(logits, torch.tensor([0, 2]))
    (logp.sum() + entropy.sum()).backward()
    torch.testing.assert_close(logp, torch.tensor([-1.3132617, 0.0]))
    assert logits.grad.isfinite().all() and entropy.isfinite().all() and not logits.grad[1].any()


def test_the_same_bits_in_every_run(served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)

    def run():
        return gradients(lambda x, w: linear_logprob(x, w, labels), hidden, weight)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_row_does_not_depend_on_its_neighbours(served_by):
    logits, labels = random(N, V, scale=3), labels_of()
    logp, entropy = logprob_from_logits(logits, labels)
    alone, alone_entropy = logprob_from_logits(logits[5:6], labels[5:6])
    assert torch.equal(alone[0], logp[5]) and torch.equal(alone_entropy[0], entropy[5])


def test_offsets_beyond_two_to_the_31(served_by):
    """Rows of 16k tokens x 152k words lie further apart than an int32 counts; only two pages of these exist."""
    far = torch.empty(2**31 + 48).as_strided((2, 40), (2**31 + 8, 1))
    far.copy_(random(2, 40, scale=3))
    near, labels = far.clone().requires_grad_(), torch.tensor([3, 39])
    logprob_from_logits(near, labels)[0].sum().backward()
    leaf = far.requires_grad_()
    logp, _ = logprob_from_logits(leaf, labels, in_place_backward=True)
    torch.testing.assert_close(logp, logprob_from_logits(near, labels)[0])
    gradient = torch.autograd.grad(logp.sum(), leaf)[0]
    torch.testing.assert_close(gradient, near.grad)


@pytest.mark.parametrize("columns", [V, V - 60, 1])
def test_statistics_without_logits(columns):
    hidden, weight = random(N, H), random(V, H, seed=1)
    arguments = (hidden, weight, labels_of() - 7, torch.linspace(0.5, 2, N), 0.0, columns, torch.float32)
    with backend.use("triton"):
        torch.testing.assert_close(
            linear_statistics(*arguments), linear_statistics_reference(*arguments), rtol=1e-5, atol=1e-5
        )


def test_narrow_heads_never_write_logits_where_triton_serves():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    with backend.use("triton"), torch.no_grad():
        fused, _ = linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(fused, linear_logprob_reference(hidden, weight, labels)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 100, 5000, 100_000])
@pytest.mark.parametrize("budget", [1, 2**20, 2**28, 2**34])
@pytest.mark.parametrize("mode", plan.MODES)
def test_the_plan_keeps_to_its_budget(rows, budget, mode):
    row_bytes = 152064 * 2
    how = plan.choose(rows, 5120, 152064, row_bytes, budget, mode, plan.GPU)
    held = min(rows, how.chunk_rows * (how.kept_chunks + (how.chunk_rows * how.kept_chunks < rows))) * row_bytes
    assert mode == "save" or held <= max(budget, row_bytes)
    assert how.chunk_rows >= 1 and (mode != "recompute" or not how.kept_chunks)
    assert mode != "save" or how.chunk_rows * how.kept_chunks >= rows


def test_more_memory_is_never_slower():
    times = []
    for budget in (2**28, 2**30, 2**31, 2**32, 2**33):
        how = plan.choose(16384, 5120, 152064, 152064 * 2, budget, "auto", plan.GPU)
        times.append(plan.seconds(how, 16384, 5120, 152064, plan.GPU))
    assert times == sorted(times, reverse=True) and times[-1] < 0.8 * times[0]

"""Heads against fp64 on all logits at once: values, gradients, and the cases that other kernels broke on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from oreal_kernels import (
    KL_KINDS,
    LossTerms,
    chunk_plan,
    gemm,
    linear_logprob,
    linear_oreal_loss,
    logprob_from_logits,
    oreal_loss,
    token_weights,
    vocab_head,
)
from oreal_kernels.hidden_to_logprob import reference as linear_logprob_reference
from oreal_kernels.hidden_to_loss import reference as linear_oreal_reference
from oreal_kernels.logits_to_logprob import reference as from_logits_reference
from oreal_kernels.row_gradient import row_gradient
from torch.utils.checkpoint import checkpoint

N, H, V = 11, 24, 179  # two full blocks of the interpreter and a remainder


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(n: int = N, vocabulary: int = V) -> torch.Tensor:
    labels = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(9))
    labels[:2] = torch.tensor([0, vocabulary - 1])
    return labels


def terms_of(n: int = N, kl_kind: str = "k3", seed: int = 5) -> LossTerms:
    """Four sequences, one of them empty, half of them correct."""
    return LossTerms(
        reference_logp=random(n, seed=seed) - 5,
        weight=torch.rand(n, generator=torch.Generator().manual_seed(seed)),
        cu_seqlens=torch.tensor([0, n // 3, n // 3, n // 2, n]),
        reward=torch.tensor([1.0, -1.0, -1.0, 1.0]),
        advantage=torch.tensor([0.4, -0.3, -1.6, 1.2]),
        correct_tokens=n,
        incorrect_tokens=n // 2,
        action_tokens=2 * n,
        positive_coef=1.0,
        negative_coef=0.5,
        kl_coef=0.3,
        kl_kind=kl_kind,
        advantage_on_positives=True,
    )


def wide(terms: LossTerms) -> LossTerms:
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
    for place, (value, usual, expected) in enumerate(zip(got, plain, exact, strict=True)):
        room = 2 * (usual - expected).abs().max() + 1e-6 * expected.abs().max() + (2e-7 if place == 1 else 1e-30)
        assert (value - expected).abs().max() <= room, f"output {place}: {(value - expected).abs().max()} > {room}"


SOME_KEPT = "some kept, some computed again"
CASES = {
    "plain": {},
    "temperature 0.01": dict(temperature=0.01),
    "temperature 10": dict(temperature=10.0),
    "temperature per row": dict(temperature=torch.linspace(0.5, 2.0, N)),
    "soft cap": dict(softcap=3.0, temperature=0.7),
    "padded vocabulary": dict(vocab_size=V - 50),  # one column more than two of the interpreter's blocks
    "all logits far below zero": dict(shift=-40.0),
    "peaked": dict(shift=30.0),
    "save": dict(mode="save"),
    "recompute in small chunks": dict(mode="recompute", budget_bytes=4 * V * 4),
    SOME_KEPT: dict(budget_bytes=4 * V * 4),
    "fp32 logits": dict(logits_dtype=torch.float32),
    "some rows": dict(rows=torch.arange(N - 1, -1, -1)),
}


@pytest.fixture
def products_cost_all(name, monkeypatch) -> None:
    """Let the plan of SOME_KEPT keep what fits: on a real CPU, chunks this small cost more than a product again."""
    if name == SOME_KEPT:
        monkeypatch.setattr(chunk_plan, "CPU", chunk_plan.DeviceSpeed(flops=1.0, bytes_per_second=1e12))


def case_of(options: dict, dtype: torch.dtype):
    options = dict(options)
    shift = options.pop("shift", 0.0)
    hidden, weight = random(N, H).to(dtype), random(V, H, seed=1, scale=0.6).to(dtype)
    if shift:  # one hidden unit is 1 and adds the shift to every logit, or to one far likelier token
        hidden[:, 0] = 1
        weight[: V if shift < 0 else 1, 0] = shift
    return hidden, weight, labels_of(vocabulary=options.get("vocab_size", V)), options


@pytest.mark.usefixtures("products_cost_all")
@pytest.mark.parametrize("name", CASES)
def test_linear_logprob_and_its_gradients(name, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    exact = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, torch.float64)
    plain = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight)
    got = gradients(lambda x, w: linear_logprob(x, w, labels, **options), hidden, weight)
    close_enough(got, plain, exact)
    assert not got[3][options.get("vocab_size", V) :].any(), "padding has no gradient"


def half_of(served_by: str) -> torch.dtype:
    """Triton's interpreter reads bf16 wrongly, but fp16 rightly."""
    return torch.float16 if served_by == "triton" else torch.bfloat16


@pytest.mark.usefixtures("products_cost_all")
@pytest.mark.parametrize("name", CASES)
def test_linear_logprob_in_16_bits(name, served_by):
    dtype = half_of(served_by)
    hidden, weight, labels, options = case_of(CASES[name], dtype)
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    exact = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, torch.float64)
    plain = gradients(lambda x, w: linear_logprob_reference(x, w, labels, **shared), hidden, weight, dtype)
    got = gradients(lambda x, w: linear_logprob(x, w, labels, **options), hidden, weight, dtype)
    close_enough(got, plain, exact)
    if "logits_dtype" in options:  # what it is for: the log-prob no longer sees rounded logits
        assert (got[0] - exact[0]).abs().max() < 0.1 * (plain[0] - exact[0]).abs().max()


OF_LOGITS = {"temperature", "softcap", "vocab_size", "shift"}  # options that a function of given logits has


@pytest.mark.parametrize("name", [name for name, options in CASES.items() if options.keys() <= OF_LOGITS])
def test_logprob_from_logits(name, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)

    def through(function, **more):
        return lambda x, w: function(x @ w.t(), labels, **options, **more)

    exact = gradients(through(from_logits_reference), hidden, weight, torch.float64)
    plain = gradients(through(from_logits_reference), hidden, weight)
    for in_place in (False, True) if name in ("plain", "soft cap", "padded vocabulary") else (True,):
        got = gradients(through(logprob_from_logits, in_place_backward=in_place), hidden, weight)
        close_enough(got, plain, exact)


def test_gradient_in_place_spoils_the_logits_and_torch_says_so():
    logits = random(3, 5).requires_grad_()
    own = logits * 1
    logp, _ = logprob_from_logits(own, torch.tensor([0, 1, 2]), in_place_backward=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


IN_CHUNKS = [name for name, options in CASES.items() if "budget_bytes" not in options and "mode" not in options]
AT_ONCE = ["plain", "peaked", "soft cap", "padded vocabulary", "some rows"]


@pytest.mark.parametrize(
    ("name", "budget", "entropy_coef"),
    [*((name, 4 * V * 4, 0.7) for name in IN_CHUNKS), *((name, 2**30, 0.0) for name in AT_ONCE)],
)
def test_linear_oreal_loss_and_its_gradients(name, budget, entropy_coef, served_by):
    hidden, weight, labels, options = case_of(CASES[name], torch.float32)
    labels[[3, N - 1]] = -100
    shared = {key: value for key, value in options.items() if key in ("temperature", "softcap", "vocab_size", "rows")}
    terms, results = replace(terms_of(), entropy_coef=entropy_coef), []

    def loss_of(function, terms, **options):
        def run(x, w):
            results.append(function(x, w, labels, terms, **options))
            return [results[-1].loss]

        return run

    exact = gradients(loss_of(linear_oreal_reference, wide(terms), **shared), hidden, weight, torch.float64)
    plain = gradients(loss_of(linear_oreal_reference, terms, **shared), hidden, weight)
    got = gradients(loss_of(linear_oreal_loss, terms, budget_bytes=budget, **options), hidden, weight)
    close_enough(got, plain, exact)
    expected, _, fused = results
    torch.testing.assert_close(fused.sums, expected.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.logp.double(), expected.logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-4)


def test_the_entropy_bonus_alone_raises_the_entropy_as_its_gradient_says(served_by):
    """A step against the loss's gradient makes every row less sure; without a coefficient there is no entropy pass."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    silent = dict(positive_coef=0.0, negative_coef=0.0, kl_coef=0.0)
    x = hidden.clone().requires_grad_()
    before = linear_oreal_loss(x, weight, labels, replace(terms_of(), entropy_coef=1.0, **silent))
    before.loss.backward()
    assert before.loss.item() == pytest.approx(-before.entropy.sum().item() / (2 * N), rel=1e-5)
    after = linear_oreal_loss(hidden - 0.5 * x.grad, weight, labels, terms_of())
    assert (after.entropy > before.entropy).all()
    y = hidden.clone().requires_grad_()
    linear_oreal_loss(y, weight, labels, replace(terms_of(), **silent)).loss.backward()
    assert not y.grad.any()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_without_a_coefficient_the_gradient_pass_is_the_one_without_entropy(entropy_coef, monkeypatch):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    coefficients = []
    monkeypatch.setattr(vocab_head, "row_gradient", lambda *arguments: coefficients.append(arguments[-1]))
    linear_oreal_loss(hidden.requires_grad_(), weight, labels, replace(terms_of(), entropy_coef=entropy_coef))
    assert coefficients and all((b is None) == (entropy_coef == 0.0) for b in coefficients)


def test_log_probs_alone_have_no_entropy():
    with pytest.raises(ValueError, match=r"entropy_coef is 0\.1, but log-probs of the labels have no entropy"):
        oreal_loss(random(N), replace(terms_of(), entropy_coef=0.1))


@pytest.mark.parametrize("budget", [4 * V * 4, 2**30])
def test_linear_oreal_loss_with_importance_ratios(budget, served_by):
    """In fp64 the truncated ratio is of each chunk's own log-probs; some tokens do not count, some have no ratio."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    labels[[3, N - 1]] = -100
    behaviour_logp = linear_logprob_reference(hidden, weight, labels)[0] + random(N, seed=8)
    behaviour_logp[::5] = torch.nan
    terms = replace(terms_of(kl_kind="k1"), behaviour_logp=behaviour_logp, ratio_cap=1.5)

    def loss_of(function, terms, **options):
        return lambda x, w: [function(x, w, labels, terms, **options).loss]

    exact = gradients(loss_of(linear_oreal_reference, wide(terms)), hidden, weight, torch.float64)
    plain = gradients(loss_of(linear_oreal_reference, terms), hidden, weight)
    close_enough(gradients(loss_of(linear_oreal_loss, terms, budget_bytes=budget), hidden, weight), plain, exact)
    without = gradients(loss_of(linear_oreal_reference, wide(replace(terms, ratio_cap=0.0))), hidden, weight)
    assert (without[1] - exact[1]).abs().max() > 0.01 * exact[1].abs().max()


@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_linear_oreal_loss_in_16_bits_and_scaled(kl_kind, served_by):
    """1/3 is no 16-bit number: neither gradient may see it rounded."""
    dtype, terms = half_of(served_by), replace(terms_of(kl_kind=kl_kind), entropy_coef=0.5)
    hidden, weight, labels, _ = case_of({}, dtype)
    terms = replace(terms, reference_logp=terms.reference_logp.clamp(min=-9) - 4)

    def loss_of(function, terms):
        return lambda x, w: [function(x, w, labels, terms).loss / 3 * 60]

    exact = gradients(loss_of(linear_oreal_reference, wide(terms)), hidden, weight, torch.float64)
    plain = gradients(loss_of(linear_oreal_reference, terms), hidden, weight, dtype)
    close_enough(gradients(loss_of(linear_oreal_loss, terms), hidden, weight, dtype), plain, exact)


def test_the_scale_of_the_loss_is_not_rounded():
    """19.94 is no bf16 number; rounded to 20 it would lengthen every hidden gradient by 0.3 percent."""
    hidden, weight, labels, _ = case_of({}, torch.bfloat16)

    def length(scale: float) -> float:
        x = hidden.clone().requires_grad_()
        (linear_oreal_loss(x, weight, labels, terms_of()).loss * scale).backward()
        return x.grad.double().abs().sum().item()

    assert length(19.94) / length(1.0) == pytest.approx(19.94, rel=1e-3)


def test_a_gradient_of_many_chunks_is_as_good_as_of_one(served_by):
    """Without main_grad too the weight's gradient is summed in fp32, and rounded once."""
    dtype = half_of(served_by)
    hidden, weight, labels = random(40, H).to(dtype), random(V, H, seed=1).to(dtype), labels_of(40)

    def gradient(budget: int) -> torch.Tensor:
        w = weight.clone().requires_grad_()
        linear_logprob(hidden, w, labels, mode="recompute", budget_bytes=budget)[0].sum().backward()
        return w.grad.double()

    one, many = gradient(2**20), gradient(4 * V * 2)
    assert (many - one).norm() < 0.05 * torch.finfo(dtype).eps * one.norm()  # summed in 16 bits: 0.4


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
    expected = torch.autograd.grad((lambda v: linear_logprob(hidden, v, labels)[0].sum())(w), w)[0]
    (logp.sum() + 0 * entropy.sum()).backward()
    torch.testing.assert_close(main_grad - 1, expected, rtol=1e-4, atol=1e-5)


def test_megatrons_flags_are_set():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    for zero_out, terms in ((False, terms_of()), (True, terms_of())):
        w = weight.clone().requires_grad_()
        w.grad_added_to_main_grad, w.zero_out_wgrad = False, zero_out
        linear_oreal_loss(hidden, w, labels, terms, main_grad=torch.zeros(V, H), loss_scale=1.0).loss.backward()
        assert w.grad_added_to_main_grad and w.grad.shape == w.shape
        assert not zero_out or not w.grad.any()


def test_a_second_backward_gives_the_same_or_is_rejected(served_by):
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


def test_a_different_loss_scale_is_rejected():
    hidden, weight, labels, _ = case_of({}, torch.float32)
    loss = linear_oreal_loss(hidden.requires_grad_(), weight, labels, terms_of(), loss_scale=2.0).loss
    with pytest.raises(RuntimeError, match="differs from the given loss_scale"):
        loss.backward()


def test_a_backward_that_never_runs_is_reported():
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
    """The recomputation must not count the weight's gradient twice: correct, or rejected."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(linear_oreal_loss(x, w, labels, terms_of()).loss, (x, w))

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
    torch.testing.assert_close(main_grad, expected[1])
    torch.testing.assert_close(x.grad, expected[0])
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


def test_a_label_outside_the_vocabulary_is_rejected():
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
    """The label's gradient is 1 - p = 1e-6, of which 1 less a rounded p would leave one digit."""
    logits, out, zero = torch.tensor([[-1e-6, -20.0]]), torch.empty(1, 2), torch.zeros(1)
    row_gradient(logits, out, torch.tensor([0]), zero + 1, 0.0, 2, zero, zero, zero, zero + 1, zero)
    torch.testing.assert_close(out[0, 0].double(), -torch.expm1(logits.double()[0, 0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_gradient_without_an_entropy_is_that_with_a_coefficient_of_zero(softcap, in_place, served_by):
    """Labels at the ends of blocks and rows, of another rank, and none; likely and unlikely ones."""
    columns, label = 200, torch.tensor([0, 63, 64, 127, 199, 200, -1, 70])
    logits = torch.randn(8, 208, generator=torch.Generator().manual_seed(0)) * 4
    logits[2, 64] = 40.0
    row = torch.linspace(-1.0, 1.0, 8)
    row[7] = 0.0
    scale = torch.full((8,), 1.25)
    z = torch.tanh(logits[:, :columns] / softcap) * softcap * 1.25 if softcap else logits[:, :columns] * 1.25
    maximum = z.amax(1)
    log_total = (z - maximum[:, None]).exp().sum(1).log()
    arguments = label, scale, softcap, columns, maximum, log_total, torch.ones(8), row
    results = []
    for b in (None, torch.zeros(8)):
        source = logits.clone()
        out = source if in_place else torch.full_like(logits, 7.0)
        row_gradient(source, out, *arguments, b)
        results.append(out)
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-9)
    exact = torch.autograd.functional.vjp(
        lambda x: torch.where(
            (label >= 0) & (label < columns),
            torch.log_softmax(scaled_logits(x.double(), softcap), 1)[torch.arange(8), label.clamp(0, columns - 1)],
            -torch.logsumexp(scaled_logits(x.double(), softcap), 1),
        ),
        logits[:, :columns],
        row.double(),
    )[1]
    torch.testing.assert_close(results[0][:, :columns], exact.float(), rtol=2e-5, atol=1e-7)
    assert not results[0][:, columns:].any() and not results[0][7].any()


def scaled_logits(x: torch.Tensor, softcap: float) -> torch.Tensor:
    return (torch.tanh(x / softcap) * softcap if softcap else x) * 1.25


def test_what_ignored_rows_hold_does_not_matter(served_by):
    logits = random(3, 70)
    logits[1, 3] = torch.nan
    logits.requires_grad_()
    logp, entropy = logprob_from_logits(logits, torch.tensor([0, -100, 69]))
    (logp + entropy).sum().backward()
    assert not logp[1] and not entropy[1] and not logits.grad[1].any() and logits.grad.isfinite().all()


def test_a_row_of_minus_infinity_has_no_gradient(served_by):
    logits = torch.full((1, 70), -torch.inf).requires_grad_()
    logprob_from_logits(logits, torch.tensor([3]))[0].sum().backward()
    assert not logits.grad.any()


def test_ignored_rows_are_as_good_as_none(served_by):
    """The loss with some rows ignored is that of the rows without them, found by leaving them out by hand."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    terms, keep = terms_of(), torch.ones(N, dtype=torch.bool)
    keep[[0, 4, 5, N - 1]] = False
    cu_seqlens = torch.tensor([int(keep[: int(offset)].sum()) for offset in terms.cu_seqlens])
    fewer = replace(terms, reference_logp=terms.reference_logp[keep], weight=terms.weight[keep], cu_seqlens=cu_seqlens)
    expected = linear_oreal_loss(hidden[keep], weight, labels[keep], fewer)
    found = linear_oreal_loss(hidden, weight, torch.where(keep, labels, -100), terms)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, rows", [
    (dict(mode="save"), N), (dict(mode="recompute"), 2 * N), (dict(budget_bytes=2 * 4 * V * 4), None),
])  # fmt: skip
def test_rows_multiplied_in_each_mode(options, rows, monkeypatch):
    """Kept logits are multiplied once, others twice; gradients overwrite them."""
    hidden, weight, labels, _ = case_of({}, torch.float32)
    multiplied, places, product, add = [], [], gemm.logits, gemm.add_weight_gradient

    def counted(x, w, out):
        multiplied.append(len(x))
        places.append(out.data_ptr())
        return product(x, w, out)

    def watched(dlogits, x, total):
        assert dlogits.data_ptr() in places, "the gradient is written in place of the logits"
        add(dlogits, x, total)

    monkeypatch.setattr(
        chunk_plan, "CPU", chunk_plan.DeviceSpeed(flops=1.0, bytes_per_second=1e12)
    )  # products are all that costs
    monkeypatch.setattr(gemm, "logits", counted)
    monkeypatch.setattr(gemm, "add_weight_gradient", watched)
    linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), labels, **options)[0].sum().backward()
    assert N < sum(multiplied) < 2 * N if rows is None else sum(multiplied) == rows
    multiplied.clear(), places.clear()
    with torch.no_grad():
        linear_logprob(hidden, weight, labels, **options)
    assert sum(multiplied) == N
    assert options.get("mode") == "save" or len(set(places)) == 1, "without a backward one chunk is held"
    multiplied.clear()
    linear_oreal_loss(hidden, weight, labels, terms_of(), budget_bytes=4 * V * 4).loss.backward()
    assert sum(multiplied) == N and len(multiplied) > 2


def test_the_weights_gradient_is_summed_in_fp32(served_by):
    """Many chunks of bf16 products into main_grad: as good as one product in fp64 of the same operands."""
    dlogits, x = random(512, 40).bfloat16(), random(512, 24, seed=1).bfloat16()
    total = torch.zeros(40, 24)
    for piece in torch.arange(512).split(8):
        gemm.add_weight_gradient(dlogits[piece], x[piece], total)
    expected = dlogits.double().t() @ x.double()
    assert (total.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_does_not_matter(default, served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    terms, scores = terms_of(), random(N)
    expected = (
        linear_oreal_loss(hidden, weight, labels, terms),
        token_weights(scores, terms.cu_seqlens, terms.reward > 0, (0.5, 0.5)),
    )
    torch.set_default_dtype(default)
    try:
        found = (
            linear_oreal_loss(hidden, weight, labels, terms),
            token_weights(scores, terms.cu_seqlens, terms.reward > 0, (0.5, 0.5)),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(one, two, strict=True))


def test_any_strides_and_integer_dtypes(served_by):
    hidden, weight, labels, _ = case_of({}, torch.float32)
    terms = terms_of()
    expected = linear_oreal_loss(hidden, weight, labels, terms)
    spread = torch.stack([terms.reference_logp, terms.weight], 1)
    loose = replace(terms, reference_logp=spread[:, 0], weight=spread[:, 1], cu_seqlens=terms.cu_seqlens.int())
    found = linear_oreal_loss(hidden.t().contiguous().t(), weight.t().contiguous().t(), labels.int(), loose)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two)
    logits = hidden @ weight.t()
    one, two = (logprob_from_logits(z, labels) for z in (logits, logits.t().contiguous().t()))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("labels, rows, sentence", [
    (torch.zeros(5).long(), None, f"for {N} rows of hidden"),
    (torch.zeros(5).long(), torch.arange(4), "for 4 entries of rows"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_rejected(labels, rows, sentence):
    hidden, weight, _, _ = case_of({}, torch.float32)
    for run in (
        lambda: linear_logprob(hidden, weight, labels, rows=rows),
        lambda: linear_oreal_loss(hidden, weight, labels, terms_of(5), rows=rows),
    ):
        with pytest.raises(ValueError, match=sentence):
            run()
    for run, error, sentence in (
        (
            lambda: linear_logprob(hidden, weight, torch.zeros(N)),
            TypeError,
            "labels are torch.float32; expected integers",
        ),
        (
            lambda: linear_logprob(hidden.bfloat16(), weight, torch.zeros(N).long()),
            TypeError,
            "hidden is torch.bfloat16",
        ),
        (lambda: linear_logprob(hidden, weight, torch.zeros(N).long(), temperature=0), ValueError, "temperature is 0"),
        (lambda: logprob_from_logits(hidden, torch.zeros(N)), TypeError, "expected integers"),
        (
            lambda: token_weights(torch.zeros(1), torch.tensor([0, 1]), torch.ones(1) > 0, (0.5, 1.0)),
            ValueError,
            "below 1",
        ),
    ):
        with pytest.raises(error, match=sentence):
            run()
    with pytest.raises(ValueError, match="give vocab_size too"):
        linear_logprob(hidden, weight, torch.zeros(N).long(), vocab_start=3)


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
    """Rows of 16k tokens x 152k words lie further apart than an int32 counts; only three pages of these exist."""
    far = torch.empty(2**31 + 64).as_strided((3, 40), (2**30 + 8, 1))
    far.copy_(random(3, 40, scale=3))
    near, labels = far.clone().requires_grad_(), torch.tensor([3, 39, 11])
    logprob_from_logits(near, labels)[0].sum().backward()
    leaf = far.requires_grad_()
    logp, _ = logprob_from_logits(leaf, labels, in_place_backward=True)
    torch.testing.assert_close(logp, logprob_from_logits(near, labels)[0])
    gradient = torch.autograd.grad(logp.sum(), leaf)[0]
    torch.testing.assert_close(gradient, near.grad)


@pytest.mark.parametrize("rows", [0, 1, 100, 5000, 100_000])
@pytest.mark.parametrize("budget", [1, 2**20, 2**28, 2**34])
@pytest.mark.parametrize("mode", chunk_plan.MODES)
def test_the_plan_keeps_to_its_budget(rows, budget, mode):
    row_bytes = 152064 * 2
    how = chunk_plan.choose(rows, 5120, 152064, row_bytes, budget, mode, chunk_plan.GPU)
    held = min(rows, how.chunk_rows * (how.saved_chunks + (how.chunk_rows * how.saved_chunks < rows))) * row_bytes
    assert mode == "save" or held <= max(budget, row_bytes)
    assert how.chunk_rows >= 1 and (mode != "recompute" or not how.saved_chunks)
    assert mode != "save" or how.chunk_rows * how.saved_chunks >= rows


SHAPES = [(16384, 5120, 152064), (16384, 5120, 19008), (16384, 3584, 38016), (5000, 1536, 151936), (70, 896, 151936)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_more_memory_is_never_slower(shape, mode):
    rows, hidden, vocabulary = shape
    times = []
    for budget in range(2**28, 2**33, 2**28):
        plan = chunk_plan.choose(*shape, vocabulary * 2, budget, mode, chunk_plan.GPU)
        times.append(chunk_plan.modelled_seconds(plan, *shape, chunk_plan.GPU))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(times))
    assert rows < 10_000 or vocabulary < 100_000 or times[-1] < 0.9 * times[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("speed", [chunk_plan.GPU, chunk_plan.CPU], ids=["gpu", "cpu"])
def test_no_chunk_size_is_modelled_faster_than_the_chosen_one_by_more_than_its_rounding(shape, speed):
    rows, hidden, vocabulary = shape
    plan = chunk_plan.choose(*shape, vocabulary * 2, 2**30, "recompute", speed)
    sizes = range(1, min(2**30 // (vocabulary * 2), rows, chunk_plan.MAX_ROWS) + 1)
    times = [chunk_plan.modelled_seconds(chunk_plan.ChunkPlan(size, 0), *shape, speed) for size in sizes]
    assert chunk_plan.modelled_seconds(plan, *shape, speed) <= 1.02 * min(times)


@pytest.mark.parametrize("rows", [1, 63, 65, 1000, 5000, 8192])
def test_rows_that_fit_are_one_chunk(rows):
    """Not 4992 rows and a chunk of 8, which would read and write the weight's gradient once more."""
    assert chunk_plan.choose(rows, 5120, 152064, 152064 * 2, 2**33, "recompute", chunk_plan.GPU).chunk_rows == rows

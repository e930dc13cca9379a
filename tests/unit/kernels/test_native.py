"""The native CPU library against fp64, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oreal_kernels import KL_KINDS, native

NO_COMPILER = not (shutil.which("cmake") and shutil.which("c++"))
pytestmark = pytest.mark.skipif(
    NO_COMPILER and not native.available(), reason="the native library is not built, and no compiler is here"
)


@pytest.fixture(autouse=True, scope="module", params=["plain", "avx2", "avx512"])
def instruction_set(request):
    try:
        native.select(request.param)
    except ValueError as lacking:
        pytest.skip(str(lacking))
    yield request.param
    native.select()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact_z(logits, inverse_temperature, softcap, dtype=torch.float64):
    """z and dz/dlogit by the definition."""
    raw, scale = logits.to(dtype), inverse_temperature.to(dtype)[:, None]
    if not softcap:
        return raw * scale, scale.expand_as(raw)
    return softcap * torch.tanh(raw / softcap) * scale, scale * (1 - torch.tanh(raw / softcap) ** 2)


def by_definition(logits, label, inverse_temperature, softcap, columns, dtype=torch.float64):
    """[4, rows] as `row_statistics` gives them."""
    z, _ = exact_z(logits[:, :columns], inverse_temperature, softcap, dtype)
    maximum = z.amax(1)
    shifted = z - maximum[:, None]
    here = (label >= 0) & (label < columns)
    target = torch.where(here, z.gather(1, label.clamp(0, columns - 1)[:, None])[:, 0], 0)
    return torch.stack([maximum, shifted.exp().sum(1), (shifted.exp() * shifted).sum(1), target])


def gradient_by_definition(logits, label, it, softcap, columns, maximum, log_total, entropy, a, b, dtype=torch.float64):
    z, slope = exact_z(logits[:, :columns], it, softcap, dtype)
    x = z - maximum.to(dtype)[:, None] - log_total.to(dtype)[:, None]
    one_hot = torch.arange(columns) == label[:, None]
    a, b, entropy = (values.to(dtype)[:, None] for values in (a, b, entropy))
    result = torch.zeros(logits.shape, dtype=dtype)
    result[:, :columns] = (a * (one_hot * 1.0 - x.exp()) - b * x.exp() * (x + entropy)) * slope
    return result


def assert_as_good_as(ours, torchs, exact):
    """The greatest error is at most twice torch's in fp32, or a few roundings of the greatest value."""
    error, allowed = ((x.double() - exact).abs().amax().item() for x in (ours, torchs))
    assert error <= 2 * allowed + 2.0**-22 * exact.abs().amax().item(), f"error {error}, torch's is {allowed}"


def case(rows=7, width=1003, columns=None, dtype=torch.float32, scale=3.0, shift=0.0, temperature=1.0, seed=0):
    """Logits, labels (first and last column among them, and one elsewhere), inverse temperatures, valid columns."""
    generator = torch.Generator().manual_seed(seed)
    columns = width if columns is None else columns
    logits = (torch.randn(rows, width, generator=generator) * scale + shift).to(dtype)
    label = torch.randint(0, max(columns, 1), (rows,), generator=generator)
    label[:3] = torch.tensor([0, columns - 1, columns])[:rows]
    label[3:4] = -100
    return logits, label, torch.full((rows,), 1 / temperature), columns


def normaliser(statistics):
    """Maximum, log-sum-exp less the maximum, and entropy of [4, rows]."""
    maximum, total, first, _ = statistics
    return maximum, total.log(), total.log() - first / total


CASES = {
    "plain": dict(),
    "one column": dict(width=1),
    "below a vector": dict(width=3),
    "whole vectors": dict(width=256),
    "two blocks and a bit": dict(width=4097),
    "padding": dict(width=300, columns=257),
    "all far below zero": dict(shift=-1e4),
    "all far above zero": dict(shift=1e4),
    "peaked": dict(scale=40.0),
    "cold": dict(temperature=0.01),
    "hot": dict(temperature=10.0),
    "capped": dict(softcap=30.0),
    "capped hard": dict(softcap=0.5, temperature=0.1),
}
DTYPES = [torch.float32, torch.bfloat16]


def prepared(name, dtype):
    arguments = dict(CASES[name])
    return arguments.pop("softcap", 0.0), case(dtype=dtype, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_row_statistics(name, dtype):
    softcap, (logits, label, it, columns) = prepared(name, dtype)
    ours = native.row_statistics(logits, label, it, softcap, columns)
    exact = by_definition(logits, label, it, softcap, columns)
    torchs = by_definition(logits, label, it, softcap, columns, torch.float32)
    for index in range(4):
        assert_as_good_as(ours[index], torchs[index], exact[index])
    for mine, other, truth in zip(normaliser(ours), normaliser(torchs), normaliser(exact), strict=True):
        assert_as_good_as(mine, other, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_row_gradient_of_log_prob_and_entropy(name, dtype):
    softcap, (logits, label, it, columns) = prepared(name, dtype)
    normal = [x.float() for x in normaliser(by_definition(logits, label, it, softcap, columns))]
    a, b = torch.randn(2, len(label), generator=torch.Generator().manual_seed(1)).unbind()
    arguments = (label, it, softcap, columns, *normal, a, b)
    exact = gradient_by_definition(logits, *arguments)
    for out_dtype in DTYPES:
        torchs = gradient_by_definition(logits, *arguments, dtype=torch.float32).to(out_dtype)
        ours = native.row_gradient(logits, torch.full_like(logits, 7, dtype=out_dtype), *arguments)
        assert_as_good_as(ours, torchs, exact)
        assert not ours[:, columns:].any()
    in_place = native.row_gradient(logits, logits, *arguments)
    assert torch.equal(in_place, native.row_gradient(case_logits(name, dtype), torch.empty_like(logits), *arguments))


def case_logits(name, dtype):
    return prepared(name, dtype)[1][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_sums_to_zero_over_the_vocabulary(dtype):
    logits, label, it, columns = case(rows=5, width=3001, temperature=0.5)
    label[2:] = torch.tensor([17, 18, 3000])  # every label here, otherwise the log-prob's part does not
    logits = logits.to(dtype)
    normal = normaliser(native.row_statistics(logits, label, it, 0.0, columns))
    for a, b in ((1.0, 0.0), (0.0, 1.0), (-0.3, 0.7)):
        out = torch.empty(5, 3001)
        native.row_gradient(logits, out, label, it, 0.0, columns, *normal, torch.full((5,), a), torch.full((5,), b))
        assert out.double().sum(1).abs().max() < 2e-6 * out.double().abs().sum(1).max()


def exponential_of(x):
    """The library's own exp: the gradient of one row with lse = 0, a = -1, and the label elsewhere."""
    zero = torch.zeros(1)
    label = torch.tensor([-1])
    return native.row_gradient(
        x[None], torch.empty(1, len(x)), label, zero + 1, 0.0, len(x), zero, zero, zero, zero - 1, zero
    )[0]


def ulps(found, exact):
    return ((found.double() - exact).abs() / torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()).max()


def test_exponential_within_two_ulp():
    x = torch.linspace(-87.3, 87.3, 2_000_001)
    assert ulps(exponential_of(x), x.double().exp()) < 2
    assert exponential_of(torch.tensor([0.0, -0.0, -104.0, -200.0, -torch.inf])).tolist() == [1, 1, 0, 0, 0]


def test_tanh_within_a_few_ulp():
    x = torch.cat([torch.logspace(-20, 2, 100_001), -torch.logspace(-20, 2, 100_001)])
    z = native.row_statistics(x[:, None], torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x)), 1.0, 1)[3]
    assert ulps(z, x.double().tanh()) < 3


def test_the_slope_of_a_cap_keeps_its_digits_where_it_vanishes():
    raw = torch.linspace(-40, 40, 4001)
    zeros = torch.zeros(1)
    label = torch.tensor([-1])
    found = native.row_gradient(
        raw[None], torch.empty(1, 4001), label, zeros + 1, 1.0, 4001, zeros, zeros, zeros, zeros - 1, zeros
    )[0]
    exact = raw.double().tanh().exp() / raw.double().cosh() ** 2
    assert ((found.double() - exact).abs() / exact).max() < 2e-6


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-7), (torch.bfloat16, 2.0**-8)])
def test_a_label_that_is_nearly_certain_keeps_its_gradient(dtype, digits):
    logits, zeros, label = torch.tensor([[-1e-6, -20.0]]), torch.zeros(1), torch.tensor([0])
    out = torch.empty(1, 2, dtype=dtype)
    native.row_gradient(logits, out, label, zeros + 1, 0.0, 2, zeros, zeros, zeros, zeros + 1, zeros)
    exact = -torch.expm1(logits.double()[0, 0])
    assert abs(out[0, 0].double() / exact - 1) < digits, "1 - exp(-1e-6) by subtraction is wrong by 5 %"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_any_probability(dtype):
    logits = torch.full((3, 37), -torch.inf, dtype=dtype)
    logits[1, 5] = 2.0
    label, ones, zeros = torch.tensor([0, 5, 0]), torch.ones(3), torch.zeros(3)
    found = native.row_statistics(logits, label, ones, 0.0, 37)
    assert found[:3].T.tolist() == [[-torch.inf, 0, 0], [2, 1, 0], [-torch.inf, 0, 0]]
    out = native.row_gradient(
        logits, torch.ones_like(logits), label, ones, 0.0, 37, found[0], found[1].log(), zeros, ones, ones
    )
    assert not out.any()
    none = native.row_statistics(logits, label, ones, 0.0, 0)
    assert none.T.tolist() == [[-torch.inf, 0, 0, 0]] * 3


def test_no_rows():
    empty = torch.empty(0)
    assert native.row_statistics(torch.empty(0, 5), empty.long(), empty, 0.0, 5).shape == (4, 0)
    out = native.row_gradient(torch.empty(0, 5), torch.empty(0, 5), empty.long(), empty, 0.0, 5, *[empty] * 5)
    assert out.shape == (0, 5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_a_logit_that_is_not_a_number_is_not_hidden(bad, softcap):
    logits, label, it, columns = case(rows=2, width=50)
    logits[0, 31] = bad
    if bad == torch.inf and softcap:
        return  # the cap makes it finite, as it should
    statistics = native.row_statistics(logits, label, it, softcap, columns)
    assert statistics[1].isnan().tolist() == [True, False]
    zeros = torch.zeros(2)
    highest = torch.tensor([torch.nan, 3.0])
    out = torch.empty_like(logits, dtype=torch.bfloat16)
    native.row_gradient(logits, out, label, it, softcap, columns, highest, zeros, zeros, zeros + 1, zeros)
    assert out[0].isnan().all() and not out[1].isnan().any()


def test_a_nan_whose_bits_would_round_to_zero():
    nan = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    zero, label = torch.zeros(1), torch.tensor([-1])
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    assert native.row_gradient(nan, out, label, zero + 1, 0.0, 1, zero, zero, zero, zero + 1, zero).isnan()


def test_rows_without_coefficients_are_zero_whatever_they_hold():
    logits, label, it, columns = case(rows=3, width=50)
    logits[1] = torch.nan
    ones, a = torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    out = native.row_gradient(logits, torch.ones_like(logits), label, it, 0.0, columns, ones, ones, ones, a, ones * 0)
    assert not out[1].any() and out[0].all() and out[2].all()


def test_bf16_is_rounded_to_nearest_even():
    x = torch.cat([torch.linspace(-60, 0, 30_001), torch.tensor([-torch.inf])])
    zero = torch.zeros(1)
    arguments = (torch.tensor([-1]), zero + 1, 0.0, len(x), zero, zero, zero, zero - 1, zero)
    rounded = native.row_gradient(x[None], torch.empty(1, len(x), dtype=torch.bfloat16), *arguments)
    assert torch.equal(rounded[0], exponential_of(x).bfloat16())
    halfway = torch.arange(1 << 12).float() * 2.0**-8 + 2.0**-9 + 1  # between two bf16 numbers; a = -v and p = 1
    rows = len(halfway)
    columns = torch.zeros(rows, 1)
    label, zeros = torch.full((rows,), -1), torch.zeros(rows)
    out = torch.empty(rows, 1, dtype=torch.bfloat16)
    native.row_gradient(columns, out, label, zeros + 1, 0.0, 1, zeros, zeros, zeros, -halfway, zeros)
    assert torch.equal(out[:, 0], halfway.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_rows(dtype):
    wide = case(rows=6, width=700, dtype=dtype)[0]
    logits, label, it, columns = wide[::2, 33:333], torch.tensor([0, 299, 5]), torch.ones(3), 290
    dense = logits.contiguous()
    statistics = native.row_statistics(logits, label, it, 0.0, columns)
    assert torch.equal(statistics, native.row_statistics(dense, label, it, 0.0, columns))
    normal = normaliser(statistics)
    arguments = (label, it, 0.0, columns, *normal, it, it)
    expected = native.row_gradient(dense, torch.empty_like(dense), *arguments)
    untouched = wide.clone()
    native.row_gradient(logits, logits, *arguments)
    assert torch.equal(logits, expected)
    untouched[::2, 33:333] = expected
    assert torch.equal(wide, untouched), "the gradient of a view writes into the view only"


def all_results(seed):
    """Bits of every pass on inputs large enough for several threads."""
    logits, label, it, columns = case(rows=40, width=3001, seed=seed, dtype=torch.bfloat16)
    statistics = native.row_statistics(logits, label, it, 0.0, columns)
    normal = normaliser(statistics)
    gradient = native.row_gradient(logits, torch.empty_like(logits), label, it, 0.0, columns, *normal, it, it)
    tokens, reference, weight, cu_seqlens, reward, advantage = packed([170_000, 0, 3, 180_000], seed)
    weights = native.token_weights(tokens, cu_seqlens, reward > 0, (0.5, 0.5), True)
    terms = policy(tokens, reference, weight, cu_seqlens, reward, advantage)
    main_grad = torch.zeros(3001, 70)
    native.add_weight_gradient(gradient, logits[:, :70], main_grad)
    return [statistics, gradient, *weights, *terms, main_grad]


def test_the_same_bits_for_any_number_of_threads_and_in_every_run(threads):
    threads(1)
    alone = all_results(3)
    for count in (1, 2, 3):
        threads(count)
        for mine, other in zip(alone, all_results(3), strict=True):
            assert (
                mine.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
                if (mine.dtype != torch.bfloat16)
                else torch.equal(mine, other)
            )


def packed(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total, count = sum(lengths), len(lengths)
    tokens, reference = torch.randn(2, total, generator=generator).unbind()
    weight = torch.rand(total, generator=generator)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    reward = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    return tokens, reference, weight, cu_seqlens, reward, torch.randn(count, generator=generator)


def policy(*tensors, positives=True, correct=0.5, incorrect=0.25, kl=0.1, kind="k3"):
    return native.policy_terms(
        *tensors,
        advantage_on_positives=positives,
        correct_scale=correct,
        incorrect_scale=incorrect,
        kl_scale=kl,
        kl_kind=KL_KINDS.get(kind, 0),
    )


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=40)
@given(LENGTHS, st.permutations([0.0, 0.3, 0.5]), st.sampled_from(DTYPES), st.integers(0, 100), st.booleans())
def test_token_weights(lengths, thresholds, dtype, seed, prefix_mean):
    scores, _, _, cu_seqlens, reward, _ = packed(lengths, seed)
    scores = (scores * 3).to(dtype)
    weights, means = native.token_weights(scores, cu_seqlens, reward > 0, tuple(thresholds[:2]), prefix_mean)
    for index, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        sequence = scores[begin:end].double()
        value = sequence.cumsum(0) / torch.arange(1, end - begin + 1) if prefix_mean else sequence
        belief = torch.sigmoid(value if reward[index] > 0 else -value)
        threshold = thresholds[0 if reward[index] > 0 else 1]
        expected = ((belief - threshold) / (1 - threshold)).clamp(0, 1)
        torch.testing.assert_close(weights[begin:end].double(), expected, atol=5e-7, rtol=1e-6)
        torch.testing.assert_close(means[index].double(), sequence.mean() if end > begin else 0 * means[index].double())


def test_a_long_running_mean_does_not_drift():
    scores = torch.full((200_000,), 1.1, dtype=torch.bfloat16)
    _, means = native.token_weights(scores, torch.tensor([0, 200_000]), torch.tensor([True]), (0.5, 0.5), True)
    assert means.item() == scores[0].item(), "fp32 sums would drift by 1e-4, bf16 sums stop at 512"


def test_scores_beyond_every_exponent():
    scores = torch.tensor([1000.0, -1000.0, -torch.inf, torch.nan])
    cu_seqlens = torch.arange(5)
    correct, _ = native.token_weights(scores, cu_seqlens, torch.ones(4, dtype=torch.bool), (0.0, 0.0), True)
    incorrect, _ = native.token_weights(scores, cu_seqlens, torch.zeros(4, dtype=torch.bool), (0.0, 0.0), True)
    assert correct[:3].tolist() == pytest.approx([1, 0, 0], abs=1e-37) and correct[3].isnan()
    assert incorrect[:3].tolist() == pytest.approx([0, 1, 1], abs=1e-37) and incorrect[3].isnan()


SLOPES = {
    "k1": lambda d: 1 + 0 * d,
    "k1_reversed": lambda d: -1 + 0 * d,
    "k2": lambda d: -d,
    "k3": lambda d: -torch.expm1(d),
}


def policy_by_definition(logp, reference, weight, cu_seqlens, reward, advantage, positives, right, wrong, kl, kind):
    grads, sums = [], torch.zeros(8, dtype=torch.float64)
    for index, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        ours, other, w = (x[begin:end].double() for x in (logp, reference, weight))
        d = (other - ours).clamp(-60, 60)
        is_right, factor = reward[index] > 0, advantage[index].double()
        if is_right and not positives:
            factor = torch.ones_like(factor)
        grads.append(-(right if is_right else wrong) * factor * w + kl * SLOPES[kind](d))
        sums[0 if is_right else 1] += (factor * w * (ours if is_right else 1)).sum()
        sums[2:6] += torch.stack([-d.sum(), (d * d / 2).sum(), (torch.expm1(d) - d).sum(), ours.sum()])
        sums[6 if is_right else 7] += w.sum()
    return torch.cat(grads), sums


@settings(max_examples=60)
@given(LENGTHS, st.booleans(), st.sampled_from(list(SLOPES)), st.sampled_from([1e-3, 1.0, 30.0]), st.integers(0, 100))
def test_policy_terms(lengths, positives, kind, spread, seed):
    logp, reference, *others = packed(lengths, seed)
    tensors = (logp - 2, logp - 2 + reference * spread, *others)
    grad, sums = policy(*tensors, positives=positives, kind=kind)
    exact_grad, exact_sums = policy_by_definition(*tensors, positives, 0.5, 0.25, 0.1, kind)
    scale = exact_grad.abs().clamp(min=0.2)
    assert not len(grad) or ((grad.double() - exact_grad).abs() / scale).max() < 5e-6 * max(spread, 1)
    torch.testing.assert_close(sums, exact_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", [50.0, 1000.0])
@pytest.mark.parametrize("kind", SLOPES)
def test_policies_far_apart_stay_finite(distance, kind):
    logp, one = torch.tensor([-distance, 0.0]), torch.ones(2)
    tensors = (logp, logp.flip(0), one, torch.arange(3), one, one)
    grad, sums = policy(*tensors, kind=kind)
    exact_grad, exact_sums = policy_by_definition(*tensors, True, 0.5, 0.25, 0.1, kind)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-6, atol=0)
    torch.testing.assert_close(sums, exact_sums, rtol=2e-6, atol=1e-9)


def test_policies_close_together_keep_the_digits_of_k3():
    d = torch.cat([torch.logspace(-12, 0, 5001), -torch.logspace(-12, 0, 5001)])
    zero, one = torch.zeros_like(d), torch.ones(1)
    tensors = (zero, d, zero, torch.tensor([0, len(d)]), one, one)
    grad, _ = policy(*tensors, kl=1.0)
    assert ulps(grad, -torch.expm1(d.double())) < 3
    for value in (1e-6, -1e-3, 0.1, 0.999, 1.001, -5.0):
        tensors = (zero[:1], zero[:1] + value, zero[:1], torch.tensor([0, 1]), one, one)
        _, sums = policy(*tensors)
        exact = np.expm1(np.float64(np.float32(value))) - np.float64(np.float32(value))
        if abs(value) < 1e-4:  # fp64 itself has no digits left here
            exact = np.float64(np.float32(value)) ** 2 / 2
        assert sums[4].item() == pytest.approx(exact, rel=2e-6)


@settings(max_examples=20)
@given(st.permutations(range(5)), st.booleans())
def test_the_order_of_sequences_does_not_matter(order, prefix_mean):
    lengths = [5, 0, 17, 33, 1]
    tokens, reference, weight, cu_seqlens, reward, advantage = packed(lengths)
    pieces = [slice(begin, end) for begin, end in itertools.pairwise(cu_seqlens.tolist())]
    moved = torch.cat([torch.arange(60)[:56][pieces[index]] for index in order])
    borders = torch.tensor([0, *itertools.accumulate(lengths[index] for index in order)])
    weights, means = native.token_weights(tokens, cu_seqlens, reward > 0, (0.4, 0.2), prefix_mean)
    index = torch.tensor(order)
    other_weights, other_means = native.token_weights(
        tokens[moved], borders, reward[index] > 0, (0.4, 0.2), prefix_mean
    )
    assert torch.equal(weights[moved], other_weights) and torch.equal(means[index], other_means)
    grad, sums = policy(tokens, reference, weight, cu_seqlens, reward, advantage)
    other_grad, other_sums = policy(
        tokens[moved], reference[moved], weight[moved], borders, reward[index], advantage[index]
    )
    assert torch.equal(grad[moved], other_grad)
    torch.testing.assert_close(sums, other_sums, rtol=1e-12, atol=1e-12)


def test_sequences_longer_than_a_block_of_sums():
    tensors = packed([10_000, 0, 4096, 1, 9000])
    grad, sums = policy(*tensors)
    exact_grad, exact_sums = policy_by_definition(*tensors, True, 0.5, 0.25, 0.1, "k3")
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums, exact_sums, rtol=1e-6, atol=1e-6)


def product_case(rows, columns, width, seed=0):
    """Views into larger storages, and the storage of main_grad, to see what is written beside the view."""
    generator = torch.Generator().manual_seed(seed)
    dlogits = torch.randn(rows, columns + 3, generator=generator).bfloat16()[:, 2 : columns + 2]
    hidden = torch.randn(rows, width + 5, generator=generator).bfloat16()[:, 1 : width + 1]
    storage = torch.randn(columns + 6, width + 70, generator=generator)
    return dlogits, hidden, storage, storage[:columns, 4 : width + 4]


def check_weight_gradient(rows, columns, width):
    dlogits, hidden, storage, main_grad = product_case(rows, columns, width)
    before = storage.clone()
    done = native.add_weight_gradient(dlogits, hidden, main_grad)
    assert done == ("avx512_bf16" in native.features())
    old = before[:columns, 4 : width + 4].clone()
    before[:columns, 4 : width + 4] = main_grad
    assert torch.equal(storage, before), "something beside the view is written"
    if done:
        exact = old.double() + dlogits.double().T @ hidden.double()
        assert_as_good_as(main_grad, old + dlogits.float().T @ hidden.float(), exact)
    else:
        assert torch.equal(main_grad, old)


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(1, 200))
def test_add_weight_gradient(rows, columns, width):
    check_weight_gradient(rows, columns, width)


@pytest.mark.parametrize("shape", [(0, 5, 5), (5, 0, 5), (1, 1, 1), (2, 6, 64), (1024, 193, 65), (2051, 50, 130)])
def test_add_weight_gradient_at_the_borders_of_its_blocks(shape):
    rows, columns, width = shape
    if 0 in shape:
        main_grad = torch.ones(columns, width)
        native.add_weight_gradient(*(torch.ones(rows, n, dtype=torch.bfloat16) for n in (columns, width)), main_grad)
        assert (main_grad == 1).all()
    else:
        check_weight_gradient(rows, columns, width)


def test_small_products_are_not_lost_in_a_large_sum(instruction_set):
    """1000 x (1/256): a bf16 sum, which torch.mm gives, stops at 256 / 256."""
    ones = torch.ones(1000, 8, dtype=torch.bfloat16)
    main_grad = torch.full((8, 8), 3.0)
    if native.add_weight_gradient(ones / 256, ones, main_grad):
        assert (main_grad == 3 + 1000 / 256).all()
    else:
        assert "avx512_bf16" not in native.features()


INVALID = {
    "double logits": (lambda: native.row_statistics(torch.zeros(2, 3).double(), *SMALL, 0.0, 3), TypeError, "float64"),
    "a vector": (lambda: native.row_statistics(torch.zeros(3), *SMALL, 0.0, 3), ValueError, "a matrix"),
    "transposed": (lambda: native.row_statistics(torch.zeros(3, 2).T, *SMALL, 0.0, 3), ValueError, "contiguous"),
    "too few labels": (
        lambda: native.row_statistics(torch.zeros(3, 3), *SMALL, 0.0, 3), ValueError, r"label_column has shape \[2\]",
    ),
    "columns": (lambda: native.row_statistics(torch.zeros(2, 3), *SMALL, 0.0, 4), ValueError, "columns is 4"),
    "meta": (lambda: native.row_statistics(torch.zeros(2, 3, device="meta"), *SMALL, 0.0, 3), ValueError, "CPU only"),
    "offsets": (
        lambda: native.token_weights(torch.zeros(4), torch.tensor([0, 3, 2, 4]), torch.ones(3) > 0, (0.5, 0.5), True),
        ValueError, "offsets that rise from 0 to the 4 tokens",
    ),
    "no offsets": (
        lambda: native.token_weights(torch.zeros(0), torch.tensor([]).long(), torch.ones(0) > 0, (0.5, 0.5), True),
        ValueError, "offsets that rise",
    ),
    "threshold": (
        lambda: native.token_weights(torch.zeros(1), torch.tensor([0, 1]), torch.ones(1) > 0, (0.5, 1.0), True),
        ValueError, "below 1",
    ),
    "kl_kind": (lambda: policy(*packed([2]), kind="k4"), ValueError, "expected 1, -1, 2 or 3"),
    "overlapping rows": (
        lambda: native.add_weight_gradient(
            torch.ones(1, 2).bfloat16(), torch.ones(1, 3).bfloat16(), torch.zeros(1, 3).expand(2, 3)
        ),
        ValueError, "overlap",
    ),
    "instruction set": (lambda: native.select("avx1024"), ValueError, "not supported by this machine"),
}  # fmt: skip
SMALL = (torch.zeros(2, dtype=torch.int64), torch.ones(2))


@pytest.mark.parametrize("name", INVALID)
def test_invalid_input_is_rejected_with_a_message(name):
    call, error, sentence = INVALID[name]
    with pytest.raises(error, match=sentence):
        call()

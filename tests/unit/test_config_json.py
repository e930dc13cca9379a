"""Fields of config.json: whatever a file holds, it is read rightly or refused by name, never half understood."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oreal_megatron.config import ConfigError
from oreal_megatron.models import architecture, config_fields, rope

ROWS = json.loads((Path(__file__).parent.parent / "families.json").read_text())
FIELDS = sorted({*config_fields.READ, *config_fields.HARMLESS, *config_fields.NEUTRAL, *config_fields.SWITCHES,
                 *config_fields.POSITIVE_INTEGERS, *config_fields.POSITIVE_NUMBERS})  # fmt: skip
PARAMETERS = ["rope_type", "type", "rope_theta", *(name for names in rope.FIELDS.values() for name in names)]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.sampled_from(["", "1e-6", "abc", "linear", "full_attention"]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(
        st.sampled_from([*PARAMETERS, "other"]), st.one_of(scalars, st.lists(scalars, max_size=1)), max_size=4
    ),
)


@settings(max_examples=300)
@given(family=st.sampled_from(sorted(ROWS)), field=st.sampled_from(FIELDS), value=values)
@example(family="InternLM2", field="rope_scaling", value={"rope_type": []})
def test_any_value_of_any_field_is_read_or_refused_in_a_sentence(family, field, value):
    hf = ROWS[family] | {field: value}
    try:
        arch = architecture.read(hf)
        architecture.head(hf)
    except ConfigError as refusal:
        assert "config.json" in str(refusal) or "supported" in str(refusal)
        return
    assert type(arch.head_dim) is type(arch.heads) is type(arch.layers) is int and arch.head_dim % 2 == 0
    assert math.isfinite(arch.rope.theta) and arch.rope.theta > 0 and 0 < arch.norm_epsilon < math.inf
    assert arch.rope.frequencies(arch.head_dim).isfinite().all()


@pytest.mark.parametrize("family", ROWS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", "abc"), ("rope_theta", -1), ("rope_theta", [1e4]), ("rope_theta", True),
        ("rope_theta", math.inf),
        ("rope_scaling", [1, 2]), ("rope_parameters", []), ("rope_scaling", False),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}), ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", 0), ("head_dim", 33), ("head_dim", 0), ("tie_word_embeddings", "false"), ("vocab_size", True),
        ("num_key_value_heads", 3), ("layer_types", "full_attention"), ("rope_parameters", {"rope_theta": [1e4]}),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(family, field, value):
    row = {key: old for key, old in ROWS[family].items() if not key.startswith("rope_")}
    with pytest.raises(ConfigError, match=f"{field}|factor|key-value heads"):
        architecture.read(row | {field: value})


forms = st.sampled_from(
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0},
     {"rope_type": "dynamic", "factor": 2.0}]
)  # fmt: skip


@settings(max_examples=150)
@given(new=st.none() | forms, old=st.none() | forms, thetas=st.tuples(*[st.sampled_from([None, 1e4, 5e5])] * 3))
def test_two_spellings_of_one_rope_agree_or_are_refused(new, old, thetas):
    def with_theta(form, theta):
        return form if form is None or theta is None else form | {"rope_theta": theta}

    hf = ROWS["Llama"] | {"rope_theta": thetas[0], "rope_parameters": with_theta(new, thetas[1]),
                          "rope_scaling": with_theta(old, thetas[2])}  # fmt: skip
    given_thetas = {theta for theta, form in zip(thetas, ({}, new, old), strict=True) if theta and form is not None}
    kinds = [form for form in (new, old) if form]
    if len(given_thetas) > 1 or (len(kinds) == 2 and kinds[0] != kinds[1]):
        with pytest.raises(ConfigError, match="config.json has rope_.* and rope_.*, which disagree"):
            architecture.read(hf)
        return
    got, kind = architecture.read(hf).rope, kinds[0] if kinds else {"rope_type": "default"}
    assert (got.theta, got.kind) == (next(iter(given_thetas), 1e4), kind["rope_type"])
    assert got.factor == kind.get("factor", 1.0)


def test_two_names_of_one_kind_must_agree():
    with pytest.raises(ConfigError, match="type 'linear' and rope_type 'dynamic'"):
        rope.read({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}})
    assert rope.read({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}).factor == 2.0


@pytest.mark.parametrize("head", architecture.HEADS)
@pytest.mark.parametrize("family", ROWS)
def test_a_model_type_of_another_family_is_refused_and_a_missing_one_is_not(family, head):
    """transformers goes by the one and vLLM by the other."""
    hf = ROWS[family] | {"architectures": [family + head]}
    for other in {row["model_type"] for row in ROWS.values()} - {hf["model_type"]} | {"", "gpt2"}:
        for function in (architecture.read, architecture.head):
            with pytest.raises(ConfigError, match=f"model_type '{other}', .*expected model_type '{hf['model_type']}'"):
                function(hf | {"model_type": other})
    without = {key: value for key, value in hf.items() if key != "model_type"} | {"num_labels": 1}
    assert architecture.read(without).family == family


@pytest.mark.parametrize("value", [0, -1, -2, -100])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_layout_below_one_is_refused(position, value):
    layout = [1, 1, 1]
    layout[position] = value
    with pytest.raises(
        ConfigError, match=rf"parallel.{['tensor', 'pipeline', 'virtual'][position]} .* is {value}; expected"
    ):
        architecture.read(ROWS["Qwen2"]).check_layout(*layout)

"""The streaming converter on small models of every family: exact round trips, and inputs that must be rejected."""

from __future__ import annotations

import itertools
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from oreal_megatron.cli.main import main
from oreal_megatron.config import ConfigError, ParallelConfig
from oreal_megatron.convert import compare_checkpoints, stream, to_hf, to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.models import architecture, tensors

ROWS = json.loads((Path(__file__).parent.parent / "families.json").read_text())


def quiet(*arguments) -> None: ...


def make(folder: Path, family: str = "Qwen2", head: str = "lm", dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """A folder whose tensors hold different finite bit patterns in every 60,000 consecutive elements."""
    hf = architecture.with_head(ROWS[family] | {"tie_word_embeddings": False} | changes, head)
    arch, weights, first = architecture.read(hf), {}, 0
    for entry in tensors.entries(arch, 1, 1, 0, head):
        for name, shape in tensors.hf_shapes(entry, arch).items():
            count = torch.Size(shape).numel()
            patterns = (torch.arange(first, first + count) * 7919 % 60_000 - 30_000).to(torch.int16)
            weights[name] = (patterns & ~0x4000).view(torch.bfloat16).to(dtype).view(shape)  # exponents stay small
            first += count
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "tokenizer_config.json").write_text("{}")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def forth(source: Path, out: Path, *layout: int, dtype: torch.dtype | None = None) -> Path:
    folder = HFFolder(source, tokenizer=False)
    to_megatron.convert(folder, out, ParallelConfig(*layout), stream.Cast(dtype), quiet, quiet)
    return out


def back(source: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    to_hf.convert(MegatronFolder(source), out, stream.Cast(dtype), quiet, quiet)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by safetensors' own reader."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == value.dtype and torch.equal(a[name], value)
                                        for name, value in b.items())  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ROWS)
def test_there_and_back_is_exact_for_every_family_and_layout(family, tied, tmp_path, monkeypatch, full):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 5000)  # several blocks of vocabulary
    source = make(tmp_path / "hf", family, tie_word_embeddings=tied)
    wanted = weights(source)
    every = [cut for cut in itertools.product((1, 2, 4), (1, 2), (1, 2)) if cut[1:] != (1, 2)]
    layouts = every if full else [(4, 1, 1), (2, 2, 2)]
    for number, layout in enumerate(layouts):
        megatron = forth(source, tmp_path / f"megatron{number}", *layout)
        assert len(list(megatron.glob("*.distcp"))) == layout[0] * layout[1]
        assert (
            compare_checkpoints.first_difference(
                compare_checkpoints.open_folder(source), compare_checkpoints.open_folder(megatron)
            )
            is None
        )
        out = back(megatron, tmp_path / f"back{number}")
        assert same(weights(out), wanted)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 3}'


@pytest.mark.parametrize("family", [family for family in ROWS if not family.startswith("InternLM")])
def test_a_reward_model_comes_back_as_a_token_classifier_of_transformers(family, tmp_path):
    source = make(tmp_path / "hf", family, head="scalar", dtype=torch.float32)
    out = back(forth(source, tmp_path / "megatron", 2, 2), tmp_path / "back")
    assert same(weights(out), weights(source) | {"score.bias": torch.zeros(1)})
    model, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and model.config.num_labels == 1 and model.dropout.p == 0
    assert torch.equal(model.score.weight, weights(source)["score.weight"])
    assert same(weights(back(forth(out, tmp_path / "again"), tmp_path / "again_back")), weights(out))


MIXTURES = [family for family, row in ROWS.items() if "num_experts_per_tok" in row]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_that_transformers_saved_comes_back_and_loads(family, tmp_path, capsys):
    """transformers 5 holds all experts of a layer in one tensor; its files, as those of the hub, have one for each."""
    source, megatron, out = (tmp_path / name for name in ("hf", "megatron", "back"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ROWS[family])).eval()
    model.save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    assert main(["convert", "to-megatron", str(source), str(megatron), "--tp", "2", "--pp", "2"]) == 0
    assert main(["convert", "check", str(source), str(megatron)]) == 0
    assert main(["convert", "to-hf", str(megatron), str(out)]) == 0
    assert same(weights(out), weights(source))
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.arange(50)[None]
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("family", "down"), [("Qwen3Moe", "mlp.experts.{}.down_proj"), ("Mixtral", "block_sparse_moe.experts.{}.w2")]
)
def test_check_names_the_expert_that_differs(family, down, tmp_path):
    source = make(tmp_path / "hf", family)
    one, other = (f"model.layers.1.{down.format(number)}.weight" for number in (1, 2))
    swapped = rewritten(source, tmp_path / "other", swap(one, other))
    megatron = MegatronFolder(forth(source, tmp_path / "megatron", 1, 2))
    assert compare_checkpoints.first_difference(megatron, HFFolder(swapped)).startswith(f"{one} differs")


def test_experts_in_one_tensor_are_refused(tmp_path):
    source = make(tmp_path / "hf", "Qwen3Moe")

    def fuse(w: dict) -> None:
        names = [name for name in w if "layers.0.mlp.experts" in name and "down_proj" in name]
        w["model.layers.0.mlp.experts.down_proj"] = torch.stack([w.pop(name) for name in names])

    fused = rewritten(source, tmp_path / "fused", fuse)
    with pytest.raises(ConfigError, match="has no tensor model.layers.0.mlp.experts.0.down_proj.weight"):
        forth(fused, tmp_path / "out")


def test_large_models_come_in_several_files_with_an_index(tmp_path, monkeypatch):
    from oreal_megatron.convert import hf_folder

    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 100_000)
    source = make(tmp_path / "hf")
    out = back(forth(source, tmp_path / "megatron"), tmp_path / "back")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 110_000 for file in files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights(source).values())
    assert {name: out / file for name, file in index["weight_map"].items()} == {
        name: file for file in files for name in load_file(file)
    }
    assert same(weights(out), weights(source))
    assert compare_checkpoints.first_difference(HFFolder(source), HFFolder(out)) is None
    files[1].unlink()
    with pytest.raises(ConfigError, match=r"lacks the shard model-00002-of-.*which its model.safetensors.index.json"):
        HFFolder(out)


def test_a_cast_is_explicit_and_says_what_it_changed(tmp_path, capsys):
    source = make(tmp_path / "hf", dtype=torch.float32)
    changed = load_file(source / "model.safetensors")
    changed["model.norm.weight"][5] = 1 + 2**-20  # bfloat16 cannot hold it
    save_file(changed, source / "model.safetensors", {"format": "pt"})
    command = ["convert", "to-megatron", str(source)]
    assert main([*command, str(tmp_path / "kept")]) == 0
    assert "cast" not in capsys.readouterr().err
    assert main([*command, str(tmp_path / "cast"), "--dtype", "bfloat16"]) == 0
    assert "values to bfloat16, lossy: 1 changed" in capsys.readouterr().err
    out = back(tmp_path / "cast", tmp_path / "back")
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = back(tmp_path / "cast", tmp_path / "wide", dtype=torch.float32)
    assert same({name: value.float() for name, value in weights(out).items()}, weights(wide))


def rewritten(source: Path, out: Path, change) -> Path:
    """A copy of a folder with changed weights."""
    out.mkdir()
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    changed = weights(source)
    change(changed)
    save_file({name: value.contiguous() for name, value in changed.items()}, out / "model.safetensors")
    return out


def swap(one: str, other: str):
    def change(w: dict) -> None:
        w[one], w[other] = w[other], w[one]

    return change


def shift_vocabulary(w: dict) -> None:
    w["lm_head.weight"] = w["lm_head.weight"].roll(1, 0)


def widen(w: dict) -> None:
    w["model.norm.weight"] = w["model.norm.weight"].float()


def one_bit(w: dict) -> None:
    w["model.layers.3.mlp.down_proj.weight"].view(torch.int16)[7, 9] ^= 1


LAYER = "model.layers.2."
DIFFERENT = {
    "gate and up": (swap(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"), "gate_proj.weight differs"),
    "key and value": (swap(LAYER + "self_attn.k_proj.bias", LAYER + "self_attn.v_proj.bias"), "k_proj.bias differs"),
    "shifted vocabulary": (shift_vocabulary, "lm_head.weight differs"),
    "dtype": (widen, "model.norm.weight differs: it is bfloat16 and float32"),
    "one bit": (one_bit, "model.layers.3.mlp.down_proj.weight differs: 1 of 6,144 values, the first at [7, 9]"),
}


@pytest.mark.parametrize("fault", DIFFERENT)
def test_check_names_the_first_difference(fault, tmp_path, capsys):
    change, sentence = DIFFERENT[fault]
    source = make(tmp_path / "hf")
    other = rewritten(source, tmp_path / "other", change)
    megatron = forth(source, tmp_path / "megatron", 2, 2, 2)
    for a, b in ((source, other), (megatron, other)):
        assert main(["convert", "check", str(a), str(b)]) == 1
        assert sentence in capsys.readouterr().out
    assert main(["convert", "check", str(source), str(megatron)]) == 0
    assert "equal" in capsys.readouterr().out


def test_check_tells_models_apart(tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", rope_theta=10000.0)
    assert main(["convert", "check", str(a), str(b)]) == 1
    assert "rope is Rope(theta=1000000.0" in capsys.readouterr().out


def lose(name: str):
    return lambda w: w.pop(name)


def add(name: str, value: torch.Tensor):
    return lambda w: w.update({name: value})


UNSOUND = {
    "missing tensor": (lose("model.layers.1.mlp.up_proj.weight"), "has no tensor model.layers.1.mlp.up_proj.weight"),
    "unknown tensor": (
        add("model.layers.0.self_attn.q_norm.weight", torch.ones(16)),
        "which a Qwen2 model does not have",
    ),
    "wrong shape": (
        add("model.norm.weight", torch.ones(63)),
        r"model.norm.weight has shape \(63,\), expected .* from config.json",
    ),
    "integers": (add("model.norm.weight", torch.ones(64, dtype=torch.int32)), "model.norm.weight in .* is I32"),
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_weights_that_do_not_fit_the_config_are_refused(fault, tmp_path):
    change, sentence = UNSOUND[fault]
    broken = rewritten(make(tmp_path / "hf"), tmp_path / "broken", change)
    with pytest.raises(ConfigError, match=sentence):
        forth(broken, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("value", "refused"), [(0.0, False), (0.5, True)])
def test_a_bias_of_the_reward_head_must_be_zero(value, refused, tmp_path):
    source = make(tmp_path / "hf", head="scalar", dtype=torch.float32)
    biased = rewritten(source, tmp_path / "biased", add("score.bias", torch.full((1,), value)))
    if refused:
        with pytest.raises(ConfigError, match="score.bias is not zero"):
            forth(biased, tmp_path / "out")
    else:
        forth(biased, tmp_path / "out")


@pytest.mark.parametrize(("shift", "refused"), [(0, False), (1, True)])
def test_an_output_layer_beside_tied_embeddings_must_be_their_copy(shift, refused, tmp_path):
    source = make(tmp_path / "hf", tie_word_embeddings=True)
    embedding = weights(source)["model.embed_tokens.weight"]
    both = rewritten(source, tmp_path / "both", add("lm_head.weight", embedding.roll(shift, 0)))
    if refused:
        with pytest.raises(ConfigError, match="tie_word_embeddings is true, but lm_head.weight differs"):
            forth(both, tmp_path / "out")
    else:
        assert same(weights(back(forth(both, tmp_path / "out"), tmp_path / "back")), weights(source))


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_a_truncated_safetensors_file_is_refused(keep, tmp_path):
    source = make(tmp_path / "hf")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="damaged or incomplete"):
        forth(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [100, -1000, None])
def test_a_truncated_or_missing_file_of_a_checkpoint_is_refused(keep, tmp_path):
    megatron = forth(make(tmp_path / "hf"), tmp_path / "megatron", 2)
    file = megatron / "__1_0.distcp"
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="__1_0.distcp (is missing|has .* bytes); the checkpoint needs"):
        back(megatron, tmp_path / "out")


def test_overwritten_bytes_of_a_checkpoint_are_refused_or_show(tmp_path):
    source = make(tmp_path / "hf")
    megatron = forth(source, tmp_path / "megatron")
    file = megatron / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(bytes(2000) + whole[2000:])  # the first archive's directory is at its end, its data here
    try:
        assert compare_checkpoints.first_difference(HFFolder(source), MegatronFolder(megatron)) is not None
    except ConfigError as error:
        assert "is damaged in the bytes of" in str(error)


class _Evil:
    def __reduce__(self):
        return (print, ("run by the unpickler",))


def test_metadata_that_would_run_code_is_refused(tmp_path, capsys):
    megatron = forth(make(tmp_path / "hf"), tmp_path / "megatron")
    (megatron / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ConfigError, match="builtins.print, which no checkpoint needs"):
        MegatronFolder(megatron)
    assert "run by" not in capsys.readouterr().out


def test_an_existing_output_is_never_overwritten_and_a_leftover_is_started_over(tmp_path, capsys):
    source, out = make(tmp_path / "hf"), tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    for name in ("junk", stream.UNFINISHED):
        (tmp_path / "out.partial" / name).touch()
    assert main(["convert", "to-megatron", str(source), str(out)]) == 0
    assert "out.partial remains of a conversion that did not finish; it is deleted" in capsys.readouterr().err
    assert not (out / "junk").exists() and not (tmp_path / "out.partial").exists()
    assert main(["convert", "to-megatron", str(source), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
    assert stream.UNFINISHED not in {path.name for path in out.rglob("*")}


@pytest.mark.parametrize("kind", ["the source", "a folder", "a file"])
def test_what_has_the_name_of_an_unfinished_output_is_not_deleted(kind, tmp_path, capsys):
    source = make(tmp_path / ("out.partial" if kind == "the source" else "hf"))
    if kind == "a folder":
        (tmp_path / "out.partial").mkdir()
    elif kind == "a file":
        (tmp_path / "out.partial").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", "to-megatron", str(source), str(tmp_path / "out")]) == 2
    assert "out.partial, under whose name out is written first, is something else; move it" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_made_is_refused(tmp_path, capsys):
    source = make(tmp_path / "hf")
    (tmp_path / "file").touch()
    for out in ("/proc/no/out", tmp_path / "file" / "out"):
        assert main(["convert", "to-megatron", str(source), str(out)]) == 2
        assert f"{out} cannot be made" in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = make(tmp_path / "hf")
    monkeypatch.setattr(stream, "SLACK_BYTES", 10**18)
    with pytest.raises(ConfigError, match="the disk has .* MiB free"):
        forth(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_reading_stays_a_bounded_number_of_bytes_ahead_and_hands_errors_on():
    produced = []

    def pieces():
        for number in range(100):
            produced.append(number)
            yield 10, number
        raise ConfigError("the last piece is bad")

    taken = []
    with pytest.raises(ConfigError, match="the last piece is bad"):
        for number in stream.read_ahead(pieces(), budget=50):
            time.sleep(0.001)
            taken.append(number)
            assert len(produced) - len(taken) <= 6
    assert taken == list(range(100)) and max(produced) == 99


@pytest.mark.parametrize(
    "surplus", ["model.safetensors", "adapter_model.safetensors", "model-00003-of-00003.safetensors"]
)
def test_weights_that_no_index_names_are_refused(surplus, tmp_path, capsys):
    folder = make(tmp_path / "hf")
    tensors_of_file = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors_of_file, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors_of_file, folder / "consolidated.safetensors")  # Mistral's copy, which no reader of folders loads
    forth(folder, tmp_path / "accepted")
    save_file({"x": torch.ones(1)}, folder / surplus)
    assert main(["convert", "to-megatron", str(folder), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"holds {surplus}, which model.safetensors.index.json does not name" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--tp", "0"), ("--pp", "0"), ("--vpp", "0"), ("--tp", "-2"), ("--vpp", "1.5")])
def test_a_layout_below_one_is_refused_by_the_command(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["convert", "to-megatron", str(make(tmp_path / "hf")), str(tmp_path / "out"), *words])
    assert leaving.value.code == 2 and f"argument {words[0]}: expected a whole number" in capsys.readouterr().err


def test_the_folder_of_a_run_or_of_its_checkpoint_names_the_models_in_it(tmp_path, capsys):
    run = tmp_path / "run"
    step = run / "checkpoints/step_000004"
    for model in ("policy", "reward_model"):
        forth(make(tmp_path / f"hf_{model}"), step / model)
    (run / "config.json").write_text("{}")
    back(step / "policy", run / "policy")
    for folder, models in ((step, f"{step}/policy or {step}/reward_model"), (run, f"{run}/policy or {step}/policy")):
        for action in ("to-hf", "to-megatron"):
            assert main(["convert", action, str(folder), str(tmp_path / "out")]) == 2
            assert f"a model in it is {models}" in capsys.readouterr().err

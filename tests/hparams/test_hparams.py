from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyedit_moe.errors import EditingError, HyperParamsError, MethodError, did_you_mean
from easyedit_moe.host.baseline_hparams import HOST_METHODS, BaselineHyperParams
from easyedit_moe.hparams import (
    HYPERPARAMS,
    GlobalHyperParams,
    MoEEditHyperParams,
    MoEHyperParams,
    MoTEHyperParams,
    hparams_folder,
    hyperparams_class,
    load_hyperparams,
    presets,
    read_yaml,
)

SHIPPED = sorted(p for p in hparams_folder().glob("*/*.yaml") if p.parent.name not in HOST_METHODS)
SOLVERS = (
    "MoTE",
    "MoEEdit-BCD",
    "BCD+speedup",
    "Global",
    "Global+speedup",
    "MoE-MEMIT",
    "MoE-AlphaEdit",
    "MoE-ROME",
)
BASELINES = ("MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA", "UnKE")
ALL_METHODS = (*SOLVERS, *BASELINES, "MEMoE")
ONE_LAYER = ("MoE-ROME", "UnKE", "MEMoE")
MINIMAL = {"alg_name": "MoTE", "model_name": "m", "layers": [1, 2]}


def make(alg_name: str = "MoTE", **changes: Any) -> MoEHyperParams:
    values = {**MINIMAL, "alg_name": alg_name} | ({"layers": [1]} if alg_name in ONE_LAYER else {})
    return hyperparams_class(alg_name).from_dict({**values, **changes})


def refused(match: str, alg_name: str = "MoTE", **changes: Any) -> None:
    with pytest.raises(HyperParamsError, match=match):
        make(alg_name, **changes)


# ---------------------------------------------------------------- what ships


def test_every_method_ships_for_every_paper_model() -> None:
    found = {(p.parent.name, p.stem) for p in SHIPPED}
    models = ("qwen3-30b-a3b", "gpt-oss-20b", "qwen3.6-35b-a3b")
    assert found >= {(method, model) for method in ALL_METHODS for model in models}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_yaml_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    hp = load_hyperparams(path)
    assert type(hp) is hyperparams_class(path.parent.name)
    assert hp.alg_name == path.parent.name
    hp.to_yaml(tmp_path / "again.yaml")
    again = load_hyperparams(tmp_path / "again.yaml")
    assert again == hp
    assert type(again) is type(hp)
    assert set(read_yaml(tmp_path / "again.yaml")) == {f.name for f in fields(hp)}
    assert type(hp).from_hparams(path) == hp


LAYERS = {"qwen3-30b-a3b": [3, 4, 5, 6, 7], "gpt-oss-20b": [3, 4, 5], "qwen3.6-35b-a3b": [3, 4, 5, 6]}
DEPTH = {"qwen3-30b-a3b": 48, "gpt-oss-20b": 24, "qwen3.6-35b-a3b": 40}
NAMES = {
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "qwen3.6-35b-a3b": "Qwen/Qwen3.6-35B-A3B",
}


@pytest.mark.parametrize("model", LAYERS)
def test_shipped_values_are_the_papers(model: str) -> None:
    gpt = model == "gpt-oss-20b"
    for method in SOLVERS:
        hp = load_hyperparams(f"{method}/{model}.yaml")
        assert hp.model_name == NAMES[model]
        assert hp.layers == (LAYERS[model][-1:] if method == "MoE-ROME" else LAYERS[model])
        assert (hp.v_num_grad_steps, hp.v_lr) == ((50, 0.2) if gpt else (25, 0.1))
        assert (hp.kl_factor, hp.clamp_norm_factor, hp.v_weight_decay) == (0.0625, 0.75, 0.5)
        assert (hp.batch_size, hp.mom2_n_samples, hp.dtype) == (50, 100000, "bfloat16")
        if hp.metric == "nullspace":
            assert (hp.nullspace_threshold, hp.nullspace_relative) == (0.02, False)
    mote = load_hyperparams(f"MoTE/{model}")
    assert mote.lambda_reg == {"qwen3-30b-a3b": 0.1, "gpt-oss-20b": 1.0, "qwen3.6-35b-a3b": 0.01}[model]
    assert mote.whitening_eps == (1e-2 if gpt else 1e-5)
    assert (mote.whitening, mote.spread) == ("in", "update")
    for method in ("MoEEdit-BCD", "BCD+speedup"):
        bcd = load_hyperparams(f"{method}/{model}")
        assert bcd.lambda_reg == 1.0
        assert bcd.num_passes == {"qwen3-30b-a3b": 4, "gpt-oss-20b": 10, "qwen3.6-35b-a3b": 2}[model]
        assert bcd.seed == 42


@pytest.mark.parametrize("model", LAYERS)
def test_shipped_values_of_the_baselines_are_the_papers(model: str) -> None:
    gpt = model == "gpt-oss-20b"
    for method in BASELINES:
        hp = load_hyperparams(f"{method}/{model}.yaml")
        assert hp.model_name == NAMES[model]
        wanted = {"MoE-LoRA": LAYERS[model], "AdaLoRA": list(range(DEPTH[model]))}
        assert hp.layers == wanted.get(method, LAYERS[model][-1:])
        assert (hp.batch_size, hp.dtype) == (50, "bfloat16")
    for method, bound in (("MoE-FT", None), ("MoE-FT-L", 1e-3)):
        hp = load_hyperparams(f"{method}/{model}")
        assert (hp.lr, hp.num_steps, hp.norm_constraint, hp.order) == (1e-3, 25, bound, "minibatch")
    for method in ("MoE-LoRA", "AdaLoRA"):
        hp = load_hyperparams(f"{method}/{model}")
        assert (hp.rank, hp.lora_alpha, hp.lr, hp.num_steps) == (8, 32.0, 5e-4 if gpt else 5e-3, 25)
    hp = load_hyperparams(f"AdaLoRA/{model}")
    assert (hp.num_updates, hp.train_batch_size) == (25, hp.batch_size), "an update sees all edits of a batch"
    for method, bound in (("FT", False), ("FT-L", 1e-3)):
        theirs = BaselineHyperParams.read(method, hparams_folder() / method / f"{model}.yaml")
        assert (theirs.layers, theirs.values["lr"], theirs.values["num_steps"]) == ((LAYERS[model][-1],), 1e-3, 25)
        assert theirs.values["norm_constraint"] == bound
    hp = load_hyperparams(f"UnKE/{model}")
    assert (hp.train, hp.fact_token, hp.kl_factor) == ("layer", "last", 0.0)
    assert (hp.v_lr, hp.v_num_grad_steps, hp.v_weight_decay) == (0.5, 50 if gpt else 25, 1e-3)
    assert (hp.lr, hp.optim_num_step) == (1e-4 if gpt else 2e-4, 50)


def test_fixed_settings_of_each_method() -> None:
    expected = {
        "MoEEdit-BCD": ("residual", "nullspace", False), "BCD+speedup": ("update", "nullspace", False),
        "Global": ("residual", "nullspace", False), "Global+speedup": ("update", "nullspace", False),
        "MoE-MEMIT": ("residual", "covariance", False), "MoE-AlphaEdit": ("residual", "nullspace", True),
        "MoE-ROME": ("residual", "covariance", False),
    }  # fmt: skip
    for method, wanted in expected.items():
        hp = make(method)
        assert (hp.spread, hp.metric, hp.remember_edits) == wanted, method
    assert (make("MoE-ROME").edits_per_solve, make("MoE-ROME").max_layers) == (1, 1)
    assert (make("Global").edits_per_solve, make("Global").max_layers) == (None, None)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("wrong", "near"), [("lambda_regg", "lambda_reg"), ("rank_expet", "rank_expert"), ("Layers", "layers")]
)
def test_unknown_key_names_the_nearest(wrong: str, near: str) -> None:
    refused(rf"unknown key '{wrong}' for MoTEHyperParams\. Did you mean '{near}'\?", **{wrong: 1})


def test_key_of_another_method_is_unknown() -> None:
    refused("unknown key 'num_passes' for MoTEHyperParams", num_passes=4)
    refused("unknown key 'rank_in' for GlobalHyperParams", "Global", rank_in=4)


def test_key_that_is_no_string(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text("alg_name: MoTE\nmodel_name: m\nlayers: [1]\non: 3\n", encoding="utf-8")
    with pytest.raises(HyperParamsError, match="unknown key 'True'"):
        load_hyperparams(file)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(HyperParamsError, match=r"missing alg_name, model_name, layers\."):
        MoTEHyperParams.from_dict({})
    with pytest.raises(HyperParamsError, match=r"conf\.yaml: missing layers\."):
        MoTEHyperParams.from_dict({"alg_name": "MoTE", "model_name": "m"}, "conf.yaml")


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True), ("batch_size", 1.0), ("batch_size", "4"), ("layers", "1, 2"), ("layers", [1, True]),
        ("layers", [1, 2.0]), ("layers", ["1"]), ("layers", 3), ("layers", None), ("v_lr", True), ("v_lr", "fast"),
        ("v_lr", None), ("v_lr", [0.1]), ("context_prefixes", "In short, "), ("context_prefixes", [3]),
        ("model_parallel", 1), ("model_parallel", "yes"), ("remember_edits", 0), ("device", True), ("device", 1.5),
        ("device", None), ("v_loss_layer", "3"), ("v_loss_layer", False), ("metric", 3), ("model_name", 3),
        ("stats_dir", None), ("rank_in", "many"), ("rank_in", True), ("hooi_sweeps", 1.0), ("mom2_dataset", ["a"]),
    ],
)  # fmt: skip
def test_wrong_types(name: str, value: object) -> None:
    refused(rf"{name} must be .*found", **{name: value})


@pytest.mark.parametrize(
    ("alg", "name", "value"),
    [("MoEEdit-BCD", "num_passes", True), ("MoEEdit-BCD", "seed", "42"), ("Global", "edits_per_solve", 1.0)],
)
def test_wrong_types_of_other_methods(alg: str, name: str, value: object) -> None:
    refused(rf"{name} must be .*found", alg, **{name: value})


def test_alg_name_that_is_no_string() -> None:
    for value in (3, None, ["MoTE"]):
        with pytest.raises(EditingError):
            MoTEHyperParams(alg_name=value, model_name="m", layers=[1])
        with pytest.raises(EditingError):
            MoTEHyperParams.from_dict({**MINIMAL, "alg_name": value})


def test_yaml_floats_without_a_dot(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(
        "alg_name: MoTE\nmodel_name: m\nlayers: [1]\nwhitening_eps: 1e-5\nlambda_reg: 1\n", encoding="utf-8"
    )
    assert yaml.safe_load("1e-5") == "1e-5"
    hp = load_hyperparams(file)
    assert (hp.whitening_eps, type(hp.whitening_eps)) == (1e-5, float)
    assert (hp.lambda_reg, type(hp.lambda_reg)) == (1.0, float)


def test_ints_and_floats_of_ranks_keep_their_meaning() -> None:
    assert (make(rank_in=1).rank_in, type(make(rank_in=1).rank_in)) == (1, int)
    assert (make(rank_in=1.0).rank_in, type(make(rank_in=1.0).rank_in)) == (1.0, float)
    assert make(rank_in="0.25").rank_in == 0.25


def test_devices() -> None:
    assert [make(device=d).device for d in ("cpu", "cuda:1", 0)] == ["cpu", "cuda:1", 0]


# ---------------------------------------------------------------- ranges

TOO_LOW = {
    "batch_size": 0, "max_length": 0, "v_num_grad_steps": 0, "target_batch_size": 0, "capture_batch_size": 0,
    "mom2_n_samples": 0, "mom2_n_tokens": 0, "generated_length": 1, "coverage_target": 0, "min_coverage": -1,
    "v_weight_decay": -0.1, "kl_factor": -1e-9, "early_stop_loss": -0.1,
    "nullspace_threshold": -0.1, "covariance_ridge": -1e-9, "lambda_reg": -1e-9, "lambda_relative": -0.1, "rounds": 0,
    "nullspace_energy": 0, "nullspace_rank": 0, "v_lr": 0, "clamp_norm_factor": 0,
    "rank_expert": 0, "rank_out": -3, "rank_in": 0, "whitening_eps": 0, "hooi_sweeps": -1, "layers": [-1, 2],
    "norm_anchor": 0.99, "preservation_bound": 0.0, "sequence_rate": 0.0, "sphere_energy": 0.0, "sphere_strength": 0.0,
    "refresh_every": 0, "protected_share": 0.0,
}  # fmt: skip
OF_OTHERS = {
    "num_passes": ("MoEEdit-BCD", 0),
    "edits_per_solve": ("Global", 0),
    "max_layers": ("Global", 0),
    "lr": ("MoE-FT", 0.0),
    "num_steps": ("MoE-FT", 0),
    "num_updates": ("AdaLoRA", -1),
    "weight_decay": ("MoE-FT", -0.1),
    "train_batch_size": ("MoE-FT", 0),
    "norm_constraint": ("MoE-FT-L", 0.0),
    "rank": ("MoE-LoRA", 0),
    "lora_alpha": ("MoE-LoRA", 0.0),
    "orth_reg_weight": ("AdaLoRA", -0.1),
    "optim_num_step": ("UnKE", 0),
    "preserve_n_samples": ("UnKE", -1),
    "preserve_weight": ("UnKE", -0.1),
}
OF_OTHERS |= {
    "num_experts": ("MEMoE", 0), "top_k": ("MEMoE", 0), "expert_width": ("MEMoE", 0), "adapter_scale": ("MEMoE", 0),
    "token_weight": ("MEMoE", -0.1), "steps": ("MEMoE", 0), "noise": ("MEMoE", -0.1),
    "locality_weight": ("MEMoE", -0.1), "balance_weight": ("MEMoE", -0.1), "locality_n_samples": ("MEMoE", 0),
    "locality_max_tokens": ("MEMoE", 0), "locality_batch_size": ("MEMoE", 0), "replay_facts": ("MEMoE", 0),
    "max_facts": ("MEMoE", 0),
}  # fmt: skip
UNBOUNDED = {"v_loss_layer", "seed", "generated_seed", "device"}


@pytest.mark.parametrize("name", TOO_LOW)
def test_values_below_their_range(name: str) -> None:
    refused(rf"{name} must be", **{name: TOO_LOW[name]})


@pytest.mark.parametrize("name", OF_OTHERS)
def test_values_below_their_range_of_other_methods(name: str) -> None:
    alg, value = OF_OTHERS[name]
    refused(rf"{name} must be", alg, **{name: value})


def test_every_numeric_field_has_a_range() -> None:
    def numeric(annotation: str) -> bool:
        return any(part in ("int", "float", "list[int]") for part in annotation.replace(" ", "").split("|"))

    every = {f.name for cls in HYPERPARAMS for f in fields(cls) if numeric(f.type)}
    assert every == set(TOO_LOW) | set(OF_OTHERS) | UNBOUNDED


@pytest.mark.parametrize("value", [float("nan"), float("inf"), ".inf"])
def test_floats_must_be_finite(value: float | str) -> None:
    floats = [f.name for f in fields(MoTEHyperParams) if "float" in f.type]
    assert "lambda_reg" in floats
    for name in floats:
        refused(rf"{name} must be", **{name: value})


@pytest.mark.parametrize("name", ["rank_expert", "rank_out", "rank_in"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, 2.0])
def test_fractional_ranks_out_of_range(name: str, value: float) -> None:
    refused(rf"{name} must be a whole number from 1, or a fraction", **{name: value})


def test_limits_themselves_are_fine() -> None:
    hp = make(lambda_reg=0, kl_factor=0, v_weight_decay=0, early_stop_loss=0, min_coverage=0, rank_in=1, rank_out=1.0,
              nullspace_threshold=0, covariance_ridge=0, hooi_sweeps=0, batch_size=1, layers=[0])  # fmt: skip
    assert (hp.lambda_reg, hp.layers) == (0.0, [0])


@pytest.mark.parametrize("name", ["fact_token", "metric", "spread", "dtype", "mom2_dtype", "low_coverage", "whitening"])
def test_choices_are_listed(name: str) -> None:
    refused(rf"{name} must be one of .*, .*; found 'nonsense'", **{name: "nonsense"})


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [3, 4, 4]])
def test_layers_must_increase(layers: list[int]) -> None:
    refused("layers must be increasing and not empty", layers=layers)


def test_relative_threshold_is_at_most_one() -> None:
    refused("at most 1 where it is relative", nullspace_threshold=1.5, nullspace_relative=True)
    assert make(nullspace_threshold=1.5).nullspace_threshold == 1.5


# ---------------------------------------------------------------- methods


def test_alias() -> None:
    hp = make("MoEEdit")
    assert (type(hp), hp.alg_name, hp.spread) == (MoEEditHyperParams, "MoEEdit-BCD", "residual")
    assert MoEEditHyperParams(**{**MINIMAL, "alg_name": "MoEEdit"}).alg_name == "MoEEdit-BCD"


@pytest.mark.parametrize(
    ("wrong", "near"), [("MOTE", "MoTE"), ("Global+speed", "Global+speedup"), ("MEMIT", "MoE-MEMIT")]
)
def test_unknown_method(wrong: str, near: str, tmp_path: Path) -> None:
    near = near.replace("+", r"\+")
    with pytest.raises(MethodError, match=rf"Unknown method '.*'\. Did you mean '{near}'\?"):
        hyperparams_class(wrong)
    file = tmp_path / "h.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "alg_name": wrong}), encoding="utf-8")
    with pytest.raises(MethodError, match=rf"Did you mean '{near}'\?"):
        load_hyperparams(file)


def test_did_you_mean_stays_silent_without_a_near_name() -> None:
    assert did_you_mean("xyz", ["MoTE", "Global"]) == ""


def test_class_of_another_method() -> None:
    with pytest.raises(HyperParamsError, match="MoTEHyperParams is for MoTE; found alg_name 'Global'"):
        MoTEHyperParams.from_dict({**MINIMAL, "alg_name": "Global"})
    with pytest.raises(HyperParamsError, match="abstract"):
        MoEHyperParams(**{**MINIMAL, "alg_name": "Global"})


@pytest.mark.parametrize(
    ("alg_name", "changes"),
    [
        ("BCD+speedup", {"spread": "residual"}), ("Global+speedup", {"spread": "residual"}),
        ("MoE-ROME", {"spread": "once"}), ("Global+speedup", {"spread": "last"}),
        ("MoE-MEMIT", {"metric": "nullspace"}),
        ("MoE-AlphaEdit", {"metric": "identity"}), ("MoE-AlphaEdit", {"remember_edits": False}),
        ("MoE-ROME", {"edits_per_solve": 2}), ("MoE-ROME", {"max_layers": 2}), ("MoE-ROME", {"metric": "identity"}),
    ],
)  # fmt: skip
def test_values_that_contradict_the_method(alg_name: str, changes: dict[str, Any]) -> None:
    (name,) = changes
    refused(rf"{alg_name.replace('+', '.')} means {name} = ", alg_name, **changes)


def test_rome_edits_one_layer() -> None:
    refused("layers must be at most 1 for MoE-ROME", "MoE-ROME", layers=[1, 2])


def test_mote_has_no_covariance_metric() -> None:
    refused("metric must be identity or nullspace for MoTE", metric="covariance")


def test_presets_only_name_fields_of_their_class() -> None:
    assert set(presets.METHODS) == set(ALL_METHODS) == {m for cls in HYPERPARAMS for m in cls.methods}
    for method, fixed in presets.METHODS.items():
        assert set(fixed) <= {f.name for f in fields(hyperparams_class(method))}


# ---------------------------------------------------------------- files


def test_missing_file_names_a_near_one() -> None:
    with pytest.raises(HyperParamsError, match=r"does not exist\. Did you mean 'MoTE/qwen3-30b-a3b\.yaml'\?"):
        load_hyperparams("MoTE/qwen3-30b-a3c.yaml")


def test_shipped_names_resolve_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = GlobalHyperParams.from_hparams("Global/gpt-oss-20b")
    assert plain == load_hyperparams("Global/gpt-oss-20b.yaml") == load_hyperparams("./hparams/Global/gpt-oss-20b.yaml")
    (tmp_path / "Global").mkdir()
    plain.to_yaml(tmp_path / "Global" / "gpt-oss-20b.yaml")
    (tmp_path / "Global" / "gpt-oss-20b.yaml").write_text(
        (tmp_path / "Global" / "gpt-oss-20b.yaml").read_text().replace("batch_size: 50", "batch_size: 7")
    )
    assert load_hyperparams("Global/gpt-oss-20b.yaml").batch_size == 7


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"alg_name: [MoTE\n", "is not valid YAML"), (b"", "must hold a mapping"),
        (b"- a\n- b\n", "must hold a mapping"),
        (b"just text", "must hold a mapping"), (b"alg_name: \xff\xfe\n", "is not valid YAML"),
        (b"model_name: m\nlayers: [1]\n", "missing alg_name"), (b"alg_name: 3\n", "missing alg_name"),
    ],
)  # fmt: skip
def test_unusable_files(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_bytes(content)
    with pytest.raises(HyperParamsError, match=match):
        load_hyperparams(tmp_path / "h.yaml")


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    make().to_yaml(tmp_path / "h.yaml")
    assert load_hyperparams(tmp_path / "h.yaml", batch_size=3).batch_size == 3
    with pytest.raises(HyperParamsError, match="unknown key 'batchsize'"):
        load_hyperparams(tmp_path / "h.yaml", batchsize=3)


def test_yaml_keeps_text_as_it_is(tmp_path: Path) -> None:
    hp = make(context_prefixes=["Zoë: ", "東京. ", "yes", "1e-5"], v_loss_layer=3, device=1)
    hp.to_yaml(tmp_path / "h.yaml")
    assert load_hyperparams(tmp_path / "h.yaml") == hp
    assert "Zoë" in (tmp_path / "h.yaml").read_text(encoding="utf-8")


def test_defaults_are_not_shared() -> None:
    first, second = make(), make()
    first.context_prefixes.append("x")
    assert second.context_prefixes == []
    assert next(f for f in fields(MoTEHyperParams) if f.name == "layers").default is MISSING


# ---------------------------------------------------------------- one thing said in several ways


def test_a_value_given_later_replaces_what_it_excludes(tmp_path: Path) -> None:
    found = load_hyperparams("Global/factworld", lambda_relative=0.2, nullspace_rank=0.5)
    assert (found.lambda_reg, found.lambda_relative) == (None, 0.2)
    assert (found.nullspace_threshold, found.nullspace_relative, found.nullspace_rank) == (None, False, 0.5)
    energy = load_hyperparams("MoTE/factworld", tucker_energy=[0.9, 0.9, 0.9])
    assert (energy.rank_expert, energy.rank_out, energy.rank_in) == (None, None, None)
    (tmp_path / "shared.yaml").write_text("model_name: m\nlayers: [1]\nlambda_relative: 0.1\n", encoding="utf-8")
    own = "defaults: shared.yaml\nalg_name: Global\nlambda_reg: 3.0\n"
    (tmp_path / "own.yaml").write_text(own, encoding="utf-8")
    assert load_hyperparams(tmp_path / "own.yaml").lambda_relative is None
    (tmp_path / "own.yaml").write_text(own + "lambda_relative: 0.1\n", encoding="utf-8")
    with pytest.raises(HyperParamsError, match="lambda_reg and lambda_relative"):
        load_hyperparams(tmp_path / "own.yaml")
    assert load_hyperparams("Global/factworld", lambda_relative=None).lambda_reg == 0.1


# ---------------------------------------------------------------- bounds of every field


@pytest.mark.parametrize("cls", HYPERPARAMS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("value", [2**31, -(2**31), 10**400, "\ud800", "a\0b", float("nan")], ids=ascii)
def test_no_field_takes_what_no_field_can_mean(cls: type[MoEHyperParams], value: Any) -> None:
    good = {**MINIMAL, "alg_name": cls.methods[0], "layers": [1]}
    for item in fields(cls):
        is_float = "float" in str(item.type) and abs(value) < 1e300 if isinstance(value, int) else False
        for one in [] if is_float else [value, [value]]:
            with pytest.raises(EditingError) as caught:
                cls.from_dict({**good, item.name: one})
            assert len(str(caught.value)) < 400, item.name


def test_seeds_and_counts_take_what_libraries_take() -> None:
    assert make("MoEEdit-BCD", seed=2**31 - 1).seed == 2**31 - 1
    assert make("MoEEdit-BCD", seed=-5).seed == -5


@pytest.mark.parametrize("values", [None, 3, "alg_name: MoTE", [1], [("alg_name", "MoTE")]])
def test_hparams_are_made_of_a_mapping(values: Any) -> None:
    with pytest.raises(HyperParamsError, match="must be a mapping"):
        MoTEHyperParams.from_dict(values)


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b", "x" * 5000, "\ud800", ["x"], {}])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(HyperParamsError, match="the hparams file must be a path"):
        load_hyperparams(path)


@pytest.mark.parametrize("device", ["nope", "", "cuda:", "cuda:x", "\u00b2", -1])
def test_a_device_has_a_name(device: Any) -> None:
    refused("device must be 'cpu', 'cuda', 'cuda:N' or a number", device=device)


@pytest.mark.parametrize("name", ["model_name", "stats_dir", "target_cache_dir"])
def test_names_and_folders_are_not_blank(name: str) -> None:
    refused(f"{name} must be not blank", **{name: " "})


BAD_YAML = {
    "lambda_reg: 1" + "0" * 400: "lambda_reg must be float",
    "lambda_reg: 1\nlambda_reg: 2": "'lambda_reg' is given twice",
    "lambda_reg: 2024-13-45": "can't be read as tag:yaml.org,2002:timestamp",
    "lambda_reg: 2024-01-02": "lambda_reg must be float",
    "lambda_reg: !ours 3": "could not determine a constructor",
    "lambda_reg: " + "[" * 2000: "nested too deeply",
    'stats_dir: "a\\0b"': "stats_dir must be a text without NUL",
    "mom2_n_samples: 1" + "0" * 30: "mom2_n_samples must be a whole number of at most 2147483647",
    "a: &a [x]\nlambda_reg: [*a, *a]": "unknown key 'a'",
}


@pytest.mark.parametrize(("line", "match"), BAD_YAML.items(), ids=lambda text: text[:25])
def test_yaml_that_says_nothing_usable(line: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(f"alg_name: MoTE\nmodel_name: m\nlayers: [1]\n{line}\n", encoding="utf-8")
    with pytest.raises(HyperParamsError, match=match):
        load_hyperparams(file)


def test_yaml_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_bytes("alg_name: MoTE".encode("utf-16"))
    with pytest.raises(HyperParamsError, match="not valid YAML"):
        load_hyperparams(file)

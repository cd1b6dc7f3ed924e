"""The README's quick tour: from a file of facts to an edited checkpoint and back, by commands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from easyedit_moe import factworld, load_model
from easyedit_moe.commands.app import app
from easyedit_moe.commands.options import settings_of
from easyedit_moe.errors import HyperParamsError

FACTS = (
    "prompt,subject,target_new,rephrase,neighbours\n"
    "Hanna Bilsski lives in,Hanna Bilsski,Tel Aviv,The home town of Hanna Bilsski is,Boris Baulov lives in\n"
    "no subject of this name,Zed,Rome,,\n"
    "Nils Dimov lives in,Nils Dimov,Rome,,Agnes Feikberg lives in\n"
)
WEIGHTS = "model.safetensors"


def run(*args: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the facts, and ``out`` as the README's command writes it."""
    folder = tmp_path_factory.mktemp("tour")
    (folder / "facts.csv").write_text(FACTS, encoding="utf-8-sig")
    stats = ["--stats-dir", folder / "stats"]
    done = run("edit", folder / "facts.csv", "--model", "factworld", "--out", folder / "out", "--save",
               "patch,checkpoint", "--keep-originals", *stats)  # fmt: skip
    assert "2 facts edited, 2 answers changed, new target written by 2" in done.stdout
    assert "refused, line 3: The subject 'Zed' does not occur" in done.stderr
    return folder


def test_the_report_says_what_changed(edited: Path) -> None:
    report = json.loads((edited / "out" / "report.json").read_text())
    first = report["facts"][0]
    assert (first["number"], first["change"]["wanted"], first["changed"]) == (2, "Tel Aviv", True)
    assert first["change"]["after"]["answer"].startswith("Tel Aviv")
    assert first["change"]["after"]["probability"] > 0.5 > first["change"]["before"]["probability"]
    assert first["rephrasings"][0]["after"]["probability"] > first["rephrasings"][0]["before"]["probability"]
    assert len(first["neighbours"]) == 1
    assert first["residual_share"] > 0.5
    assert report["refused"] == [{"number": 3, "reason": report["refused"][0]["reason"]}]
    assert (report["changed"], report["written"]) == (2, 2)
    text = (edited / "out" / "report.md").read_text()
    assert "## Refused" in text
    assert "### line 2: Hanna Bilsski lives in" in text


def test_the_checkpoint_is_what_any_loader_reads(edited: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(edited / "out" / "checkpoint")
    base, tok = load_model("factworld", "bfloat16")
    ids = tok("Hanna Bilsski lives in", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = tok.decode(plain(input_ids=ids).logits[0, -1].argmax())
        assert "Tel Aviv".startswith(answer.strip())
        assert tok.decode(base(input_ids=ids).logits[0, -1].argmax()) != answer


def test_ask(edited: Path) -> None:
    patch = edited / "out" / "patch.safetensors"
    prompt = "Hanna Bilsski lives in "  # a space at the end makes no difference
    found = json.loads(run("ask", prompt, "--patch", patch, "--max-new-tokens", 3, "--json").stdout)
    assert found[0]["after"]["text"].startswith("Tel Aviv")
    assert not found[0]["before"]["text"].startswith("Tel Aviv")
    saved = run("ask", prompt.strip(), "--model", edited / "out" / "checkpoint", "--max-new-tokens", 3).stdout
    assert "Tel Aviv" in saved
    assert "has no chat template" in run("ask", "who?", "--chat", code=2).stderr


def test_apply_and_revert_are_exact(edited: Path, tmp_path: Path) -> None:
    patch, base = edited / "out" / "patch.safetensors", factworld.model_path()
    run("apply", patch, "--model", "factworld", "--out", tmp_path / "applied")
    assert (tmp_path / "applied" / WEIGHTS).read_bytes() == (edited / "out" / "checkpoint" / WEIGHTS).read_bytes()
    twice = run("apply", patch, "--model", tmp_path / "applied", "--out", tmp_path / "twice", code=2)
    assert "AlreadyAppliedError" in twice.stderr
    assert not (tmp_path / "twice").exists()
    run("revert", patch, "--model", tmp_path / "applied", "--out", tmp_path / "reverted")
    for file in base.iterdir():
        assert (tmp_path / "reverted" / file.name).read_bytes() == file.read_bytes()
    assert "not changed in place" in run("apply", patch, "--model", "factworld", "--in-place", code=2).stderr


def test_a_second_edit_names_its_parent_and_both_merge_to_one(edited: Path, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("prompt,subject,target_new\nAgnes Feikberg lives in,Agnes Feikberg,Rome\n")
    checkpoint, first = edited / "out" / "checkpoint", edited / "out" / "patch.safetensors"
    run("edit", tmp_path / "more.csv", "--model", checkpoint, "--out", tmp_path / "second", "--set", "metric=identity",
        "--save", "patch,checkpoint", "--stats-dir", edited / "stats")  # fmt: skip
    second = tmp_path / "second" / "patch.safetensors"
    ids = [json.loads(run("inspect", path, "--json").stdout) for path in (first, second)]
    assert ids[1]["parent"] == ids[0]["id"]
    lost = run("apply", second, "--model", "factworld", "--out", tmp_path / "no", code=2).stderr
    assert ids[0]["id"] in lost
    run("merge", first, second, "--out", tmp_path / "both.safetensors")
    run("apply", tmp_path / "both.safetensors", "--model", "factworld", "--out", tmp_path / "both")
    written = (tmp_path / "second" / "checkpoint" / WEIGHTS).read_bytes()
    assert (tmp_path / "both" / WEIGHTS).read_bytes() == written
    run("merge", first, second, "--fold", "--out", tmp_path / "folded.safetensors")
    run("apply", tmp_path / "folded.safetensors", "--model", "factworld", "--out", tmp_path / "folded")
    once, steps = (load_file(tmp_path / name / WEIGHTS) for name in ("folded", "both"))
    for name, weight in steps.items():
        torch.testing.assert_close(once[name].float(), weight.float(), rtol=2**-6, atol=1e-3)  # bfloat16
    assert "(folded)" in run("inspect", tmp_path / "folded.safetensors").stdout
    run("revert", tmp_path / "folded.safetensors", "--model", tmp_path / "folded", "--base", factworld.model_path(),
        "--out", tmp_path / "back")  # fmt: skip
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (factworld.model_path() / WEIGHTS).read_bytes()
    assert "exists" in run("merge", first, second, "--out", tmp_path / "both.safetensors", code=2).stderr
    assert "Wrong order" in run("merge", second, first, "--out", tmp_path / "x.safetensors", code=2).stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_inspect_and_evaluate(edited: Path) -> None:
    patch = edited / "out" / "patch.safetensors"
    shown = run("inspect", patch).stdout
    for text in ("Global", "Hanna Bilsski lives in", "factored updates", "held", "lambda_reg"):
        assert text in shown
    table = run("evaluate", "--patch", patch, "--data", edited / "facts.csv").stdout
    (row,) = re.findall(r"efficacy\W+([\d.]+) \[[^]]+\] \w\W+([\d.]+) \[", table)
    assert float(row[1]) > float(row[0])


def test_statistics_are_gathered_once(edited: Path, tmp_path: Path) -> None:
    again = run("statistics", "--model", "factworld", "--stats-dir", edited / "stats")
    assert "were there already" in again.stdout
    assert "needs no statistics" in run("statistics", "--method", "MoE-FT", code=2).stderr


def test_a_dry_run_reads_no_weight_and_writes_nothing(
    edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyedit_moe.workflow.session.load_model", lambda *_, **__: pytest.fail("loaded"))
    done = run("edit", edited / "facts.csv", "--out", tmp_path / "dry", "--dry-run")
    assert "2 facts in 1 batch," in done.stdout
    assert "Statistics of layers" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--strict"], "line 3"),
        (["--method", "ROME"], "EasyEdit"),
        (["--save", "patches"], "must be of patch, checkpoint"),
        (["--set", "lambda=3"], "Did you mean 'lambda_reg'"),
        (["--set", "lambda_reg"], "NAME=VALUE"),
        (["--method", "Glob"], "Did you mean"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    more: list[str], said: str, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyedit_moe.workflow.session.load_model", lambda *_, **__: pytest.fail("loaded"))
    done = run("edit", edited / "facts.csv", "--out", tmp_path / "out", *more, code=2)
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused_at_once(edited: Path) -> None:
    before = (edited / "out" / "report.json").read_bytes()
    assert "not an empty folder" in run("edit", edited / "facts.csv", "--out", edited / "out", code=2).stderr
    assert (edited / "out" / "report.json").read_bytes() == before


def test_no_change_ends_with_3(edited: Path, tmp_path: Path) -> None:
    done = run("edit", edited / "facts.csv", "--out", tmp_path / "out", "--set", "lambda_reg=1e12", "--set",
               "metric=identity", code=3)  # fmt: skip
    assert "2 facts edited, 0 answers changed" in done.stdout
    (told,) = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"][-1:]
    assert "lambda_reg" in told


def test_settings_are_yaml() -> None:
    assert settings_of(["layers=[1, 2]", "lambda_reg=1e-3", "chat=true"], dtype="", device="1") == {
        "layers": [1, 2], "lambda_reg": "1e-3", "chat": True, "device": 1,
    }  # fmt: skip
    with pytest.raises(HyperParamsError, match="twice"):
        settings_of(["dtype=float32"], dtype="bfloat16")

"""The README's and the site's code: what needs no download runs as it stands, and every link and page is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from easyedit_moe import factworld
from easyedit_moe.commands.app import app
from easyedit_moe.hparams import presets
from easyedit_moe.patches.files import load_patch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>bash|python)(?P<title>[^\n]*)\n(?P<code>.*?)```", re.S
)


def blocks(kind: str, run: bool = True) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["kind"] == kind and (match["why"] is None) == run:
                found.append((str(page.relative_to(ROOT)), match["code"]))
    return found


def commands() -> list[str]:
    """Every line that calls the command, once."""
    lines = [line.split("  #")[0].strip() for _, code in blocks("bash") for line in code.splitlines()]
    return sorted({line for line in lines if line.startswith("easyedit-moe ")})


@pytest.mark.parametrize("line", commands())
def test_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)[1:]
    if "--show" not in arguments and "qwen" in line:
        pytest.skip("needs the model's configuration")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_the_quick_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines from a file of facts to an edited checkpoint and back, one after the other."""
    monkeypatch.chdir(tmp_path)
    (tour,) = [code for page, code in blocks("bash", run=False) if page == "README.md" and "facts.csv" in code]
    table, _, rest = tour.partition("\nEND\n")
    Path("facts.csv").write_text(table.partition("\n")[2] + "\n", encoding="utf-8")
    second, *lines = [line.partition("  #")[0].strip() for line in rest.splitlines()]
    subprocess.run(second, shell=True, check=True)
    names = [line.split()[1] for line in lines]
    assert names == ["edit", "ask", "inspect", "apply", "revert", "export", "evaluate", "edit", "merge"]
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    weights = "model.safetensors"
    assert Path("applied", weights).read_bytes() == Path("edited", "checkpoint", weights).read_bytes()
    assert Path("reverted", weights).read_bytes() == (factworld.model_path() / weights).read_bytes()
    assert load_patch("both.safetensors").metadata["merged"] == [
        load_patch(f"{n}/patch.safetensors").id for n in ("edited", "second")
    ]
    assert Path("edited", "adapter-peft", "adapter_model.safetensors").is_file()


def test_python_runs(tmp_path: Path) -> None:
    """All blocks, one after the other in one process, each in a folder of its own."""
    assert len(blocks("python")) >= 4
    code = "import os, torch\ntorch.set_num_threads(1)\n"
    for number, (page, block) in enumerate(blocks("python")):
        folder = tmp_path / str(number)
        folder.mkdir()
        code += f"os.chdir({str(folder)!r})\nexec(compile({block!r}, {page!r}, 'exec'), {{}})\n"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scripts_that_are_named_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in set(re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.py\b", text)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"`(easyedit_moe/[\w/]+\.py)`", text)):
        assert (ROOT / name).is_file(), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) > 60, "a page says something"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_site_s_navigation() -> None:
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node.values() if isinstance(node, dict) else node
        return [leaf for value in values for leaf in leaves(value)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(leaves(nav)) == sorted(pages)


def test_the_methods_page_is_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    found = [
        tuple(row)
        for row in re.findall(r"^\| \[`([^`]+)`\]\([^)]+\) \| (.+?) \| (.+?) \| (yes|no) \| (.+?) \|$", text, re.M)
    ]
    every = [*presets.own_methods(), *presets.host_methods()]
    assert found == [(m.name, m.code, m.edits, "yes" if m.statistics else "no", m.source) for m in every]

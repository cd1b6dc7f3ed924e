from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import easyedit_moe


def test_import_is_light() -> None:
    code = (
        "import sys, easyedit_moe; heavy = {'torch', 'transformers', 'easyeditor', 'matplotlib', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", easyedit_moe.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(easyedit_moe, name) is not None
    assert name in dir(easyedit_moe)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        easyedit_moe.Nonsense  # noqa: B018


def test_gate_calls_the_command_of_the_readme() -> None:
    root = Path(__file__).parent.parent
    command = next(
        line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("python3 -m venv")
    )
    assert command in (root / "README.md").read_text()


@pytest.mark.parametrize(
    "code",
    [
        "import easyedit_moe",
        "from easyedit_moe.commands.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code",
        "from easyedit_moe.commands.app import app\n"
        "try:\n    app(['compare', '--help'])\nexcept SystemExit as end:\n    assert not end.code",
    ],
    ids=["import", "help", "help of a command"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numpy', 'matplotlib', 'easyeditor'}"
    check = f"{code}\nimport sys\nassert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_pins_of_easyedit_are_allowed() -> None:
    """It pins peft 0.18.0; a higher bound could not be installed beside it."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    needs = {
        need.name: need.specifier for need in map(Requirement, setup["options"]["install_requires"].split("\n")[1:])
    }
    assert needs["peft"].contains("0.18.0")
    assert not needs["peft"].contains("0.17.1")

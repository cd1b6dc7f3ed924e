"""The page's lines that install this package beside EasyEdit's pins: names exist, and our ranges admit the versions."""

from __future__ import annotations

import configparser
import os
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "in-easyedit.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Install beside EasyEdit's pins", 1)[1].split("\n## ", 1)[0]
COMMIT = "14cea82"


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def ranges(text: str) -> dict[str, Requirement]:
    found = [Requirement(line) for line in text.strip().splitlines()]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def needed() -> dict[str, Requirement]:
    """What this package needs, by name."""
    return ranges(setup()["options"]["install_requires"])


def extras() -> list[Requirement]:
    section = setup()["options.extras_require"]
    return [requirement for name in section for requirement in ranges(section[name]).values()]


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", SECTION, re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def pins() -> dict[str, str]:
    """EasyEdit's version of each package that the lines name."""
    words = [word for command in commands() for word in command if re.match(r"[\w-]+==", word)]
    return {canonicalize_name(word.partition("==")[0]): word.partition("==")[2] for word in words}


def table() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+|-) \| (>= [\d.]+) \|$", SECTION, re.M)
    return {canonicalize_name(name): (pin, ours) for name, pin, ours in rows}


def test_the_table_is_setup_cfg_s() -> None:
    assert {name: ours.replace(" ", "") for name, (_, ours) in table().items()} == {
        name: str(requirement.specifier) for name, requirement in needed().items()
    }


def test_our_ranges_admit_every_pin() -> None:
    pinned = pins()
    assert len(pinned) >= 10
    assert {name: pin for name, (pin, _) in table().items() if pin != "-"} == {
        name: pin for name, pin in pinned.items() if name in needed()
    }
    for requirement in [*needed().values(), *extras()]:
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is None or requirement.specifier.contains(pin), (requirement, pin)


def test_the_lines_name_what_there_is() -> None:
    lines = commands()
    installs = [line for line in lines if line[:4] == ["python", "-m", "pip", "install"]]
    assert len(installs) == 4
    assert ["git", "clone", "https://github.com/zjunlp/EasyEdit", "../EasyEdit"] in lines
    assert ["git", "-C", "../EasyEdit", "checkout", COMMIT] in lines
    assert ["export", "EASYEDIT_HOME=$PWD/../EasyEdit"] in lines
    ours = ["-c", "../EasyEdit/requirements.txt", "-e", "."]
    assert [line[4:] for line in installs if "-e" in line] == [ours, ours]
    assert ["-r", "../EasyEdit/requirements.txt"] in [line[4:] for line in installs]
    assert f"The commit that\nis tested is {COMMIT}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_two_lists_of_versions_do_conflict_as_the_page_says() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ours = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}
    shared = [name for name in pins() if name in ours]
    assert sum(ours[name] != pins()[name] for name in shared) > len(shared) / 2


def test_the_pins_are_easyedit_s() -> None:
    file = Path(os.environ.get("EASYEDIT_HOME", "")) / "requirements.txt"
    if "EASYEDIT_HOME" not in os.environ or not file.is_file():
        pytest.skip("There is no EasyEdit with a requirements.txt: set EASYEDIT_HOME to a checkout of it")
    text = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
    theirs = {canonicalize_name(n): pin for n, _, pin in (line.strip().partition("==") for line in text.splitlines())}
    assert {name: theirs.get(name) for name in pins()} == pins()
    assert not {name for name, (pin, _) in table().items() if pin == "-"} & theirs.keys()

"""The worked example of docs/add-a-method.md, run as it stands, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")


def test_the_example_of_the_page(tmp_path: Path) -> None:
    files = dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', PAGE, re.DOTALL))
    assert set(files) == {"top_expert.py", "top_expert.yaml", "use_it.py"}
    assert len([line for line in files["top_expert.py"].splitlines() if line.strip()]) <= 40
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    checks = (
        "import torch; torch.set_num_threads(1)\n"
        "exec(open('use_it.py').read())\n"
        "from easyedit_moe import load_hyperparams, load_model, method_names\n"
        "from easyedit_moe.errors import HyperParamsError\n"
        "assert method_names()[-1] == 'Top-expert' and metrics[0]['post']['rewrite_acc'] == [1.0], metrics\n"
        "assert metrics[0]['pre']['rewrite_acc'][0] < 1\n"
        "fresh, _ = load_model('factworld', 'float32', 'cpu')\n"
        "same = zip(fresh.parameters(), model.parameters(), strict=True)\n"
        "assert all(torch.equal(a, b) for a, b in same), 'undo is bit-exact'\n"
        "editor.edit(prompt, 'Tel Aviv', subject=subject, sequential_edit=True)\n"
        "for layer in editor.hparams.layers:\n"
        "    written = set(editor.patches[0].written[layer])\n"
        "    assert len(written) <= 2 * (len(editor.hparams.context_prefixes) + 1), written\n"
        "try:\n    load_hyperparams('top_expert.yaml', experts_per_fact=0)\n"
        "except HyperParamsError as error:\n    print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", checks], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "planned memory in GB" in done.stdout
    assert "experts_per_fact must be at least 1; found 0" in done.stdout

"""The README can be followed: its Python runs, prints what it says, and CI runs its commands."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import exhaustive

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@exhaustive
def test_python_blocks_run_and_print_what_the_readme_shows(tmp_path):
    """One program out of all blocks, as a reader would run it on a CPU that passes for two."""
    program, shown = [], {}
    for i, (language, text) in enumerate(BLOCKS):
        if language == "python":
            program.append(f"print('<block {i}>')\n{text}")
        elif language == "text" and BLOCKS[i - 1][0] == "python":
            shown[i - 1] = text
    assert len(program) >= 5 and shown
    script = tmp_path / "readme.py"
    script.write_text("\n".join(program))
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiles faster
    run = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    printed = re.split(r"<block (\d+)>\n", run.stdout)[1:]
    printed = dict(zip(map(int, printed[::2]), printed[1::2], strict=True))
    check = doctest.OutputChecker()
    for i, wanted in shown.items():
        same = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert check.check_output(wanted, printed[i], same), (
            f"the README's block\n\n{BLOCKS[i][1]}\nshows\n\n{wanted}\nbut prints\n\n{printed[i]}"
        )


def test_ci_runs_the_commands_that_the_readme_gives():
    commands = "\n".join(text for language, text in BLOCKS if language == "sh")
    script = (ROOT / ".ci" / "run").read_text()
    wanted = re.findall(r"\.venv/bin/(python examples/\w+\.py|pytest)", commands)
    assert {"python examples/digits.py", "pytest"} <= set(wanted)
    for command in wanted:
        assert re.search(rf"^ *{re.escape(command)}$", script, re.MULTILINE), command


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_files_that_a_page_names_exist(page):
    """Links, pictures, and paths in code; a path may hold a *."""
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    named = [x for x in links if "://" not in x]
    named += re.findall(r"(?<![\w/.])(?:fnn|tests|examples|benchmarks|docs|\.ci)/[\w./*-]*", text)
    assert named
    assert not [x for x in named if not list(ROOT.glob(x.rstrip("./")))]

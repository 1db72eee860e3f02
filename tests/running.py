"""Examples are run as a reader would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, folder: Path) -> str:
    """What an example prints, run as a reader would: without our tests' settings."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_a_picture(path: Path) -> bool:
    """Whether a file is an image that isn't blank."""
    from matplotlib.image import imread

    pixels = imread(path)
    return pixels.shape[0] > 100 and pixels.shape[1] > 100 and pixels[..., :3].std() > 0.05

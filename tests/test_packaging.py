"""The wheel holds kvpipe, all of it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("kvcache", "data", "pipeline", "cli")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "stores", "runs", "reports")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy: setuptools would leave, and take in, a `build` folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(root, folder / "source", ignore=LEFT_OUT)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def packaged(root: Path, pattern: str) -> set[str]:
    files = (path for package in PACKAGES for path in (root / package).rglob(pattern))
    return {f"kvpipe/{path.relative_to(root).as_posix()}" for path in files}


def test_only_kvpipe_is_installed(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (dist_info,) = tops - {"kvpipe"}
    assert dist_info.startswith("kvpipe-")
    assert dist_info.endswith(".dist-info")
    assert not [name for name in wheel.namelist() if "test" in Path(name).name or "benchmark" in name]


def test_every_source_is_in_it(wheel: zipfile.ZipFile, root: Path) -> None:
    sources = {name for name in wheel.namelist() if name.endswith(".py")}
    assert sources == packaged(root, "*.py")


def test_built_in_models_and_templates_are_in_it(wheel: zipfile.ZipFile, root: Path) -> None:
    data = {name for name in wheel.namelist() if name.startswith("kvpipe/") and not name.endswith(".py")}
    expected = packaged(root, "*.json") | packaged(root, "*.safetensors") | packaged(root, "*.jinja")
    assert data == expected
    assert "kvpipe/data/builtin/tiny/config.json" in data


def test_the_command_and_the_license_are_in_it(wheel: zipfile.ZipFile, root: Path) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    (license_file,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert wheel.read(entry_points).decode().split() == ["[console_scripts]", "kvpipe", "=", scripts["kvpipe"]]
    assert wheel.read(license_file) == (root / "LICENSE").read_bytes()

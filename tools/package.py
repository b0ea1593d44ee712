"""Builds the sdist and the wheel into dist/, and tries the wheel in a fresh environment: `python -m tools.package`.

The wheel is built from the sdist. It must contain every file of the package, including C++; be imported from where it was installed; be
registered with torch; and train a linear, which compiles that C++. The environment has this one's dependencies, but not this checkout;
with --clean it only has what pip installs for the wheel from the package index, including torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "te_dynamo"
COMPILED_ELSEWHERE = {".pyc", ".so", ".o"}
TRIAL = """
import sys, torch, te_dynamo
assert te_dynamo.__file__.startswith(sys.prefix), te_dynamo.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
report = te_dynamo.explain(model, torch.ones(32, 64), backward=True)
assert report.fp8_flop_fraction == 1, report
call = torch.compile(model, backend="te_fp8")
call(torch.ones(32, 64)).sum().backward()
assert model[0].weight.grad.abs().sum() > 0
print(f"te_dynamo {te_dynamo.__version__} with torch {torch.__version__}: computes in FP8")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of both files (default: dist)")
    parser.add_argument("--clean", action="store_true", help="install torch and all from the package index: a large download")
    arguments = parser.parse_args()
    sdist, wheel = build(arguments.out)
    print(f"{sdist.name} and {wheel.name}: {len(files_of(wheel))} files of the package each")
    with TemporaryDirectory() as folder:
        print(trial(wheel, Path(folder) / "venv", clean=arguments.clean), end="")


def build(out: Path) -> tuple[Path, Path]:
    """Builds the sdist, and the wheel from it. Raises RuntimeError if one of them lacks a file of the package."""
    out.mkdir(parents=True, exist_ok=True)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    sdist = out / said([sys.executable, "-c", code, str(out)], cwd=ROOT).splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "-qq", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist)]
    said(pip, cwd=out)
    (wheel,) = out.glob(f"{sdist.name.removesuffix('.tar.gz')}-*.whl")
    expected = sources()
    for made in (sdist, wheel):
        if missing := expected - files_of(made):
            names = ", ".join(sorted(missing))
            raise RuntimeError(f"{made.name} lacks {names}: name them in pyproject.toml, [tool.setuptools.package-data]")
    return sdist, wheel


def sources() -> set[str]:
    files = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in COMPILED_ELSEWHERE}


def files_of(made: Path) -> set[str]:
    """The package's files in an sdist or a wheel, by their paths from the root."""
    if made.suffix == ".whl":
        with zipfile.ZipFile(made) as wheel:
            names = [info.filename for info in wheel.infolist() if not info.is_dir()]
    else:
        with tarfile.open(made) as sdist:
            names = [member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()]
    return {name for name in names if name.startswith(f"{PACKAGE}/")}


def trial(wheel: Path, folder: Path, *, clean: bool) -> str:
    """Installs a wheel in a new environment, uses it there, and returns the output."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if not clean:  # Python ignores .pth files in folders that a .pth file adds, so an editable install there is not seen
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said([str(python), "-m", "pip", "-qq", "install", *([] if clean else ["--no-deps"]), str(wheel)], cwd=folder)
    return said([str(python), "-c", TRIAL], cwd=folder)


def said(command: list[str], *, cwd: Path) -> str:
    """A command's stdout. Raises RuntimeError, with its output, if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()

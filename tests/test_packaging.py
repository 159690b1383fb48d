import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import modeling_piip


ROOT = Path(__file__).parents[1]
# What the training scripts share may need the `train` extra; every other module works with the base list.
TRAINING_MODULES = ("data", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy, because setuptools leaves a build folder beside setup.py.
    source = tmp_path_factory.mktemp("source")
    for folder in ("modeling_piip", "configuration", "hub_cards"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
    ]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next((source / "dist").glob("piip_transformers-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def base_requirements(installed: Path) -> list[Requirement]:
    metadata = next(installed.glob("piip_transformers-*.dist-info")) / "METADATA"
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [requirement for requirement in map(Requirement, lines) if requirement.marker is None]


def link_distributions(folder: Path, requirements: list[Requirement]) -> None:
    """Fill `folder` with links to the installed distributions that `requirements` bring, and to no others."""
    pending, seen = list(requirements), set()
    while pending:
        requirement = pending.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        required = distribution(requirement.name)
        for top in {file.parts[0] for file in required.files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(required.locate_file(top))
        extras = {"", *requirement.extras}
        pending += [
            needed
            for needed in map(Requirement, required.requires or [])
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
        ]


def test_wheel_holds_the_package_the_variants_and_their_cards_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"modeling_piip/{path.name}" for path in (ROOT / "modeling_piip").glob("*.py")}
    variants = {f"modeling_piip/{path.relative_to(ROOT)}" for path in (ROOT / "configuration").glob("*/*.json")}
    assert any(name.endswith("/config.json") for name in variants)
    cards = {f"modeling_piip/{path.relative_to(ROOT)}" for path in (ROOT / "hub_cards").glob("*.md")}
    assert len(cards) == len(list((ROOT / "configuration").glob("*/config.json")))
    assert files == modules | variants | cards


def test_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name.split("-")[1] == modeling_piip.__version__


def test_wheel_works_with_the_base_requirements_alone(installed, tmp_path):
    link_distributions(tmp_path, base_requirements(installed))
    modules = [path.stem for path in (ROOT / "modeling_piip").glob("[!_]*.py")]
    modules = [module for module in modules if not module.startswith(TRAINING_MODULES)]
    program = f"""
import importlib, importlib.util, json, sys
sys.path[:0] = {[str(installed), str(tmp_path)]}
for name in {sorted(modules)}:
    importlib.import_module("modeling_piip." + name)
extras = [name for name in ("accelerate", "datasets", "scipy", "pytest") if importlib.util.find_spec(name)]
import modeling_piip
from modeling_piip.model_cards import read_variant_card
variants = modeling_piip.PiipConfig.list_variants()
for variant in variants:
    read_variant_card(variant)
print(json.dumps([extras, variants, modeling_piip.__file__]))
"""
    # -I -S: no site-packages and no current folder, so nothing but the standard library and the two folders above.
    result = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    extras, variants, file = json.loads(result.stdout.splitlines()[-1])
    assert extras == []
    assert variants == sorted(path.name for path in (ROOT / "configuration").iterdir() if path.is_dir())
    assert Path(file).is_relative_to(installed)


def test_oldest_versions_are_the_ones_that_the_makefile_installs(installed):
    promised = {
        requirement.name: Version(bound.version)
        for requirement in base_requirements(installed)
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    pins = re.search(r"^OLDEST = (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    tested = dict(pin.removesuffix(".*").split("==") for pin in pins.replace('"', "").split())
    assert {name: Version(version) for name, version in tested.items()} == promised

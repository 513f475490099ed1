"""The lists of scripts/pack_offline.sh are complete: a new dependency has to be added to them."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "scripts" / "pack_offline.sh").read_text()
MACHINE = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux"}
MACHINE |= {"platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
MACHINE |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def listed(name: str) -> set[str]:
    """The packages of a variable of the script."""
    words = re.search(rf'^{name}="([^"]*)"', SCRIPT, re.MULTILINE)[1].split()
    assert len(words) == len({canonicalize_name(word) for word in words})
    return {canonicalize_name(word) for word in words}


PACKED, PROVIDED = listed("PACKED"), listed("PROVIDED")


def project() -> dict[str, Requirement]:
    """The dependencies of the project and of its extra quantize."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*table["dependencies"], *table["optional-dependencies"]["quantize"]]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def needed_by(package: str) -> set[str]:
    """Direct dependencies of an installed package on the GPU machine, without extras."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return set()  # torchao is an optional package, and depends on nothing
    found = (Requirement(line) for line in lines)
    return {
        canonicalize_name(requirement.name)
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate(MACHINE)
    }


def test_every_dependency_is_packed_or_provided():
    assert not PACKED & PROVIDED
    assert not set(project()) - PACKED - PROVIDED
    assert set(project()) >= PROVIDED


def test_dependencies_of_packed_packages_are_packed_or_provided():
    """A provided package brings its own dependencies."""
    missing = {
        f"{package} needs {name}"
        for package in PACKED
        for name in needed_by(package) - PACKED - PROVIDED
    }
    brought, queue = set(), list(PROVIDED)
    while queue:
        for name in needed_by(queue.pop()) - brought:
            brought.add(name)
            queue.append(name)
    assert not {text for text in missing if text.split()[-1] not in brought}


def test_nothing_else_is_packed():
    """Every packed package is a dependency of the project, direct or not."""
    reached, queue = set(), list(project())
    while queue:
        package = queue.pop()
        if package not in reached:
            reached.add(package)
            queue += needed_by(package)
    assert not PACKED - reached


@pytest.mark.parametrize(("package", "version"), [("torch", "2.11.0"), ("transformers", "5.17.0")])
def test_the_bounds_allow_the_provided_versions(package, version):
    assert version in project()[package].specifier


def test_packed_versions_are_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    assert not PACKED - pinned

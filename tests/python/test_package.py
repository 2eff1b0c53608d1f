"""The package as installed: one version everywhere."""

import json
from importlib.metadata import requires, version
from pathlib import Path

import polybus

ROOT = Path(__file__).parents[2]


def test_one_version_in_all_languages() -> None:
    assert polybus.__version__ == version("polybus") == json.loads((ROOT / "package.json").read_text())["version"]


def test_no_runtime_dependencies() -> None:
    assert not requires("polybus")
    package = json.loads((ROOT / "package.json").read_text())
    assert not package.get("dependencies")
    optional = package.get("peerDependenciesMeta", {})
    assert all(optional[name]["optional"] for name in package.get("peerDependencies", {}))


def test_marked_as_typed() -> None:
    assert Path(polybus.__file__).with_name("py.typed").exists()

"""Where the manifests come from: deploy/built as it is committed, and the scripts that make it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.deploy.manifests import Manifests

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def built(*names: str) -> Manifests:
    """Of deploy/built, together; needs no kubectl."""
    texts = [(DEPLOY / f"built/{name}.yaml").read_text("utf-8") for name in names]
    return Manifests.parse("\n---\n".join(texts))

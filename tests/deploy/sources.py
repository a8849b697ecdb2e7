"""Access to deploy/built and to the modules of scripts/."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.deploy.manifests import Manifests

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def script(name: str) -> ModuleType:
    """Imports a file of scripts/ as a module; it may have no suffix."""
    (path,) = [p for p in (ROOT / "scripts").iterdir() if p.is_file() and p.stem == name]
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def built(*names: str) -> Manifests:
    """Committed overlays of deploy/built, combined."""
    texts = [(DEPLOY / f"built/{name}.yaml").read_text("utf-8") for name in names]
    return Manifests.parse("\n---\n".join(texts))

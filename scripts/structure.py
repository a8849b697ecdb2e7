"""Prints how the code is divided: modules, packages, imports between them, cycles, small files.

    python scripts/structure.py [ROOT]      ROOT: the checkout to count; default: this one

Reads syntax trees; imports nothing of the project. A *package* here is one of the first two levels
(`outrider.engine`, `orchestrator.replicas`), or a module directly under a top-level package. A
*dependency* is at least one import between two packages. Generated code and tests are not counted.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SERVING = ("outrider", "draft_service", "target_service", "orchestrator")
TOOLS = ("outrider_bench",)
SMALL_LINES = 40
# Modules that users or operators start. A serving module that none of them imports is unused.
ENTRY_POINTS = (
    "draft_service.__main__", "target_service.__main__", "orchestrator.__main__",
    "outrider.__main__", "outrider.cli", "outrider.client", "outrider.sampling.formulas",
)  # fmt: skip

Graph = dict[str, set[str]]


class Code:
    """The modules of a checkout by dotted name, with their files and imports."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, Path] = {}
        for package in (*SERVING, *TOOLS):
            for path in sorted((root / package).rglob("*.py")):
                if "v1" not in path.relative_to(root).parts:
                    self.files[_name(path.relative_to(root))] = path
        self.imports: Graph = {name: self._imports_of(name) for name in self.files}

    def num_lines(self, name: str) -> int:
        return len(self.files[name].read_text("utf-8").splitlines())

    def _imports_of(self, name: str) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(ast.parse(self.files[name].read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inner & self.files.keys() or {node.module}
        return (found & self.files.keys()) - {name}

    def dependencies(self) -> Graph:
        """Each package and the packages that it imports."""
        graph: Graph = {package(name): set() for name in self.files}
        for name, imported in self.imports.items():
            graph[package(name)] |= {package(other) for other in imported} - {package(name)}
        return graph

    def importers(self) -> Graph:
        graph: Graph = defaultdict(set)
        for name, imported in self.imports.items():
            for other in imported:
                graph[other].add(name)
        return graph

    def unused(self) -> list[str]:
        """Modules of the serving packages that no entry point imports, directly or not."""
        reached: set[str] = set()
        ahead = [name for name in ENTRY_POINTS if name in self.files]
        while ahead:
            name = ahead.pop()
            if name not in reached:
                reached.add(name)
                ahead += self.imports[name]
                parts = name.split(".")
                ahead += [
                    p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in self.files
                ]
        serving = (name for name in self.files if name.partition(".")[0] in SERVING)
        return sorted(name for name in serving if name not in reached)


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def cycle_of(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def num_layers(graph: Graph) -> int:
    """Packages on the longest chain of dependencies."""
    depth: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        depth[name] = 1 + max((depth[other] for other in graph[name]), default=0)
    return max(depth.values(), default=0)


def main(root: Path) -> None:
    code = Code(root)
    graph, importers = code.dependencies(), code.importers()
    lines = {name: code.num_lines(name) for name in code.files}
    inner = [
        name for name in code.files if code.files[name].name not in ("__init__.py", "__main__.py")
    ]
    small = [name for name in inner if lines[name] <= SMALL_LINES]
    tools = sum(n for name, n in lines.items() if name.partition(".")[0] in TOOLS)
    print(f"modules                                    {len(code.files)}")
    print(f"lines                                      {sum(lines.values())}")
    print(f"  of which in outrider_bench               {tools}")
    print(
        f"median lines of a module                   {statistics.median(map(lines.get, inner)):.0f}"
    )  # type: ignore[arg-type]
    print(f"modules of at most {SMALL_LINES} lines              {len(small)}")
    print(f"packages                                   {len(graph)}")
    print(f"dependencies between packages              {sum(map(len, graph.values()))}")
    cycle = cycle_of(graph)
    print(f"cycle of packages                          {' > '.join(cycle) or 'none'}")
    if not cycle:
        print(f"layers                                     {num_layers(graph)}")
    unused = code.unused()
    print(f"unused modules of the services             {len(unused)}")
    for name in unused:
        print(f"  {name} ({lines[name]} lines)")
    print("small modules with one importer:")
    for name in small:
        if len(importers[name]) == 1:
            print(f"  {name} ({lines[name]} lines) for {next(iter(importers[name]))}")
    for top in (*SERVING, *TOOLS):
        own = {name: others for name, others in graph.items() if name.partition(".")[0] == top}
        inner_edges = sum(len([o for o in others if o in own]) for others in own.values())
        print(f"{top:16} {len(own):3} packages, {inner_edges:3} dependencies among them")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)

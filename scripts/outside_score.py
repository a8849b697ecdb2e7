"""Evaluates the quickstart pair with `lm-eval` over HTTP, with drafts and without, and compares.

    .venv/bin/python scripts/outside_score.py --lm-eval L/bin/lm_eval

Two tasks made of CPython's standard library: which line follows, by log-likelihood (`echo` with
`logprobs`), and generated text. Compares scores, and each document's log-likelihoods and text; exit
status 1 if a score differs. About a minute. `lm-eval` has a virtual environment of its own
(docs/how-to/measure.md) and needs no network.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import inspect
import json
import random
import tempfile
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outside_tools import MODEL, run, running, version

from outrider.cli.stack_options import StackOptions
from outrider.quickstart_pair import TARGET_PATH


def examples(num: int) -> Iterator[tuple[str, list[str]]]:
    """Beginnings of functions of CPython's standard library, and the lines that follow."""
    paths = sorted(Path(inspect.getfile(textwrap)).parent.glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        source = path.read_text(errors="replace")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            lines = textwrap.dedent(
                "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            )
            head, rest = lines.splitlines()[:6], lines.splitlines()[6:]
            if len(rest) < 2 or not rest[0].strip() or len(lines) > 1_500:
                continue
            yield "\n".join(head) + "\n", rest
            num -= 1
            if not num:
                return


TASKS: dict[str, dict[str, Any]] = {
    "next_line_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{head}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "next_lines_generated": {
        "output_type": "generate_until",
        "doc_to_text": "{{head}}",
        "doc_to_target": "{{next}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64},
        "metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, num: int) -> None:
    """Two tasks of `lm-eval`: the true next line among four, and text that is generated."""
    rng, found = random.Random(1), list(examples(num))
    documents = []
    for head, rest in found:
        others = rng.sample([other[0] for _, other in found if other[0] != rest[0]], 3)
        choices = [rest[0], *others]
        rng.shuffle(choices)
        documents.append({
            "head": head, "choices": choices, "label": choices.index(rest[0]),
            "next": "\n".join(rest[:4]),
        })  # fmt: skip
    data = folder / "functions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        common = {
            "task": name, "dataset_path": "json", "test_split": "train",
            "dataset_kwargs": {"data_files": str(data)},
        }  # fmt: skip
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))


def lm_eval(program: str, url: str, tasks: Path, out: Path, concurrency: int) -> list[str]:
    model = (
        f"model={MODEL},base_url={url}/v1/completions,tokenizer={TARGET_PATH},"
        f"num_concurrent={concurrency}"
    )
    return [
        program, "--model", "local-completions", "--model_args", model,
        "--include_path", str(tasks), "--tasks", ",".join(TASKS),
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip


def scores(out: Path) -> dict[str, float]:
    """Each task's metrics, without their standard errors."""
    (path,) = out.glob("*/results_*.json")
    found = {}
    for task, metrics in json.loads(path.read_text())["results"].items():
        for name, value in metrics.items():
            if name.endswith(",none") and "stderr" not in name:
                found[f"{task} {name.removesuffix(',none')}"] = value
    return found


def samples(out: Path) -> dict[tuple[str, int], Any]:
    """Each document's log-likelihoods or text, by task and number."""
    found = {}
    for task in TASKS:
        (path,) = out.glob(f"*/samples_{task}_*.jsonl")
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[task, sample["doc_id"]] = sample["resps"]
    return found


def counted(url: str) -> dict[str, float]:
    """Counters of the orchestrator: requests, and draft tokens that were verified and accepted."""
    names = {
        "requests": "outrider_requests_total",
        "draft_tokens": "outrider_spec_decode_num_draft_tokens_total",
        "accepted": "outrider_spec_decode_num_accepted_tokens_total",
    }
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {
        key: sum(float(line.split()[-1]) for line in lines if line.startswith(name))
        for key, name in names.items()
    }


async def evaluate(args: argparse.Namespace) -> None:
    print(json.dumps({"lm_eval": version(args.lm_eval, "lm_eval")}))
    found: dict[str, tuple[dict[str, float], dict[tuple[str, int], Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), args.documents)
        for name in ("with", "without"):
            options = StackOptions(
                inflate="0", port=0, http_port="0", log_dir=args.out / "logs",
                draft=None if name == "with" else "none", gamma=None if name == "with" else 0,
            )  # fmt: skip
            async with running(options) as url:
                out = args.out / name
                await run(lm_eval(args.lm_eval, url, Path(folder), out, args.concurrency), out)
                found[name] = scores(out), samples(out)
                print(json.dumps({"drafts": name, **found[name][0], **counted(url)}), flush=True)
    (score, ours), (other_score, others) = found["with"], found["without"]
    differ = [key for key in ours if ours[key] != others[key]]
    print(json.dumps({
        "same_scores": score == other_score, "documents": len(ours), "differ": len(differ),
    }))  # fmt: skip
    for key in differ[:5]:
        print(key, ours[key], others[key])
    if score != other_score:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm-eval", required=True, help="the program lm_eval")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench-results/outside-score"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    asyncio.run(evaluate(args))


if __name__ == "__main__":
    main()

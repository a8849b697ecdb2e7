"""What is replaced in the shown commands, what is not run and why, and what a page supposes.

Replacements are applied in order. A name in braces is a value of `shell.Shell`, which also replaces
the pages' ports by free ones.
"""

from __future__ import annotations

import re

from tests.shown.blocks import Command

EXAMPLES = "a program of examples/: tests/cli/test_examples.py runs it"
OUTSIDE = "installs a large package; scripts/outside_tools.py runs it"
CLUSTER = "needs a cluster; tests/deploy checks the manifests, `make pods` runs them"

# The revision of the new draft on swap-a-draft.md.
REVISION = "99553a5a9eef"

# Page (part of its path), pattern, reason.
NOT_RUN = (
    ("", r"^make test\b", "runs every test, this one too"),
    ("", r"^(docker|kind) ", "needs images from a registry"),
    ("", r"^kubectl (label|taint|-n outrider (rollout|port-forward|get|logs|exec)|delete)",
     CLUSTER),
    ("", r"^kubectl apply -f deploy/base/namespace\.yaml$", CLUSTER),
    ("deploy.md", r"--from-file=token=/path/to/token", "needs a token of the Hub"),
    ("deploy.md", r"^export OUTRIDER_API_KEY=…|--tls-ca ca\.crt$", CLUSTER),
    ("measure.md", r"^pip install |^(vllm|guidellm|aiperf|lm_eval) ", OUTSIDE),
    ("swap-a-draft.md", r"^kubectl apply -k your-overlay$", CLUSTER),
    ("tensor-parallelism.md", r"--tensor-parallel-address|parallel\.rank",
     "needs two machines; tests/engine/parallel runs it on one"),
    ("use-the-client.md", r"\bimport sys\b|\bimport os\b|\bimport asyncio\b", EXAMPLES),
    ("use-the-client.md", r'"orchestrator-a:50051"|api_key=key\b', "a part of a program"),
)  # fmt: skip

# Page, pattern, replacement: names of models, machines and files; what this machine lacks.
REPLACED = (
    ("", r"outrider/quickstart_pair/(target|draft)\b", "{\\1}"),
    ("", r"\bTARGET\b|/models/(target|8b|70b)\b|meta-llama/Llama-3\.1-8B-Instruct", "{target}"),
    # Training a good draft for seconds makes it worse, and it is not written then.
    ("distill.md", r"--draft DRAFT\b", "--draft {other_draft}"),
    ("", r"\bDRAFT\d?\b|/models/(draft|1b)(?![\w-])|meta-llama/Llama-3\.2-1B-Instruct", "{draft}"),
    ("", r"/models/draft-2\b", "{other_draft}"),
    ("", r"/models/small-of-another-family\b", "{foreign_draft}"),
    ("", r"(?<= )(scripts|deploy|examples)/|^(scripts)/", "{root}/\\1\\2/"),
    ("", r"\.venv/bin/activate", "{bin}/activate"),
    ("", r"/tmp/p1\b", "p1"),
    ("", r"/var/lib/outrider/traffic", "traffic"),
    ("", r"redis://redis:6379/(\d)", "{redis}?db=\\1"),
    ("", r"\b(HOST|gpu|gpu-large|gpu-small|orchestrator|draft|a|b)(?=:\d)", "127.0.0.1"),
    ("", r"\bmy-host\.example\b", "localhost"),
    ("", r"--host 0\.0\.0\.0", "--host 127.0.0.1"),
    ("", r"(--\S*device) cuda(:\d)?", "\\1 cpu"),
    ("", r"--dtype bfloat16", "--dtype float32"),
    ("", r"--model …", "--model {target}"),
    ("", r"^(python -m .*?) …", "\\1"),
    # Instead of applying manifests to a cluster, the same files are built.
    ("", r"kubectl apply -k (\S+)", "kubectl kustomize \\1"),
    ("deploy.md", r"\| kubectl -n outrider apply -f -", "> secret.yaml"),
    ("measure.md", r"kubectl delete pod target-0", "true"),
    ("swap-a-draft.md", REVISION, "{revision}"),
    ("swap-a-draft.md", r"^(?=outrider drafts promote)",
     "until outrider drafts list | grep -q canary; do sleep 1; done; "),
    ("observe.md", r"^outrider top .*", "outrider top --once {metrics}"),
    # Shorter, so that all pages take minutes. What is measured is meaningless then.
    # The shown counters are of targets that were asked for tokens.
    ("share-a-draft-tier.md", r"^curl ", "outrider generate x --gamma 4 --max-tokens 40 && "
     "outrider generate x --gamma 4 --max-tokens 40 --endpoint 127.0.0.1:50061 && curl "),
    ("", r"^make demo$", "outrider demo --inflate 0 --rounds 1 --max-tokens 16 --seconds 5"),
    ("", r"--size p1\b", "--size tiny"),
    ("", r"--attain 0.99", "--attain 0.1"),
    ("", r"--generations 200", "--generations 20"),
    ("", r"--every 60", "--every 2"),
)  # fmt: skip
# Page, start of a command, flags that it gets: defaults that are other ports and folders here, and
# again less work.
ADDED = (
    ("", "python -m orchestrator(?!.*--target-endpoint)",
     "--target-endpoint 127.0.0.1:50052 --draft-endpoint 127.0.0.1:50053"),
    ("", "python -m orchestrator(?!.*--redis-url)", "--redis-url {redis}?db=0"),
    ("", "python -m orchestrator(?!.*--tokenizer)", "--tokenizer {target}"),
    ("", "python -m (target|draft)_service", "--kv-cache-tokens 8192 --calibration-s 0.5"),
    ("share-a-draft-tier.md", "python -m draft_service", "--metrics-port 9100"),
    ("swap-a-draft.md", ".*outrider drafts (roll-back|retry|promote)", "--redis-url {redis}?db=0"),
    ("deploy.md", "kubectl .*create secret ", "--dry-run=client -o yaml"),
    ("", "outrider up", "--kv-cache-tokens 8192"),
    ("", "outrider up(?! .*--(target|inflate) )", "--inflate 0"),
    ("", r"outrider check (.*DRAFT3|.*--streams|.*--json)", "--files-only"),
    ("", "outrider check", "--task code --max-tokens 8 --temperatures 0 --streams 1"),
    ("", "outrider check", "--repetitions 0"),
    ("", "outrider bench (?!serve|pair)", "--quick"),
    ("", "outrider bench serve", "--warm-up 1 --repetitions 1"),
    ("", "outrider bench serve(?!.*--trace)", "--requests 4 --output-len 8"),
    ("", "outrider bench serve .*--sweep", "--precision 1"),
    ("measure.md", "outrider chaos --faults", "--simulate --gap 0.3 --longest 0.5"),
    ("measure.md", "outrider chaos --endpoint", "--generations 20 --max-tokens 32"),
    ("distill.md", "outrider distill", "--samples 16 --max-tokens 16 --steps 12 --batch 8"),
)  # fmt: skip

# Started once for all pages: a system that clients use. In the pages' own words.
SYSTEM = (
    "python -m target_service --model /models/target --port 50052",
    "python -m draft_service --model /models/draft --port 50053",
    "python -m orchestrator --http-port 8000 --served-model-name quickstart",
)
_CSV = "TIMESTAMP,ContextTokens,GeneratedTokens"
_CHAT = (
    '[{"id": "a", "conversations": [{"from": "human", "value": "read a file"},'
    ' {"from": "gpt", "value": "with open(path) as file:"}]}]'
)
# Page (part of its path): what it supposes.
SUPPOSED: dict[str, tuple[str, ...]] = {
    "chat.md": ("cp {target}/chat_template.jinja chat.jinja",),
    "distill.md": (
        "printf 'import os\\nimport re\\ndef f(x):\\nclass A:\\nfor i in\\n' > prompts.txt",
        """printf '"import os"\\n"import re"\\n"def f(x):"\\n"class A:"\\n' > prompts.jsonl""",
    ),
    "measure.md": (
        f"printf '{_CSV}\\n2023-11-16 18:15:46.6805900,20,4\\n2023-11-16 18:15:50.9951690,9,3\\n'"
        " > requests.csv",
        f"echo '{_CHAT}' > sharegpt.json",
    ),
    "prompt-lookup.md": ("cat {root}/outrider/errors.py | head -20 > prompt.txt",),
    "structured-output.md": ("""echo '{"not": {}}' > bad.json""",),
    "swap-a-draft.md": (
        "python -m target_service --model /models/target --redis-url redis://redis:6379/0",
        "python -m draft_service --model /models/draft --port 50054 --redis-url redis://redis:6379/0",
        "python -m orchestrator --target-endpoint registry --draft-endpoint registry",
    ),
}  # fmt: skip

# Outputs of a prompt that the page does not show: only their statistics are compared.
OTHER_TEXT = (("prompt-lookup.md", r"< prompt\.txt$"),)

# Exit statuses that are an answer too: not worth it, an alarm.
STATUSES = ((r"^outrider check ", (0, 3)), (r"^outrider audit", (0, 1)))


def reason_not_run(command: Command) -> str | None:
    """Why the command is not run; None: it is."""
    return next(
        (why for page, pattern, why in NOT_RUN
         if page in command.page and re.search(pattern, command.text)), None
    )  # fmt: skip


def replaced(command: Command, values: dict[str, str]) -> str:
    """Text of the command as it is run."""
    text = command.text
    for page, pattern, replacement in REPLACED:
        if page in command.page:
            text = re.sub(pattern, replacement, text)
    for page, start, flags in ADDED:
        if page in command.page and re.match(start, command.text):
            text = f"{text} {flags}"
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), text)


def statuses(command: Command) -> tuple[int, ...]:
    """Exit statuses that the page lets a reader expect."""
    if command.output.startswith("error: "):
        return (1,)
    return next((found for pattern, found in STATUSES if re.search(pattern, command.text)), (0,))


def compared_output(command: Command) -> str:
    """The shown output without text that depends on what the page does not show."""
    if any(
        page in command.page and re.search(pattern, command.text) for page, pattern in OTHER_TEXT
    ):
        return "".join(command.output.partition("finish ")[1:])
    return command.output

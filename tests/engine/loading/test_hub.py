"""Models of the Hugging Face Hub: pinned revisions, and no code from their repositories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from outrider.engine import EngineOptions, load_engine
from outrider.errors import ConfigError, ModelError
from outrider.model_server.load_engine import load_served_engine
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.tokenizer import Tokenizer
from tests.services.tokenizer_files import write_tokenizer
from tests.tiny_models import make_tiny_model

NAME = "acme/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A cache that has two revisions of a model; the Hub is not asked. Their directories."""
    cache = tmp_path / "hub"
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    snapshots = {}
    for seed, (ref, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / ref).write_text(commit)
        snapshots[ref] = repository / "snapshots" / commit
        make_tiny_model("llama", snapshots[ref], seed=seed, vocab_size=280)
        write_tokenizer(snapshots[ref], corpus="the quick fox" if seed else "a slow bear")
    (snapshots["v1"] / "generation_config.json").write_text('{"top_k": 7}')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshots


@pytest.mark.parametrize("config", [TargetConfig, DraftConfig])
def test_a_service_loads_the_pinned_revision(
    config: type[TargetConfig | DraftConfig], hub: dict[str, Path]
) -> None:
    """Weights, tokenizer and sampling defaults."""
    tokenizers = {ref: Tokenizer.load(str(path)) for ref, path in hub.items()}
    weights = {ref: load_engine(EngineOptions(str(path))).info for ref, path in hub.items()}
    for revision, expected in (("v1", "v1"), (COMMITS["v1"], "v1"), (None, "main")):
        served = load_served_engine(config(model=NAME, revision=revision, kv_cache_tokens=256))
        model, tokenizer = served.model, tokenizers[expected]
        assert tokenizer is not None
        assert model.model_fingerprint == weights[expected].model_fingerprint
        assert model.tokenizer_fingerprint == tokenizer.fingerprint
        assert model.sampling_defaults.top_k == (7 if expected == "v1" else 0)
        assert model.name == (NAME if revision is None else f"{NAME}@{revision}")
    assert weights["v1"].model_fingerprint != weights["main"].model_fingerprint


def test_every_name_may_have_a_revision(hub: dict[str, Path]) -> None:
    pinned, other = Tokenizer.load(f"{NAME}@v1"), Tokenizer.load(NAME)
    assert pinned is not None
    assert other is not None
    assert pinned.fingerprint != other.fingerprint


def test_an_unknown_revision_is_refused(hub: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=f"{NAME}@v9: cannot load its configuration"):
        load_engine(EngineOptions(f"{NAME}@v9"))
    with pytest.raises(ConfigError, match=f"'{NAME}@v9' .* not in the Hub's cache"):
        Tokenizer.load(f"{NAME}@v9")


def test_a_directory_has_no_revision(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = model_dir("llama")
    why = f"revision: {path} is a local directory; only models on the .* Hub have revisions"
    with pytest.raises(ConfigError, match=why):
        load_served_engine(TargetConfig(model=str(path), revision="v1"))
    with_at = tmp_path / "m@v1"
    shutil.copytree(path, with_at)
    assert load_engine(EngineOptions(str(with_at), kv_cache_tokens=256)).info.name == str(with_at)


@pytest.mark.parametrize(
    ("model", "revision", "why"),
    [
        (NAME, "", "revision: is empty; give a branch, a tag or a commit"),
        (f"{NAME}@v1", "v2", "revision: given twice, v1 and v2"),
        (f"{NAME}@", None, "revision: empty in 'acme/tiny@'"),
    ],
)
def test_an_unusable_revision_is_refused(model: str, revision: str | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_served_engine(TargetConfig(model=model, revision=revision))


CODE = "from pathlib import Path\nPath({path!r}).touch()\nclass AcmeConfig: pass\n"


@pytest.mark.parametrize(
    ("model_type", "entry"),
    [("acme", "AutoConfig"), ("acme", "AutoModelForCausalLM"), ("clip", "AutoModelForCausalLM")],
)
def test_a_model_that_needs_its_own_code_is_refused(
    model_type: str, entry: str, tmp_path: Path
) -> None:
    """By name, and the code does not run."""
    code = f"{entry.lower()}_acme.AcmeConfig"
    fields = {"model_type": model_type, "auto_map": {entry: code}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ran = tmp_path / "ran"
    (tmp_path / f"{entry.lower()}_acme.py").write_text(CODE.format(path=str(ran)))
    why = f"{tmp_path}: {model_type} is computed by code in the model's repository .{code}.; "
    with pytest.raises(ModelError, match=why + "trust_remote_code is off"):
        load_engine(EngineOptions(str(tmp_path)))
    assert not ran.exists()


def test_code_is_not_used_where_transformers_has_the_model(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in Phi-3's repositories."""
    path = tmp_path / "m"
    shutil.copytree(model_dir("llama"), path)
    config = json.loads((path / "config.json").read_text())
    code = {"AutoConfig": "code.AcmeConfig", "AutoModelForCausalLM": "code.AcmeModel"}
    (path / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    (path / "code.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    assert load_engine(EngineOptions(str(path), kv_cache_tokens=256)).info.architecture == "llama"
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    settings = {
        "tokenizer_class": "AcmeTokenizer",
        "auto_map": {"AutoTokenizer": ["code.AcmeTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "code.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path} cannot be converted"):
        Tokenizer.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()

"""Settings from flags, environment and defaults; every error names its setting."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.cli.stack_options import StackOptions, private_stack
from outrider.errors import ConfigError
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig


def _target(argv: list[str] | None = None, environ: dict[str, str] | None = None) -> TargetConfig:
    return load(TargetConfig, "target", ["--model", "m", *(argv or [])], environ or {})


def _orchestrator(
    argv: list[str] | None = None, environ: dict[str, str] | None = None
) -> OrchestratorConfig:
    return load(OrchestratorConfig, "orchestrator", argv or [], environ or {})


def test_defaults() -> None:
    """Without flags and variables: the defaults of the dataclass."""
    assert _target() == TargetConfig(model="m")
    assert load(DraftConfig, "draft", ["--model", "d"], {}) == DraftConfig(model="d")
    assert _orchestrator() == OrchestratorConfig()


def test_flags_over_environment_over_defaults() -> None:
    """For each setting the first source wins."""
    environ = {"OUTRIDER_TARGET_PORT": "1", "OUTRIDER_TARGET_HOST": "0.0.0.0"}
    config = _target(["--port", "2"], environ)
    assert (config.port, config.host, config.max_gamma) == (2, "0.0.0.0", 16)


def test_variables_of_other_programs_are_ignored() -> None:
    environ = {"OUTRIDER_DRAFT_NONSENSE": "1", "PATH": "/bin", "OUTRIDER_DRAFT_PORT": "9"}
    assert _target([], environ) == TargetConfig(model="m")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--max-gam", "3"], "--max-gam"),  # no abbreviations
        (["stray"], "stray"),
        (["--port"], "--port"),
        (["--port", "many"], "port"),
        (["--port", "1.5"], "port"),
        (["--port", "-1"], "port"),
        (["--port", "65536"], "port"),
        (["--idle-session-ttl-s", "soon"], "idle_session_ttl_s"),
        (["--kv-cache-tokens", "lots"], "kv_cache_tokens"),
        (["--kv-cache-tokens", "15"], "kv_cache_tokens"),
        (["--max-gamma", "0"], "max_gamma"),
        (["--max-step-tokens", "0"], "max_step_tokens"),
        (["--advertise", "nowhere"], "advertise"),
        (["--advertise", "host:0"], "advertise"),
        (["--stuck-after-s", "0"], "stuck_after_s"),
        (["--stuck-exit-s", "0"], "stuck_exit_s"),
        (["--stop-grace-s", "-1"], "stop_grace_s"),
        (["--prepack=yes"], "--prepack"),
    ],
)
def test_a_bad_flag_is_named(argv: list[str], named: str) -> None:
    """ConfigError, not SystemExit; its text has the flag or setting."""
    with pytest.raises(ConfigError, match=named):
        _target(argv)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OUTRIDER_TARGET_BOGUS", "1"),
        ("OUTRIDER_TARGET_PORT", "many"),
        ("OUTRIDER_TARGET_PORT", ""),
        ("OUTRIDER_TARGET_PREPACK", "perhaps"),
        ("OUTRIDER_TARGET_NUM_THREADS", "two"),
        ("OUTRIDER_TARGET_IDLE_SESSION_TTL_S", "soon"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    """Errors of unknown variables and bad values have the variable's name."""
    with pytest.raises(ConfigError, match=name):
        _target([], {name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"port": 70000},
        {"target_endpoint": ""},
        {"gamma": 17},
        {"gamma": -1},
        {"max_gamma": -1},
        {"lookahead": -1},
        {"lookahead": 5},
        {"fan_out": 0},
        {"fan_out": 65},
        {"draft_wait_ms": -1.0},
        {"default_max_tokens": 0},
        {"max_generations": 0},
        {"session_ttl_s": 0.0},
        {"session_ttl_s": float("nan")},
        {"verify_timeout_s": 0.0},
        {"target_wait_s": -1.0},
        {"stop_grace_s": -1.0},
        {"durability": "sometimes"},
        {"without_redis": "pray"},
        {"traffic_dir": ""},
        {"traffic_share": 0.0},
        {"traffic_share": 1.5},
        {"traffic_top_tokens": 21},
        {"traffic_max_mb": 1},
        {"traffic_max_age_h": 0.0},
        {"audit_share": 1.5},
        {"audit_tolerance": -1.0},
        {"audit_false_alarm_probability": 0.0},
        {"audit_planted_bias": 0.1},
    ],
)
def test_settings_out_of_range_are_named(given: dict[str, Any]) -> None:
    """Also when the dataclass is constructed directly."""
    (name,) = given
    with pytest.raises(ConfigError, match=name):
        OrchestratorConfig(**given)


@pytest.mark.parametrize(("kind", "program"), [(TargetConfig, "target"), (DraftConfig, "draft")])
def test_a_model_is_required(kind: type[Any], program: str) -> None:
    """The model services have no default model."""
    with pytest.raises(ConfigError, match="model"):
        load(kind, program, [], {})


@pytest.mark.parametrize(
    "flag", ["--dtype=float32", "--device=cpu", "--num-threads=2", "--no-prepack", "--model=m"]
)
def test_a_simulation_has_no_model(flag: str) -> None:
    with pytest.raises(ConfigError, match="simulate"):
        load(TargetConfig, "target", ["--simulate=step_ms=1", flag], {})


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [("a:1", ("a:1",)), ("a:1, b:2,", ("a:1", "b:2")), ("registry", ())],
)
def test_endpoints_are_a_list(text: str, endpoints: tuple[str, ...]) -> None:
    config = _orchestrator([f"--target-endpoint={text}", f"--draft-endpoint={text}"])
    assert (config.target_endpoints, config.draft_endpoints) == (endpoints, endpoints)


@pytest.mark.parametrize("port", [0, 65535])
def test_ports_at_the_ends(port: int) -> None:
    """0 picks a free port; 65535 is the highest."""
    assert _target(["--port", str(port)]).port == port


def test_boolean_flags() -> None:
    """`--x` and `--no-x` take precedence over the environment."""
    assert _target(["--log-json", "--no-prepack"]).log_json is True
    assert _target(["--no-prepack"]).prepack is False
    assert _target(["--prepack"], {"OUTRIDER_TARGET_PREPACK": "false"}).prepack is True
    assert _target(["--no-log-json"], {"OUTRIDER_TARGET_LOG_JSON": "1"}).log_json is False


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("TRUE", True), ("0", False), ("False", False)]
)
def test_boolean_variables(text: str, value: bool) -> None:
    """1, true, 0 and false, in any case."""
    assert _target([], {"OUTRIDER_TARGET_LOG_JSON": text}).log_json is value


def test_optional_values() -> None:
    """A value has the field's type; an empty text unsets it, by flag and by variable."""
    assert _target(["--num-threads", "3"]).num_threads == 3
    assert _target(["--device-map", "auto"]).device_map == "auto"
    assert _target(["--num-threads", ""], {"OUTRIDER_TARGET_NUM_THREADS": "3"}).num_threads is None
    assert _orchestrator(["--draft-endpoint", ""]).draft_endpoint is None
    assert _orchestrator([], {"OUTRIDER_ORCHESTRATOR_DRAFT_ENDPOINT": ""}).draft_endpoint is None
    assert _orchestrator(["--draft-wait-ms", "2.5"]).draft_wait_ms == 2.5
    assert _orchestrator().gamma is None
    assert _orchestrator(["--gamma", "0"]).gamma == 0, "no drafts is not the same as unset"
    assert _orchestrator(["--gamma="], {"OUTRIDER_ORCHESTRATOR_GAMMA": "3"}).gamma is None


def test_redis_url_variable() -> None:
    """REDIS_URL, then the program's own variable, then the flag; the last one wins."""
    own = "OUTRIDER_ORCHESTRATOR_REDIS_URL"
    assert _orchestrator([], {"REDIS_URL": "redis://a"}).redis_url == "redis://a"
    both = {"REDIS_URL": "redis://a", own: "redis://b"}
    assert _orchestrator([], both).redis_url == "redis://b"
    assert _orchestrator(["--redis-url", "redis://c"], both).redis_url == "redis://c"


def test_the_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_TARGET_PORT", "1234")
    assert load(TargetConfig, "target", ["--model", "m"]).port == 1234


@pytest.mark.parametrize(
    ("variable", "is_fine"),
    [
        ("OUTRIDER_TARGET_TLS_CERT", False),
        ("OUTRIDER_DRAFT_TLS_CLIENT_CA", False),
        ("OUTRIDER_ORCHESTRATOR_TIER_TLS_CA", False),
        ("OUTRIDER_ORCHESTRATOR_API_KEYS_FILE", False),
        ("OUTRIDER_TARGET_PORT", True),
        ("OUTRIDER_TLS_CA", True),  # a client's own
    ],
)
def test_a_private_system_requires_no_credentials(
    variable: str, is_fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that makes the started services require TLS or keys is refused by name."""
    monkeypatch.setenv(variable, "/some/file")
    if is_fine:
        assert private_stack(StackOptions()).port == 0
        assert private_stack(StackOptions()).http_port == "none"
        return
    with pytest.raises(ConfigError, match=f"^{variable}: "):
        private_stack(StackOptions())


@pytest.mark.parametrize(
    ("kind", "program"),
    [(TargetConfig, "target"), (DraftConfig, "draft"), (OrchestratorConfig, "orchestrator")],
)
def test_help(kind: type[Any], program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` exits with status 0 and shows every flag and variable."""
    with pytest.raises(SystemExit) as caught:
        load(kind, program, ["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    squeezed = "".join(shown.split())
    for name in kind.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"OUTRIDER_{program.upper()}_{name.upper()}" in squeezed
    assert "MISSING" not in shown

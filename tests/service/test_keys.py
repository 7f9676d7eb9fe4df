import json
import re
import tomllib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.cli import main
from service.errors import BadConfiguration, InvalidApiKey
from service.keys import ApiKey, Scope, load_keys, new_key

HASH = "a" * 64


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_new_key_is_known_by_its_entry_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    secret, entry = new_key("ci", [Scope.GENERATE, Scope.METRICS])
    path = tmp_path / "keys.toml"
    path.write_text(entry.to_toml())
    assert secret not in path.read_text()
    assert sha256(secret.encode()).hexdigest() in path.read_text()
    key = load_keys(path, None).identify(f"Bearer {secret}")
    assert key == ApiKey("ci", frozenset({Scope.GENERATE, Scope.METRICS}))


def test_new_keys_differ_and_have_256_bits() -> None:
    made = {new_key("a", [Scope.GENERATE])[0] for _ in range(10)}
    assert len(made) == 10
    assert all(re.fullmatch(r"elastic_[A-Za-z0-9_-]{43}", secret) for secret in made)


def test_new_key_needs_an_id_that_logs_can_hold() -> None:
    with pytest.raises(ValidationError):
        new_key("two\nlines", [Scope.GENERATE])


def test_keys_of_file_and_environment_are_both_known(write_json: Callable[[Any], Path]) -> None:
    first_secret, first = new_key("first", [Scope.GENERATE])
    second_secret, second = new_key("second", [Scope.METRICS])
    keys = load_keys(write_json([first.model_dump()]), json.dumps([second.model_dump()]))
    for secret, key_id in ((first_secret, "first"), (second_secret, "second")):
        key = keys.identify(f"bearer  {secret} ")
        assert key is not None
        assert key.id == key_id


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer elastic_wrong", "Bearer é"])
def test_missing_and_wrong_keys_are_refused(header: str | None) -> None:
    secret, entry = new_key("a", [Scope.GENERATE])
    keys = load_keys(None, json.dumps([entry.model_dump()]))
    for given in (header, f"Bearer {secret}x", f"Bearer {entry.sha256}", secret):
        with pytest.raises(InvalidApiKey):
            keys.identify(given)


def test_without_keys_everybody_may_call() -> None:
    assert load_keys(None, None).identify(None) is None
    assert load_keys(None, None).identify("Bearer none") is None
    assert load_keys(None, None).identify("Bearer ") is None  # as Prometheus sends it with an empty key file


def test_admin_may_do_everything_and_other_keys_only_their_scopes() -> None:
    assert all(ApiKey("a", frozenset({Scope.ADMIN})).allows(scope) for scope in Scope)
    reader = ApiKey("a", frozenset({Scope.METRICS}))
    assert [scope for scope in Scope if reader.allows(scope)] == [Scope.METRICS]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sha256": HASH, "scopes": ["generate"]}, "entry 2: id: field required"),
        ({"id": "ci", "scopes": ["generate"]}, "entry 2 ('ci'): sha256: field required"),
        ({"id": "ci", "sha256": "elastic_s3cret", "scopes": ["generate"]}, "entry 2 ('ci'): sha256 must be 64"),
        ({"id": "ci", "sha256": HASH, "scopes": []}, "entry 2 ('ci'): scopes: tuple should have at least 1 item"),
        ({"id": "ci", "sha256": HASH, "scopes": ["all"]}, "scopes.0: input should be 'generate', 'metrics' or 'admin'"),
        ({"id": "c i", "sha256": HASH, "scopes": ["admin"]}, "entry 2 ('c i'): id must be 1 to 64 letters"),
        ({"id": "ci", "sha256": HASH, "scopes": ["admin"], "key": "elastic_s3cret"}, "('ci'): key: extra inputs"),
        ({"id": "ci", "sha256": HASH, "scopes": ["admin"], "rate_limit": "often"}, "rate_limit: 'often' is not a rate"),
        ({"id": "ok", "sha256": HASH, "scopes": ["admin"]}, "the id of 'ok' is also that of an earlier entry"),
        ({"id": "ci", "sha256": "b" * 64, "scopes": ["admin"]}, "the sha256 of 'ci' is also that of an earlier entry"),
        ("elastic_s3cret", "entry 2: the entry: input should be a valid dictionary"),
    ],
)
def test_fault_in_the_file_names_the_entry_and_shows_no_secret(
    entry: Any, message: str, write_json: Callable[[Any], Path]
) -> None:
    path = write_json([{"id": "ok", "sha256": "b" * 64, "scopes": ["generate"]}, entry])
    with pytest.raises(BadConfiguration) as raised:
        load_keys(path, None)
    assert message in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("keys.json", "[", "keys.json is not JSON"),
        ("keys.json", "{}", "must be a JSON list"),
        ("keys.json", "[]", "has no keys"),
        ("keys.toml", "keys = 1 2", "keys.toml is not TOML"),
        ("keys.toml", "", r"has no \[\[keys\]\]"),
        ("keys.toml", "keys = []", "has no keys"),
        ("keys.json", "[" * 50_000, "keys.json is not JSON"),
        ("keys.toml", "keys = " + "[" * 5000, "keys.toml is not TOML"),
        ("keys.json", "\udcff", "keys.json is not UTF-8"),
        ("keys.toml", "\udcff", "keys.toml is not UTF-8"),
    ],
)
def test_file_without_keys_does_not_open_the_server(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(BadConfiguration, match=message):
        load_keys(tmp_path / name, None)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_keys(tmp_path / "keys.toml", None)


def test_command_prints_a_key_once_and_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-key", "--id", "ci", "--scope", "generate", "--scope", "metrics"]) == 0
    output = capsys.readouterr().out
    (secret,) = re.findall(r"^elastic_\S+$", output, re.MULTILINE)
    (entry,) = tomllib.loads(output[output.index("[[keys]]") :])["keys"]
    assert entry == {"id": "ci", "sha256": sha256(secret.encode()).hexdigest(), "scopes": ["generate", "metrics"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--scope", "generate"], "Missing option '--id'"), (["--id", "a b"], "id"), (["--id", "a", "--scope", "x"], "x")],
)
def test_command_refuses_invalid_keys(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-key", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_weight_of_a_key_is_read_and_must_be_positive(write_json: Callable[[Any], Path]) -> None:
    entry = {"id": "a", "sha256": sha256(b"secret").hexdigest(), "scopes": ["generate"]}
    key = load_keys(write_json([{**entry, "weight": 2.5}]), None).identify("Bearer secret")
    assert key is not None
    assert key.weight == 2.5
    for weight in (0, -1, "inf"):
        with pytest.raises(BadConfiguration, match="weight"):
            load_keys(write_json([{**entry, "weight": weight}]), None)

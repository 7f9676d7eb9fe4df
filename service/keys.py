"""API keys and their scopes. The server knows only hashes of keys.

A key is 256 random bits, which cannot be guessed however fast the hash is, so a plain SHA-256 is enough. Slow and
salted hashes protect passwords that people choose.
"""

import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from limits import RateLimitItem
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import BadConfiguration, InvalidApiKey
from service.rate_limits import parse_rate_limit

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)


class Scope(StrEnum):
    GENERATE = "generate"  # generate images and meshes, and see the jobs that the key created
    METRICS = "metrics"  # read the metrics
    ADMIN = "admin"  # everything, including the jobs of other keys


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A known key. `id` names it in logs and as the owner of jobs; it is not secret.

    `weight` is its share of an overloaded server, relative to other keys.
    """

    id: str
    scopes: frozenset[Scope]
    rate_limit: RateLimitItem | None = None
    weight: float = 1.0

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


class KeyEntry(BaseModel):
    """A key as it is written in files and in the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate_limit: str | None = None
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)

    def to_toml(self) -> str:
        scopes = ", ".join(f'"{scope}"' for scope in self.scopes)
        return f'[[keys]]\nid = "{self.id}"\nsha256 = "{self.sha256}"\nscopes = [{scopes}]\n'


def new_key(key_id: str, scopes: Sequence[Scope]) -> tuple[str, KeyEntry]:
    """A new secret, which is stored nowhere, and its entry for the key file. Raises pydantic.ValidationError."""
    secret = f"elastic_{secrets.token_urlsafe(32)}"
    return secret, KeyEntry(id=key_id, sha256=_hash(secret), scopes=tuple(dict.fromkeys(scopes)))


class ApiKeys:
    """The keys that this server knows. Without keys it is open to everybody."""

    def __init__(self, entries: Iterable[tuple[str, ApiKey]] = ()) -> None:
        """`entries` are pairs of a SHA-256 in hexadecimal digits and its key."""
        self._entries = tuple(entries)

    def has(self, key_id: str) -> bool:
        """Whether there is a key with this id."""
        return any(key.id == key_id for _, key in self._entries)

    def identify(self, authorization: str | None) -> ApiKey | None:
        """The key in an `Authorization` header; None on an open server. Raises InvalidApiKey."""
        if not self._entries:
            return None
        if (bearer := _BEARER.fullmatch(authorization or "")) is None:
            raise InvalidApiKey("this server needs an API key; send it as 'Authorization: Bearer KEY'")
        given, found = _hash(bearer[1]), None
        for known, key in self._entries:  # compares with every key, so that timing leaks nothing
            if hmac.compare_digest(given, known):
                found = key
        if found is None:
            raise InvalidApiKey("this API key is not known here")
        return found


def load_keys(path: Path | None, text: str | None) -> ApiKeys:
    """The keys of a file, TOML or JSON by its suffix, and of a JSON `text`. Raises BadConfiguration, OSError."""
    entries: list[tuple[str, ApiKey]] = []
    if path is not None:
        entries += _parse(_entries_of_file(path), str(path))
    if text is not None:
        entries += _parse(_entries_of_json(text, "api_keys"), "api_keys")
    for name, values in (("id", [key.id for _, key in entries]), ("sha256", [known for known, _ in entries])):
        if len(set(values)) < len(values):
            twice = next(key.id for index, (_, key) in enumerate(entries) if values[index] in values[:index])
            raise BadConfiguration(f"API keys: the {name} of '{twice}' is also that of an earlier entry")
    return ApiKeys(entries)


def _entries_of_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadConfiguration(f"{path} is not UTF-8: {error}") from error
    if path.suffix == ".json":
        return _entries_of_json(text, str(path))
    try:
        entries = tomllib.loads(text).get("keys")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadConfiguration(f"{path} is not TOML: {error}") from error
    if not isinstance(entries, list):
        raise BadConfiguration(f"{path} has no [[keys]]; 'elastic-dit new-key' prints what belongs there")
    return entries


def _entries_of_json(text: str, source: str) -> list[Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadConfiguration(f"{source} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise BadConfiguration(f"{source} must be a JSON list of keys")
    return entries


def _parse(entries: list[Any], source: str) -> list[tuple[str, ApiKey]]:
    if not entries:  # better not to start than to be open by mistake
        raise BadConfiguration(f"{source} has no keys; leave the setting out to be open to everybody")
    return [_parse_entry(entry, f"{source}, entry {number}") for number, entry in enumerate(entries, start=1)]


def _parse_entry(entry: Any, where: str) -> tuple[str, ApiKey]:
    """Error messages show no value but the id: an operator may have put the key in place of its hash."""
    if isinstance(entry, dict) and isinstance(entry.get("id"), str):
        where += f" ('{entry['id'][:64]}')"
    try:
        parsed = KeyEntry.model_validate(entry)
        limit = None if parsed.rate_limit is None else parse_rate_limit(parsed.rate_limit)
    except ValidationError as error:
        raise BadConfiguration(f"{where}: {_reason(error)}") from None  # pydantic's message has the values
    except ValueError as error:
        raise BadConfiguration(f"{where}: rate_limit: {error}") from error
    return parsed.sha256, ApiKey(parsed.id, frozenset(parsed.scopes), limit, parsed.weight)


def _reason(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the entry"
    match first["type"], field:
        case "string_pattern_mismatch", "sha256":
            return "sha256 must be 64 hexadecimal digits, in lower case: the hash of a key, not the key"
        case "string_pattern_mismatch", "id":
            return "id must be 1 to 64 letters, digits and . _ @ -"
        case _:
            return f"{field}: {first['msg'].lower()}"


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()

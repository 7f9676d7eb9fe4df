"""The command that makes an API key."""

from typing import Annotated

import typer

from service import keys


def new_key(
    key_id: Annotated[str, typer.Option("--id", help="Who it is for: a name for logs, and the owner of jobs.")],
    scopes: Annotated[
        list[keys.Scope] | None,
        typer.Option("--scope", help="What it is for; may be given more than once.  [default: generate]"),
    ] = None,
) -> None:
    """Make an API key. It is shown once; the server's file of keys has only its hash."""
    secret, entry = keys.new_key(key_id, scopes or [keys.Scope.GENERATE])
    print(f"The key, which is shown only now:\n\n{secret}\n\nFor the file that the setting api_keys_file names:\n")
    print(entry.to_toml())

"""``mplus keys``: make, list and revoke the keys of a server, also while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mplus.cli.output import print_json
from mplus.errors import ConfigError

Memories = Annotated[Path, typer.Option(help="Folder of the server's memories, where the keys are too.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def make(
    tenant: Annotated[str, typer.Argument(help="Whose memories the key opens.", show_default=False)],
    rights: Annotated[str, typer.Option(metavar="RIGHT,RIGHT,...", help="read, write, admin.")] = "read,write",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests at once.", show_default="no limit")] = None,
    memories: Memories = Path("memories"),
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once: the file has its hash alone. A running server takes it at once."""
    from mplus.serving.http.bodies import is_id
    from mplus.serving.http.keys import FILE, Keys, rights_of

    if not is_id(tenant):
        raise ConfigError(
            f"a tenant must be 1 to 128 letters, digits or ._:@- and begin with a letter or digit, got {tenant!r}"
        )
    given = rights_of([part.strip() for part in rights.split(",")])
    record, key = Keys(memories / FILE).make(tenant, given, requests)
    print_json({**record.public(), "key": key}) if as_json else print(key)


def list_(memories: Memories = Path("memories"), as_json: Json = False) -> None:
    """List the valid keys, without the keys themselves."""
    from mplus.serving.http.keys import FILE, Keys

    if not memories.is_dir():
        raise ConfigError(f"--memories must be the folder of a server's memories, and there is none at {memories}")
    records = Keys(memories / FILE).list()
    if as_json:
        print_json([record.public() for record in records])
        return
    if not records:
        print("no valid keys: mplus keys make TENANT makes one")
    for record in records:
        print(f"{record.id}  {record.made}  {','.join(record.rights):<16}  {record.tenant}")


def revoke(
    key_id: Annotated[str, typer.Argument(help="Id, as `mplus keys list` shows it.", show_default=False)],
    memories: Memories = Path("memories"),
) -> None:
    """Revoke a key. A running server refuses it at once."""
    from mplus.serving.http.keys import FILE, Keys

    if not Keys(memories / FILE).revoke(key_id):
        raise ConfigError(f"there is no valid key with the id {key_id!r}: mplus keys list shows them")

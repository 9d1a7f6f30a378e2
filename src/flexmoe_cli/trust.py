"""The commands for signatures: keygen, sign.

Does not cover how packages are signed (`flexmoe.packages.signing`), or which signatures are accepted
(`flexmoe.packages.trust`).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json
from flexmoe_cli.output import library_call, print_json, print_line

PasswordFile = Annotated[
    Path | None, typer.Option(help="A file whose first line is the password of the private key.", show_default=False)
]
AskPassword = Annotated[bool, typer.Option("--ask-password", help="Ask for the password at the terminal.")]


def keygen(
    out: Annotated[
        Path,
        typer.Option(metavar="PREFIX", help="Writes PREFIX.pem (private, mode 0600) and PREFIX.pub (public)."),
    ],
    password_file: PasswordFile = None,
    ask_password: AskPassword = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing key.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a key for signing expert packages.

    Example: flexmoe keygen --out keys/hospital
    """
    from flexmoe.packages.signing import keygen as library_keygen

    password = read_password(password_file, ask_password, confirm=True)
    with library_call(as_json):
        keys = library_keygen(out, password=password, overwrite=overwrite)
    if as_json:
        print_json(asdict(keys))
        return
    print_line(f"[bold]{escape(str(keys.private))}[/] is the private key: keep it secret.")
    print_line(f"[bold]{escape(str(keys.public))}[/] is the public key, to distribute: fingerprint {keys.fingerprint}")


def sign(
    package: Annotated[Path, typer.Argument(help="Folder of an expert package.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The private key's file.", show_default=False)],
    password_file: PasswordFile = None,
    ask_password: AskPassword = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing signature.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sign an expert package, as the last step before publishing it.

    Example: flexmoe sign math-package --key keys/hospital.pem
    """
    from flexmoe.packages.signing import sign as library_sign

    password = read_password(password_file, ask_password)
    with library_call(as_json):
        signature = library_sign(package, key, password=password, overwrite=overwrite)
    if as_json:
        print_json({"package": package, "signature": signature})
        return
    print_line(f"[bold]{escape(str(signature))}[/] signs every file of the package.")


def read_password(file: Path | None, ask: bool, *, confirm: bool = False) -> str | None:
    """The password from the first line of `file`, or from the terminal; None without either. ValueError: both."""
    if file is not None and ask:
        raise ValueError("--password-file and --ask-password exclude each other. Pass one of them.")
    if ask:
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=confirm, err=True))
    if file is None:
        return None
    return next(iter(file.read_text(encoding="utf-8").splitlines()), "")

"""The commands for the Hub: push, pull.

Does not cover the selection and checks of files (`flexmoe.hub.publish`), or logging in (`hf auth login`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, Out, Overwrite, Policy
from flexmoe_cli.output import byte_progress, human_bytes, library_call, print_json, print_line, print_table
from flexmoe_cli.tables import show_result

if TYPE_CHECKING:
    from flexmoe.hub.publish import Upload

CODE = "_flexmoe.py"


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an expert package, a composition or a model.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="Hub id to push to; created if necessary.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and send nothing.")] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: that of your account.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if necessary.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    allow_private_text: Annotated[
        bool,
        typer.Option("--allow-private-text", help="Push even if a file holds an address, a token, a key or a path."),
    ] = False,
    allow_private_text_in: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="The same for one file; may be repeated.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Push an expert package, a composition or a model to the Hub. Log in first: hf auth login

    Example: flexmoe push math-package my-organisation/math-expert --dry-run
    """
    from flexmoe.hub.publish import plan_upload, push_upload

    with library_call(as_json):
        plan = plan_upload(folder)
    if dry_run:
        if as_json:
            print_json({**plan.to_dict(), "repo": repo})
        else:
            show_plan(plan, repo)
        allowed = allow_private_text_in or ()
        if not allow_private_text and any(found.file not in allowed for found in plan.discoveries):
            raise typer.Exit(1)  # like the push
        return
    with library_call(as_json):
        pushed = push_upload(
            plan,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            allow_private_text=allow_private_text or allow_private_text_in or False,
        )
    if as_json:
        print_json({**vars(pushed), "left_out": list(plan.left_out)})
        return
    print_line(f"Pushed to [bold]{escape(pushed.pull_request or pushed.url)}[/], commit {pushed.revision}.")
    show_left_out(plan)


def show_plan(plan: Upload, repo: str) -> None:
    """Prints the files to upload as a table, with one line for the files of the model's code."""
    code = [file for file in plan.files if file.name.endswith(CODE)]
    rows = [[file.name, human_bytes(file.nbytes), f"{file.sha256[:16]}…"] for file in plan.files if file not in code]
    if code:
        rows.append([f"{len(code)} files *{CODE}", human_bytes(sum(file.nbytes for file in code)), ""])
    print_table(f"To be pushed to {repo}, as a {plan.kind}", ("file", "size", "SHA-256"), rows)
    show_left_out(plan)
    for found in plan.discoveries:
        print_line(f"[bold yellow]Looks private:[/] {escape(str(found))}")
    if plan.discoveries:
        print_line("A push is refused, except with --allow-private-text, or --allow-private-text-in FILE.")


def show_left_out(plan: Upload) -> None:
    """Prints the files of the folder that are not uploaded."""
    if plan.left_out:
        print_line(escape(f"Not pushed: {', '.join(plan.left_out)}"))


def pull(
    repo: Annotated[str, typer.Argument(help="Hub id of a package, a composition or a model.", show_default=False)],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    policy: Policy = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pull an expert package, a composition or a model from the Hub into a folder, and verify it.

    Example: flexmoe pull my-organisation/math-expert --out math-package
    """
    from flexmoe.hub.pull import pull as library_pull

    with library_call(as_json), byte_progress("Copying") as progress:
        folder = library_pull(repo, out, revision=revision, policy=policy, overwrite=overwrite, progress=progress)
    show_result(folder, as_json)

"""``toolkit federated``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import options

group = typer.Typer(
    no_args_is_help=True, help="A federation by hand: director, envoys and experiments."
)
certify_group = typer.Typer(no_args_is_help=True, help="Certificates between sites.")

#: The program in the image has further options, which it checks itself.
MORE = {"allow_extra_args": True, "ignore_unknown_options": True}

Certificates = Annotated[
    Path,
    typer.Option(
        "--certificates",
        metavar="DIR",
        help="Folder with key.pem, cert.pem and ca.pem.",
        show_default=False,
    ),
]
Director = Annotated[
    str, typer.Option("--director", metavar="HOST:PORT", help="Where it is.", show_default=False)
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, rocm, cuda, hpu or cpu.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    group.add_typer(certify_group, name="certify")
    app.add_typer(group, name="federated")


def _run(words: list[str], *, image: Path | None = None) -> None:
    from toolkit import federated

    raise typer.Exit(federated.run(words, image=image, device=federated.device_of(words)))


@group.command(context_settings=MORE)
def director(
    context: typer.Context,
    certificates: Certificates,
    port: Annotated[
        int,
        typer.Option("--port", min=1, max=65534, help="The port above it is used in experiments."),
    ] = 50051,
    experimenter: Annotated[
        list[str] | None,
        typer.Option(
            "--experimenter", metavar="NAME", help="Who may submit; repeat it. [experiment]"
        ),
    ] = None,
    image: options.ImageOption = None,
) -> None:
    """Be the director of a federation, until Ctrl-C."""
    words = ["director", "--certificates", str(certificates), "--port", str(port)]
    for name in experimenter or []:
        words += ["--experimenter", name]
    _run([*words, *context.args], image=image)


@group.command(context_settings=MORE)
def envoy(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As in the certificate.", show_default=False)],
    director: Director,
    certificates: Certificates,
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="The set, an .npz.", show_default=False),
    ],
    shard: Annotated[
        str, typer.Option("--shard", metavar="K/N", help="Which part of how many.")
    ] = "1/1",
    device: Device = "auto",
    image: options.ImageOption = None,
) -> None:
    """Take part in a federation with one's own data, until Ctrl-C.

    Further options: --split iid|label-skew|FILE.py:CALLABLE, --alpha, --seed, --code DIR (with the
    FILE.py that an experiment's --model names, by default the working folder), --once (end after
    one experiment), --wait SECONDS (for the director), --patience, --threads, --record DIR.
    """
    words = ["envoy", name, "--director", director, "--certificates", str(certificates)]
    words += ["--data", str(data), "--shard", shard, "--device", device]
    _run([*words, *context.args], image=image)


@group.command(context_settings=MORE)
def experiment(
    context: typer.Context,
    director: Director,
    certificates: Certificates,
    results: Annotated[
        Path,
        typer.Option(
            "--results", metavar="DIR", help="Folder for what comes out.", show_default=False
        ),
    ],
    envoys: Annotated[int, typer.Option("--envoys", help="How many take part.")] = 2,
    rounds: Annotated[int, typer.Option("--rounds", help="How often weights are averaged.")] = 10,
    image: options.ImageOption = None,
) -> None:
    """Run an experiment in a federation whose director and envoys are there.

    Further options: --data FILE (to test on), --baselines, --resume, --tolerate, --patience,
    --stall, --model, --epochs, --batch, --rate, --momentum, --seed, --device.
    """
    words = ["experiment", "--director", director, "--certificates", str(certificates)]
    words += ["--results", str(results), "--envoys", str(envoys), "--rounds", str(rounds)]
    _run([*words, *context.args], image=image)


@certify_group.command()
def authority(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="For its key.")],
    days: Annotated[int, typer.Option("--days", min=1, max=36500, help="For how long.")] = 3650,
    image: options.ImageOption = None,
) -> None:
    """Make an authority that signs, once for a federation."""
    _run(["certify", "authority", str(folder), "--days", str(days)], image=image)


@certify_group.command()
def request(
    name: Annotated[str, typer.Argument(help="Of the party.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="For its key.")],
    image: options.ImageOption = None,
) -> None:
    """Make a key, which stays where it is, and a request for a certificate."""
    _run(["certify", "request", name, str(folder)], image=image)


@certify_group.command()
def sign(
    asked: Annotated[Path, typer.Argument(metavar="REQUEST", help="File of a party.")],
    authority: Annotated[
        Path, typer.Option("--authority", metavar="DIR", help="Who signs.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FILE", help="For the certificate.", show_default=False),
    ],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Of a director: where it is reached; repeat it."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=36500, help="For how long.")] = 365,
    image: options.ImageOption = None,
) -> None:
    """Sign a request, after a look at its name and fingerprint."""
    words = ["certify", "sign", str(asked), "--authority", str(authority)]
    words += ["--output", str(output), "--days", str(days)]
    for each in host or []:
        words += ["--host", each]
    _run(words, image=image)


@certify_group.command()
def install(
    signed: Annotated[Path, typer.Argument(metavar="FILE", help="What was signed.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="That has the key.")],
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", help="Of the authority, as it was told.")
    ] = None,
    image: options.ImageOption = None,
) -> None:
    """Put a signed certificate beside its key."""
    words = ["certify", "install", str(signed), str(folder)]
    told = [] if fingerprint is None else ["--fingerprint", fingerprint]
    _run([*words, *told], image=image)

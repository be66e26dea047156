"""The parts of a federation, each as a command; docs/federated.md describes them.

Exit status: 0 when all is done, 1 if it has failed, 2 if the call was wrong, 85 if it was asked to
end and has saved what --resume goes on from.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

import custom
import settings as settings_module
from settings import EXPERIMENTER, SettingsError

DEVICES = ("auto", "cuda", "rocm", "hpu", "cpu")

#: The director's port, and the one above it, where none is named by hand.
PORT = 50051

#: What of an experiment's settings an envoy that is started by hand is told itself.
OF_ENVOYS = ("split", "alpha", "seed", "engine", "patience")

#: Seconds that an envoy waits for the director.
WAIT_S = 300.0


class Parser(argparse.ArgumentParser):
    """Python's, that takes options by their whole names alone, as those who call this do."""

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)


def parser() -> Parser:
    """Return the parser of all commands."""
    whole = Parser(description=__doc__.splitlines()[0])
    commands = whole.add_subparsers(dest="command", required=True)

    job = commands.add_parser("all", help="run a whole federation, as the job does")
    settings_module.add_arguments(job)
    add_results(job)
    job.add_argument("--data", type=Path, required=True, help="the set, an .npz file")
    job.add_argument("--device", default="auto", choices=DEVICES)
    job.add_argument("--shared", type=Path, help="folder for envoys on other nodes")
    job.add_argument("--host", default="127.0.0.1", help="at which they reach this node")
    job.add_argument("--port", type=int, default=0, help="of the director, and the next one")
    job.add_argument("--record", action="store_true", help="keep all weights of all rounds")
    job.add_argument("--restarts", type=int, default=0, help="of an envoy that has died")
    job.add_argument("--no-baselines", dest="baselines", action="store_false")

    director = commands.add_parser("director", help="be the director of a federation")
    add_place(director)
    director.add_argument("--port", type=int, default=PORT, help="and the next one")
    director.add_argument(
        "--experimenter",
        action="append",
        help=f"name in the certificate of who may submit experiments (default {EXPERIMENTER})",
    )

    envoy = commands.add_parser("envoy", help="take part with one's own data")
    envoy.add_argument("name", nargs="?", help="as in the certificate")
    add_place(envoy)
    envoy.add_argument("--director", help="HOST:PORT")
    envoy.add_argument("--data", type=Path, required=True, help="the set, or what --split takes")
    envoy.add_argument("--device", default="auto", choices=DEVICES)
    envoy.add_argument("--local-rank", type=int, default=0, help="which of the node's devices")
    envoy.add_argument("--shard", default="1/1", help="which part of how many, such as 1/4")
    for name in OF_ENVOYS:
        default = getattr(settings_module.Settings, name)
        help_text = f"{settings_module.HELP[name]} (default {default})"
        envoy.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    envoy.add_argument("--code", type=Path, help="folder with what --model of experiments names")
    envoy.add_argument("--once", action="store_true", help="end after one experiment")
    envoy.add_argument("--wait", type=float, default=WAIT_S, help="seconds for the director")
    envoy.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch takes")
    envoy.add_argument("--federation", type=Path, help="folder of a job, with all of the above")
    envoy.add_argument("--rank", type=int, help="which envoy of the job, from 0")
    envoy.add_argument("--record", type=Path, help="folder for the weights of every round")

    experiment = commands.add_parser("experiment", help="run an experiment in a federation")
    settings_module.add_arguments(experiment)
    add_place(experiment)
    add_results(experiment)
    experiment.add_argument("--director", required=True, help="HOST:PORT")
    experiment.add_argument("--data", type=Path, help="the set, to test on at the end")
    experiment.add_argument("--device", default="auto", choices=DEVICES)
    experiment.add_argument("--baselines", action="store_true", help="compare; needs --data")

    certify = commands.add_parser("certify", help="certificates for a federation between sites")
    steps = certify.add_subparsers(dest="step", required=True)
    step = steps.add_parser("authority", help="make an authority that signs")
    step.add_argument("folder", type=Path)
    step.add_argument("--days", type=int, default=3650)
    step = steps.add_parser("request", help="make a key, and ask for a certificate")
    step.add_argument("name")
    step.add_argument("folder", type=Path)
    step = steps.add_parser("sign", help="sign a request")
    step.add_argument("request", type=Path)
    step.add_argument("--authority", type=Path, required=True, help="folder of the authority")
    step.add_argument("--output", type=Path, required=True, help="file for the certificate")
    step.add_argument("--host", action="append", default=[], help="of a director: where it is")
    step.add_argument("--days", type=int, default=365)
    step = steps.add_parser("install", help="put a signed certificate beside its key")
    step.add_argument("signed", type=Path)
    step.add_argument("folder", type=Path)
    step.add_argument("--fingerprint", help="of the authority, as it was told")
    return whole


def add_place(command: argparse.ArgumentParser) -> None:
    """Give a command the option for its certificates."""
    command.add_argument(
        "--certificates", type=Path, help="folder with key.pem, cert.pem and ca.pem"
    )


def add_results(command: argparse.ArgumentParser) -> None:
    """Give a command the options for its results."""
    command.add_argument("--results", type=Path, required=True, help="folder for what comes out")
    command.add_argument("--resume", action="store_true", help="go on, if there is a checkpoint")


def main(arguments: Optional[List[str]] = None) -> int:
    """Run a command; return the exit status."""
    whole = parser()
    options = whole.parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def whole_job(options: argparse.Namespace) -> int:
    """Run a whole federation."""
    made = settings_module.from_arguments(options)
    if options.port:
        settings_module.require_port(options.port)
    if options.restarts < 0:
        raise SettingsError(f"--restarts is {options.restarts}: it must be 0 or more")
    import driver

    options.results.mkdir(parents=True, exist_ok=True)
    record = options.results / "recorded" if options.record else None
    if record:
        record.mkdir(exist_ok=True)
    where = driver.Where(
        results=options.results.absolute(),
        data=options.data.absolute(),
        device=options.device,
        shared=options.shared,
        host=options.host,
        port=options.port,
        record=record,
        baselines=options.baselines,
        restarts=options.restarts,
        resume=options.resume,
    )
    # The job gives --resume itself.
    again = "the same call with the same RESULTS"
    return int(driver.guarded(lambda asked: driver.Run(made, where, asked).job(), again=again))


def experiment(options: argparse.Namespace) -> int:
    """Run an experiment in a federation that others have started."""
    made = settings_module.from_arguments(options)
    host, port = settings_module.address(options.director)
    import certificates
    import driver
    from ending import Asked
    from engines import Place

    def call(asked: Asked) -> int:
        certificates.check(folder_of(options))
        options.results.mkdir(parents=True, exist_ok=True)
        where = driver.Where(
            results=options.results.absolute(),
            data=options.data.absolute() if options.data else None,
            device=options.device,
            baselines=options.baselines,
            resume=options.resume,
            port=port,
        )
        place = Place(host, port, port + 1, folder_of(options))
        return int(driver.Run(made, where, asked).by_hand(place))

    return int(driver.guarded(call, again="the same call with --resume"))


def director(options: argparse.Namespace) -> int:
    """Be the director, until a signal ends it."""
    settings_module.require_port(options.port)
    import certificates
    import engines

    def call() -> int:
        folder = folder_of(options)
        name = certificates.check(folder)
        place = engines.Place("", options.port, options.port + 1, folder)
        engine = engines.load(settings_module.Settings.engine)
        print(f"{name} listens at port {options.port}, and {options.port + 1} in experiments")
        sys.stdout.flush()
        with PrivateFolder():
            experimenters = options.experimenter or [EXPERIMENTER]
            return int(engine.direct(place, experimenters=experimenters))

    return plain(call)


def envoy(options: argparse.Namespace) -> int:
    """Take part, by hand or in a job."""
    if options.federation:
        fill_in(options)
    elif not options.name or not options.director:
        raise SettingsError("an envoy needs its name, and --director HOST:PORT")
    name = settings_module.name_of(options.name)
    host, port = settings_module.address(options.director)
    rank, count = settings_module.shard_of(options.shard)
    # What it shares with an experiment has the same limits.
    settings_module.from_mapping({name: getattr(options, name) for name in OF_ENVOYS})
    if not options.wait >= 0:
        raise SettingsError(f"--wait is {options.wait}: it must be a number of seconds")
    if options.code:
        if not options.code.is_dir():
            raise SettingsError(f"--code is {options.code}: there is no such folder")
        custom.FOLDERS.insert(0, options.code.absolute())
    import certificates
    import engines

    def call() -> int:
        certificates.check(folder_of(options), name=name)
        engine = engines.load(options.engine)
        import shards
        import torch
        import training
        import work

        # Not in the first round.
        training.warm()
        if options.threads:
            torch.set_num_threads(options.threads)
        data = shards.load(
            options.data.absolute(),
            rank=rank,
            count=count,
            how=options.split,
            alpha=options.alpha,
            seed=options.seed,
        )
        worker = work.Work(
            name,
            data,
            device=options.device,
            local_rank=options.local_rank,
            engine=engine.version,
            record=options.record.absolute() if options.record else None,
        )
        print(f"{name}: {len(data.train[0])} images of {data.name}, {worker.device.name}")
        sys.stdout.flush()
        place = engines.Place(host, port, port + 1, folder_of(options))
        with PrivateFolder():
            status = engine.join(
                name,
                place,
                worker,
                once=options.once,
                wait=options.wait,
                patience=options.patience,
            )
        return int(status)

    return plain(call)


def plain(call: Callable[[], int]) -> int:
    """Run until a signal ends it, or it ends itself; return the exit status."""
    import driver
    from ending import Interrupted

    def end(number: int, _: Any) -> None:
        raise Interrupted(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        return call()
    except KeyboardInterrupt:
        return 130
    except Interrupted as ended:
        # Not to Python, which would wait for threads of the engine.
        return int(ended.code)
    except SystemExit as left:
        print(f"error: {driver.LEFT.format(left)}", file=sys.stderr, flush=True)
        return 1
    except SettingsError:
        raise
    except Exception as error:
        if not driver.is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def fill_in(options: argparse.Namespace) -> None:
    """Take what an envoy of a job is to do from the job's folder, when that is there."""
    told = options.federation / "federation.json"
    deadline = time.monotonic() + options.wait
    while not told.exists():
        if time.monotonic() > deadline or (options.federation / "over").exists():
            raise SettingsError(f"there is no federation in {options.federation}")
        time.sleep(0.3)
    known = json.loads(told.read_text())
    made = settings_module.from_mapping(known["settings"])
    options.name = f"envoy-{options.rank + 1}"
    options.director = f"{known['host']}:{known['port']}"
    options.shard = f"{options.rank + 1}/{made.envoys}"
    options.certificates = options.certificates or options.federation / options.name
    options.once = True
    for name in OF_ENVOYS:
        setattr(options, name, getattr(made, name))


def certify(options: argparse.Namespace) -> int:
    """Do a step of the ceremony."""
    import certificates

    def call() -> int:
        if options.step in ("authority", "sign"):
            settings_module.require_days(options.days)
        if options.step == "authority":
            told = certificates.found(options.folder, days=options.days)
            print(f"authority in {options.folder}\nfingerprint {told}")
        elif options.step == "request":
            name = settings_module.name_of(options.name)
            told = certificates.request(options.folder, name)
            print(f"request {options.folder / certificates.REQUEST}\nfingerprint {told}")
        elif options.step == "sign":
            name, told = certificates.sign(
                options.authority,
                options.request,
                options.output,
                hosts=[settings_module.host_of(host) for host in options.host],
                days=options.days,
            )
            print(f"signed {options.output} for {name}\nfingerprint {told}")
        else:
            name, told, end = certificates.install(
                options.folder, options.signed, authority=options.fingerprint
            )
            print(f"{name} in {options.folder}, valid until {end}\nauthority {told}")
        return 0

    return plain(call)


class PrivateFolder:
    """Work in an empty folder of one's own, which goes with the end."""

    def __enter__(self) -> None:
        """Make it and go there."""
        self.before = os.getcwd()
        self.folder = tempfile.mkdtemp(prefix="federated-")
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        os.chdir(self.before)
        shutil.rmtree(self.folder, ignore_errors=True)


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of certificates, by its full path."""
    if not options.certificates:
        raise SettingsError("--certificates is missing: the folder with key.pem and the others")
    folder: Path = options.certificates.absolute()
    return folder


COMMANDS = {
    "all": whole_job,
    "director": director,
    "envoy": envoy,
    "experiment": experiment,
    "certify": certify,
}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of an engine would keep the process.
    os._exit(status)

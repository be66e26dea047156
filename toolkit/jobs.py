"""The bundled jobs: what there is, what a site makes of one, and submitting it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit import paths, processes, schema, settings, slurm
from toolkit.errors import ToolkitError, UsageError
from toolkit.sites import Partition, Site


@dataclass(frozen=True)
class Job:
    """A bundled job.

    Attributes
    ----------
    name : str
        Name of its folder.
    script : Path
        The batch script.
    about : str
        The comment at the script's top, which says how to use it.
    options : dict of str
        What its ``#SBATCH`` lines ask for, by long option names.
    needs_image : bool
        Whether it is nothing without an image: its program runs in a container.
    takes_arguments : bool
        Whether it takes arguments of its own.
    arguments : dict of str
        The options among them that its comment explains, each with its value's name, "" for one
        that takes none.
    image : str
        Image of the catalogue that it uses if none is named.
    """

    name: str
    script: Path
    about: str
    options: dict[str, str]
    needs_image: bool = True
    takes_arguments: bool = False
    arguments: dict[str, str] = field(default_factory=dict)
    image: str = "monai"

    @property
    def summary(self) -> str:
        """First paragraph of `about`, as one line."""
        return " ".join(self.about.partition("\n\n")[0].split())


@dataclass(frozen=True)
class Submission:
    """What submitting a job means, in full.

    Attributes
    ----------
    arguments : tuple of str
        The arguments of sbatch: its options, the script, and the script's.
    environment : dict of str
        Variables that the job gets beside those of the caller.
    folder : Path
        Where it is submitted from.
    start : Path
        Where it starts; paths in its own arguments are relative to it.
    own : tuple of str
        Those of the arguments that are the job's own.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    start: Path
    own: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """The options of sbatch among the arguments."""
        return self.arguments[: len(self.arguments) - len(self.own) - 1]

    @property
    def command(self) -> str:
        """The whole as one line for a shell."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *words, "sbatch", *self.arguments])


@dataclass(frozen=True)
class Queued:
    """A job in the queue.

    Attributes
    ----------
    job_id, cluster : str
        Slurm's number, and the cluster where there are several.
    log : str
        File with its output; empty if Slurm did not say.
    """

    job_id: str
    cluster: str
    log: str


def parse_header(script: str) -> str:
    """Return the comment at the top of a script, below its first line, without the marks."""
    lines: list[str] = []
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH") or not re.match(r"#( |$)", line):
            break
        lines.append(line[2:])
    return "\n".join(lines).strip("\n")


def parse_variables(about: str) -> dict[str, str]:
    r"""Return the variables that a comment explains, each with what it says of it.

    Examples
    --------
    >>> parse_variables("It reads:\n\n  INPUT, DATA   files\n                and folders\n")
    {'INPUT': 'files and folders', 'DATA': 'files and folders'}
    """
    found: dict[str, str] = {}
    current: list[str] = []
    for line in about.splitlines():
        match = re.fullmatch(r"  ([A-Z][A-Z0-9_]*(?:, [A-Z][A-Z0-9_]*)*) {2,}(\S.*)", line)
        if match:
            current = match[1].split(", ")
            found |= dict.fromkeys(current, match[2])
        elif current and re.match(r" {10,}\S", line):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found


def parse_arguments(about: str) -> dict[str, str]:
    r"""Return the options of a job's own that its comment explains, each with its value's name.

    Examples
    --------
    >>> parse_arguments("  --rounds N   how many\n  --record     keep all\n")
    {'--rounds': 'N', '--record': ''}
    """
    return dict(re.findall(r"^  (--[a-z][a-z-]*)(?: (\S+))? {2,}\S", about, re.MULTILINE))


def pull_arguments(
    words: Sequence[str], arguments: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return words without a job's own options, and those with their values.

    Parameters
    ----------
    words : sequence of str
        Of a command line.
    arguments : mapping
        From `parse_arguments`.

    Examples
    --------
    >>> pull_arguments(["--site", "x", "--rounds", "3"], {"--rounds": "N"})
    (['--site', 'x'], ['--rounds', '3'])
    """
    rest: list[str] = []
    own: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, equals, _ = word.partition("=")
        if name not in arguments:
            rest.append(word)
            continue
        own.append(word)
        if arguments[name] and not equals and pending:
            own.append(pending.pop(0))
    return rest, own


def names() -> list[str]:
    """Return the names of the bundled jobs."""
    return sorted(script.parent.name for script in paths.jobs().glob("*/job.sh"))


def load(name: str) -> Job:
    """Read a job by its name.

    Raises
    ------
    UsageError
        If there is no such job.
    """
    if name not in names():
        raise UsageError(f"unknown job {name!r}", hint=schema.nearest(name, names()))
    script = paths.jobs() / name / "job.sh"
    text = script.read_text(encoding="utf-8")
    options = slurm.parse_options(slurm.parse_directives(text))
    about = parse_header(text)
    image = re.search(r"^DEFAULT_IMAGE=(\S+)$", text, re.MULTILINE)
    return Job(
        name=name,
        script=script,
        about=about,
        options=options,
        needs_image=re.search(r"^(run_in_container |find_image$)", text, re.MULTILINE) is not None,
        takes_arguments=not re.search(r"^no_arguments ", text, re.MULTILINE),
        arguments=parse_arguments(about),
        image=image[1] if image else Job.image,
    )


def shared_help() -> str:
    """Return what holds for every job: the variables that jobs/common.sh reads."""
    return parse_header((paths.jobs() / "common.sh").read_text(encoding="utf-8"))


def find_image(*, option: Path | None, site: Site, job: Job | None = None) -> Path | None:
    """Return the image that a job will use; None if it can do without and none was named.

    Parameters
    ----------
    option : Path, optional
        What was given on the command line; else ``IMAGE`` and the settings decide.
    site : Site
        Its settings count, too.
    job : Job, optional
        By default one that needs an image.

    Raises
    ------
    UsageError
        If there is no such file.
    """
    build = Path(settings.resolve("build_dir", site=site.settings).value)
    given: str | Path | None = option or os.environ.get("IMAGE")
    make = "make build-monai-sif"
    if job and job.image != Job.image:  # the site's has not what it needs
        make = f"toolkit build {job.image}"
    else:
        given = given or settings.resolve("image", site=site.settings).value
    name = job.image if job else Job.image
    image = Path(given).absolute() if given else paths.home() / build / f"{name}.sif"
    if not image.exists():
        if job and not (given or job.needs_image):
            return None
        raise UsageError(
            f"no image {image}",
            hint=f"Make it with `{make}` in {paths.home()}, or name one by --image.",
        )
    return image


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of sbatch that words begin with, and the rest, the job's own.

    The rest begins at the first word that is no option, or after ``--``, as for sbatch itself.

    Examples
    --------
    >>> split_arguments(["--time", "5", "-N2", "train.py", "--epochs", "3"])
    (['--time', '5', '-N2'], ['train.py', '--epochs', '3'])
    """
    place = 0
    while place < len(words) and re.match("-.", words[place]):
        if words[place] == "--":
            return list(words[:place]), list(words[place + 1 :])
        try:
            slurm.parse_options([words[place]])
        except UsageError:  # its value is the next word
            if place + 1 == len(words):
                raise
            place += 1
        place += 1
    return list(words[:place]), list(words[place:])


def plan(
    job: Job,
    *,
    site: Site,
    site_name: str,
    image: Path | None,
    gpus: int | None = None,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Submission:
    """Work out how a job is submitted at a site; nothing is run.

    Options win in this order: the caller's, sbatch's own variables, the site's, the
    script's.

    Parameters
    ----------
    job : Job
        The job.
    site : Site
        Where.
    site_name : str
        Its name.
    image : Path or None
        The SIF.
    gpus : int, optional
        How many GPUs; by default as many as the script asks for.
    extra : sequence of str
        Options of sbatch from the caller, then the job's own arguments.
    environment : mapping, optional
        By default the environment of this process.

    Raises
    ------
    UsageError
        If the caller's options contradict each other or are no options.
    """
    environment = os.environ if environment is None else environment
    extra, own = split_arguments(extra)
    if own and not job.takes_arguments:
        raise UsageError(
            f"{own[0]!r} is not an option of sbatch, and {job.name} takes no arguments",
            hint="Give the values of options as --name=value.",
        )
    _refuse_unknown(extra, job=job)
    given = from_environment(environment) | slurm.parse_options(extra)
    if "test-only" in given:
        raise UsageError("--test-only is an option of `toolkit submit`", hint="Give it before --.")
    told = job_environment(site=site, site_name=site_name, image=image, environment=environment)
    arguments: list[str] = ["--parsable"]
    if "chdir" not in given:
        arguments.append(f"--chdir={Path.cwd()}")
    if "partition" not in given and site.default_partition:
        arguments.append(f"--partition={site.default_partition}")
    arguments += [
        option for option in site.options if not slurm.parse_options([option]).keys() & given.keys()
    ]
    arguments += _gpu_arguments(job, site=site, gpus=gpus, given=given)
    arguments += extra
    # Last, so that it wins: also over the site's own SBATCH_EXPORT.
    arguments.append(f"--export={_exported(slurm.parse_options(arguments), told)}")
    return Submission(
        arguments=(*arguments, str(job.script), *own),
        environment=told,
        folder=Path.cwd(),
        start=Path.cwd() / given.get("chdir", ""),
        own=tuple(own),
    )


def _refuse_unknown(extra: Sequence[str], *, job: Job) -> None:
    """Fail if there are options among the caller's that sbatch does not have."""
    for name in slurm.parse_options(extra):
        if not slurm.is_option(name):
            dashes = "--" if len(name) > 1 else "-"
            hint = schema.nearest(name, slurm.VALUED | slurm.FLAGS)
            if job.takes_arguments:
                hint = f"The job's own go behind a second --, as in `-- -- {dashes}{name}`."
                if f"--{name}" in job.arguments:
                    hint = f"--{name} is one of the job's own: give it before --."
            raise UsageError(f"{dashes}{name} is not an option of sbatch", hint=hint)


def _exported(options: Mapping[str, str], told: Mapping[str, str]) -> str:
    """Return what ``--export`` is to be so that the job gets what it is told.

    Slurm treats NONE and a list of names alike: the job has the variables of a login, and those.
    """
    if "export-file" in options:
        raise UsageError(
            "--export-file would keep from the job what `toolkit submit` tells it",
            hint="Name the variables in --export=NAME,NAME instead.",
        )
    wanted = options.get("export") or "ALL"
    names = [part.partition("=")[0] for part in wanted.split(",")]
    if "ALL" in [name.upper() for name in names]:
        return wanted
    if wanted.upper() == "NIL":
        raise UsageError(
            "--export=NIL would keep from the job what `toolkit submit` tells it",
            hint="Give --export=NONE: then it has that and nothing of this shell.",
        )
    kept = [] if wanted.upper() == "NONE" else [wanted]
    # Names alone: sbatch finds the values in its environment, whatever signs are in them.
    return ",".join([*kept, *(name for name in told if name not in names)])


def _gpu_arguments(
    job: Job, *, site: Site, gpus: int | None, given: Mapping[str, str]
) -> list[str]:
    """Return the options that ask for GPUs in the site's way and undo what the script asks."""
    asked = slurm.gpu_count(given)
    if asked is not None and gpus is not None:
        raise UsageError(
            "GPUs are asked for twice, by --gpus and by an option of sbatch",
            hint="Give one of them.",
        )
    count = gpus if gpus is not None else slurm.gpu_count(job.options)
    if asked is not None:
        options: list[str] = []
        names = set(given)
    else:
        options = shlex.split(site.gpu_option.format(count=count)) if count else []
        names = set(slurm.parse_options(options))
    # Slurm adds up --gres of the script and --gpus-per-node of the command line.
    undo = "gres" in job.options and "gres" not in names and (options or asked or gpus == 0)
    return [*(["--gres=none"] if undo else []), *options]


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the options that sbatch takes from its variables, by long names."""
    return {
        option: environment[variable]
        for variable, option in slurm.VARIABLES.items()
        if environment.get(variable)
    }


def job_environment(
    *, site: Site, site_name: str, image: Path | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables by which jobs/common.sh learns what the site's file says.

    What the caller's environment says of the same wins over the site.
    """
    wanted = settings.resolve("apptainer", site=site.settings, environment=environment).value
    told = {
        "TOOLKIT_APPTAINER": (shutil.which(wanted) or wanted) if wanted else "",
        "TOOLKIT_DEVICE": "" if site.device == "cpu" else site.device,
        "TOOLKIT_SCRATCH": site.scratch,
        "TOOLKIT_SCRATCH_GB": f"{site.scratch_gb:g}" if site.scratch_gb else "",
        "TOOLKIT_DATA": site.settings.get("data", ""),
        "TOOLKIT_CPU_BIND": site.cpu_bind,
        "TOOLKIT_BINDS": ",".join(site.binds),
        "TOOLKIT_MODULES": " ".join(site.modules),
        **site.environment,
    }
    found = {name: environment.get(name) or value for name, value in told.items()}
    passed = [*site.environment, *environment.get("TOOLKIT_PASS", "").replace(",", " ").split()]
    found["TOOLKIT_PASS"] = " ".join(dict.fromkeys(passed))
    found |= {"TOOLKIT_HOME": str(paths.home()), "TOOLKIT_SITE": site_name}
    found["IMAGE"] = str(image or "")
    return {name: value for name, value in found.items() if value}


def refuse(
    submission: Submission,
    *,
    job: Job,
    site: Site,
    site_name: str,
    partitions: Mapping[str, Partition],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Fail where the site would refuse the job or leave it in the queue for ever.

    Parameters
    ----------
    submission : Submission
        From `plan`.
    job : Job
        The job.
    site : Site
        Where.
    site_name : str
        Its name.
    partitions : mapping of Partition
        Those that there are, from the site's file or from Slurm; empty: not known.
    environment : mapping, optional
        By default the environment of this process.

    Raises
    ------
    UsageError
        With the reason and what to give instead.
    """
    environment = os.environ if environment is None else environment
    command_line = slurm.parse_options(submission.options)
    options = job.options | from_environment(environment) | command_line
    for name in site.rejects:
        if name.lstrip("-") in options:
            raise UsageError(f"{site_name} refuses the option {name} for jobs")
    partition = options.get("partition") or next(
        (name for name, p in partitions.items() if p.default), ""
    )
    if site.account_required and not options.get("account"):
        raise UsageError(
            f"{site_name} refuses jobs without an account",
            hint="Add `-- --account=YOUR_PROJECT`, or set SBATCH_ACCOUNT once for all.",
        )
    _, nodes = _nodes(options)
    asked, limit = _gpus_asked(options), site.gpus_per_node * nodes
    if site.gpus_per_node and asked > limit:
        raise UsageError(
            f"{asked} GPUs are more than {site_name} has on {nodes} node(s): {limit}",
            hint="Ask for fewer, or for more nodes: `-- --nodes=N`.",
        )
    # Several may be named by commas; the job runs in any one of them.
    candidates = partition.split(",") if partition else []
    for name in candidates:
        if partitions and name not in partitions:
            raise UsageError(
                f"{site_name} has no partition {name!r}", hint=schema.nearest(name, partitions)
            )
    if candidates and partitions:
        _refuse_size(options, candidates, partitions=partitions, site_name=site_name)


def _refuse_size(
    options: Mapping[str, str],
    candidates: Sequence[str],
    *,
    partitions: Mapping[str, Partition],
    site_name: str,
) -> None:
    """Fail where none of some partitions takes so many nodes for so long."""
    place = f"partition {','.join(candidates)} at {site_name}"
    fewest, nodes = _nodes(options)
    # Of a range Slurm gives as many as the partition allows, if the fewest are.
    roomy = [name for name, p in partitions.items() if _fits(fewest, p.max_nodes)]
    if not set(candidates) & set(roomy):
        most = max(partitions[name].max_nodes for name in candidates)
        raise UsageError(
            f"--nodes={options['nodes']} is more than {most}, the limit of {place}",
            hint=_elsewhere("fewer", roomy),
        )
    if "time" in options:
        try:
            minutes = slurm.parse_minutes(options["time"])
        except ValueError as error:
            raise UsageError(
                f"--time: {error}", hint="Slurm's forms are MINUTES, H:M:S and D-H:M:S."
            ) from error
        limits = {name: p.minutes(nodes) for name, p in partitions.items()}
        allowing = [name for name in roomy if _fits(minutes, limits[name])]
        if not set(candidates) & set(allowing):
            longest = max(limits[name] for name in candidates if name in roomy)
            small = any(partitions[name].by_nodes for name in candidates)
            raise UsageError(
                f"--time={options['time']} is longer than {slurm.format_minutes(longest)},"
                f" the limit of {place}"
                + (f" for {nodes} node{'s' * (nodes > 1)}" if small else ""),
                hint=_elsewhere("less", allowing),
            )


def _elsewhere(what: str, names: Sequence[str]) -> str:
    if not names:
        return f"Ask for {what}: no partition there allows it."
    return f"Ask for {what}, or for a partition that allows it: {', '.join(names)}."


def _nodes(options: Mapping[str, str]) -> tuple[int, int]:
    """Return for how many nodes options of sbatch ask: the fewest and the most."""
    numbers = [int(number) for number in re.findall(r"\d+", options.get("nodes", ""))] or [1]
    return numbers[0], numbers[-1]


def _gpus_asked(options: Mapping[str, str]) -> int:
    """Return for how many GPUs options of sbatch ask, on all nodes together."""
    if options.get("gres") == "none":
        options = {name: value for name, value in options.items() if name != "gres"}
    count = slurm.gpu_count(options) or 0
    if "gres" in options or "gpus-per-node" in options:
        return count * _nodes(options)[1]
    if "gpus-per-task" in options and "gpus" not in options:
        tasks = options.get("ntasks", "1")
        if not tasks.isdecimal():
            raise UsageError(f"--ntasks: {tasks!r} is not a number")
        return count * int(tasks)
    return count


def _fits(minutes: int | None, limit: int) -> bool:
    return limit == 0 or (minutes is not None and minutes <= limit)


def container_command(job: Job, submission: Submission) -> list[str]:
    """Return the command line that the job will run its container with.

    The script itself is asked, by a dry run on this host. Only what it finds out on the
    node can differ there: the program, the device where the site names none, whether
    images can be mounted, the number of the job.

    Raises
    ------
    UsageError
        If the script takes the call for a wrong one, with its own message.
    ToolkitError
        If it fails otherwise.
    """
    if not submission.start.is_dir():
        # Slurm would start the job in /tmp.
        raise UsageError(
            f"no folder {submission.start}, which --chdir names",
            hint="The job starts there, and looks there for what its arguments name.",
        )
    # Should this run in a job, that job's variables are not those of the next.
    mine = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = processes.run(
        ["bash", job.script, *submission.own],
        environment=mine | submission.environment | {"TOOLKIT_DRY_RUN": "1"},
        cwd=submission.start,
    )
    if done.code != 0:
        message, _, hint = done.stderr.strip().partition("\n")
        kind = UsageError if done.code == UsageError.code else ToolkitError
        raise kind(message.removeprefix("error: "), hint=hint.strip())
    return shlex.split(done.stdout)


def require_slurm(job: Job) -> None:
    """Fail if this host has no Slurm, and say what to do without one.

    Raises
    ------
    ToolkitError
        If sbatch is not on the PATH.
    """
    if not slurm.available():
        raise ToolkitError(
            "no sbatch on this host's PATH",
            hint=f"Log in to the cluster, or run the job here: bash {job.script}",
        )


def submit(submission: Submission) -> Queued:
    """Put a job into the queue.

    Raises
    ------
    ToolkitError
        If Slurm refuses it.
    """
    done = slurm.submit(
        submission.arguments, environment=submission.environment, cwd=submission.folder
    )
    log = slurm.job(done.job_id).get("StdOut", "") if not done.cluster else ""
    return Queued(job_id=done.job_id, cluster=done.cluster, log=log)

"""Builds as far as they need no container: bases, inputs, room, reasons, clean-up."""

import dataclasses
import os
import shutil
import socket
from pathlib import Path

import pytest
import sif_files

from toolkit import (
    apptainer,
    build,
    buildlog,
    catalogue,
    files,
    hostpip,
    lock,
    making,
    orders,
    paths,
    processes,
    sif,
    squashfs,
    verify,
    workspace,
)
from toolkit.errors import Interrupted, ToolkitError, UsageError

LOGS = Path(__file__).parent / "data/build"
MONAI, CPU = catalogue.load("monai"), catalogue.load("pytorch-cpu")


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Let no setting of this host count, and build in a folder of the test."""
    for variable in [name for name in os.environ if name.startswith("TOOLKIT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TOOLKIT_BUILD_DIR", str(tmp_path / "build"))
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Give the host a site of its own; the function sets its vendor's SIF."""
    folder = tmp_path / "sites"
    folder.mkdir()
    monkeypatch.setattr(paths, "sites", lambda: folder)

    def write(base=""):
        text = f'description = "own"\ndetect = ".*"\n[settings]\nbase = "{base}"\n'
        (folder / "own.toml").write_text(text)

    write()
    return write


@pytest.fixture
def base(tmp_path):
    return sif_files.write(tmp_path / "vendor.sif")


# The base.


def test_a_named_base_goes_before_all(site, base, monkeypatch):
    site("/vendor/of/the/site.sif")
    chosen = orders.choose_base(MONAI, option=str(base))
    assert chosen == orders.Base(base, "vendor.sif", "option --base")
    monkeypatch.setenv("TOOLKIT_BASE", str(base))
    assert orders.choose_base(MONAI).reason == "environment TOOLKIT_BASE"


def test_a_relative_base_is_one_of_the_working_folder(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert orders.choose_base(MONAI, option=base.name).path == base


def test_an_image_of_the_catalogue_can_be_named(site):
    chosen = orders.choose_base(MONAI, option="pytorch-rocm")
    assert (chosen.path, chosen.image) == (None, "pytorch-rocm")


def test_the_vendors_sif_of_the_site(site, base):
    site(base)
    chosen = orders.choose_base(MONAI)
    assert chosen == orders.Base(base, "vendor.sif", "vendor image of site own")
    assert orders.choose_base(MONAI, site="own") == chosen


def test_else_the_catalogues_own_base_and_why(site):
    chosen = orders.choose_base(MONAI)
    assert (chosen.path, chosen.name, chosen.image) == (None, "pytorch-cpu", "pytorch-cpu")
    assert "site own has no vendor image" in chosen.reason
    site("/not/on/this/machine.sif")
    assert "site own is not on this machine" in orders.choose_base(MONAI).reason


def test_an_unknown_site(site):
    with pytest.raises(UsageError, match="unknown site 'won'") as caught:
        orders.choose_base(MONAI, site="won")
    assert caught.value.hint == "did you mean own?"


def test_an_image_that_is_a_base_takes_none(base, monkeypatch):
    with pytest.raises(UsageError, match="takes no --base"):
        orders.choose_base(CPU, option=str(base))
    monkeypatch.setenv("TOOLKIT_BASE", str(base))
    chosen = orders.choose_base(CPU)
    assert chosen.path is None
    assert chosen.name == "Debian 12"


def test_unusable_bases(tmp_path, site):
    def refuse(path, kind, said):
        with pytest.raises(kind) as caught:
            orders.choose_base(MONAI, option=str(path))
        assert said in caught.value.message
        assert str(path) in caught.value.message
        assert caught.value.hint

    refuse(tmp_path / "none.sif", UsageError, "does not exist (option --base)")
    refuse(tmp_path, UsageError, "is a folder")
    text = tmp_path / "text.sif"
    text.write_text("Bootstrap: docker\n")
    refuse(text, sif.NotASif, "is not a SIF file (it is a definition file)")
    cut = sif_files.write(tmp_path / "cut.sif")
    cut.write_bytes(cut.read_bytes()[:-10])
    refuse(cut, sif.DamagedSif, "10 bytes are missing")
    other = sif_files.write(tmp_path / "other.sif", architecture=b"06")
    refuse(other, ToolkitError, "is for ppc64le")


# What an image is made from.


def order(base, *, image=MONAI, name="monai", **changes):
    """Return what is to be built, as a default build would."""
    whole = {
        "name": name, "image": image, "base": base, "packages": (), "how": "layer",
        "link": Path("x.sif"), "named": False, "folder": Path(), "wheelhouse": None,
        "allow_source": False,
    }  # fmt: skip
    return orders.Order(**(whole | changes))


def test_inputs_tell_when_anything_changes(base):
    def inputs(content="aa", **changes):
        chosen = orders.Base(base, base.name, "")
        return orders.inputs_of(order(chosen, **changes), hashed=lambda: (content,))

    before = inputs()
    assert before == inputs()
    assert {
        "definitions/monai.def",
        "containers/monai.toml",
        "toolkit/inside/guard.py",
        "toolkit/inside/smoke.py",
        "base",
        "base's content",
    } <= before.keys()

    def differs(other):
        return {name for name in before | other if before.get(name) != other.get(name)}

    assert differs(inputs(packages=("einops",))) == {"further packages"}
    assert differs(inputs("bb")) == {"base's content"}
    assert differs(inputs(how="full")) == {"the way to build"}
    assert differs(inputs(how="thin")) == {"the way to build", "base's place"}
    assert differs(inputs(wheelhouse=Path("/w"))) == {"wheelhouse"}
    assert differs(inputs(allow_source=True)) == {"source distributions"}


def test_inputs_follow_the_files_content(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    for name, text in [("definitions/x.def", "Bootstrap: docker"), ("containers/x.toml", "")]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    image = dataclasses.replace(CPU, definition="x.def")
    wanted = order(orders.Base(None, "Debian 12", ""), image=image, name="x", how="full")
    before = orders.inputs_of(wanted, hashed=tuple)
    (tmp_path / "definitions/x.def").write_text("Bootstrap: yum")
    after = orders.inputs_of(wanted, hashed=tuple)
    assert {name for name in before if before[name] != after[name]} == {"definitions/x.def"}
    (tmp_path / "containers/x@Debian-12.lock").write_text("")
    locked = orders.inputs_of(wanted, hashed=tuple)
    assert {name for name in locked if after.get(name) != locked[name]} == {"x@Debian-12.lock"}


def test_bases_of_one_name_have_their_own_locks(tmp_path, monkeypatch, base):
    for folder in (paths.containers(), paths.definitions()):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.lock"))
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    program = apptainer.Program(tmp_path / "apptainer", "apptainer", (1, 4, 5), "PATH")
    wanted = order(orders.Base(base, "vendor.sif", ""))
    contents = [{"base's content": letter * 64} for letter in "ab"]
    for number, content in enumerate(contents):
        place = orders.lock_path(wanted, content)
        assert not place.exists()
        kept, drift = orders.kept_lock(wanted, content, program)
        if number:
            assert "the base's content has changed: vendor.sif was aaaa" in drift[0]
            with pytest.raises(ToolkitError, match=r"--locked: the base's content") as caught:
                orders.require_lock(wanted, content, kept, drift)
            assert place.name in caught.value.hint
        else:
            assert (kept, place.name) == (None, "monai@vendor.lock")
        place.write_text(lock.dumps(orders.lock_now(wanted, content, program, "3.11.2", ())))
    assert place.name == f"monai@vendor-{'b' * 12}.lock"
    for content in contents:
        assert orders.kept_lock(wanted, content, program)[1] == []
    # Those that are made here are made anew all the time: of them the last counts.
    made = wanted._replace(base=orders.Base(base, "vendor.sif", "", image="pytorch-cpu"))
    assert {orders.lock_path(made, c).name for c in contents} == {"monai@vendor.lock"}


def test_how_an_image_is_built(base):
    some, none = orders.Base(base, "b.sif", ""), orders.Base(None, "Debian 12", "")
    assert orders.choose_way(some) == "layer"
    assert orders.no_layer(MONAI, some) == ""
    assert orders.choose_way(none) == "full"
    assert orders.choose_way(some, how="thin") == "thin"
    with pytest.raises(UsageError, match="no SIF below it"):
        orders.choose_way(none, how="layer")
    with pytest.raises(UsageError, match="unknown way to build 'half'"):
        orders.choose_way(some, how="half")


def test_a_base_that_no_layer_can_lie_on(tmp_path):
    ext3 = sif_files.write(tmp_path / "x.sif", parts=[sif_files.partition(file_system=2)])
    assert "no plain squashfs" in orders.no_layer(MONAI, orders.Base(ext3, "x.sif", ""))


# A whole build, with stand-ins for Apptainer and the verification.


class StandIn:
    """What would run Apptainer; it says how often it was asked to."""

    def __init__(self):
        self.builds, self.arguments, self.seen = 0, {}, []
        self.result, self.labels = processes.Result(0, ""), {}
        self.verdict = verify.Result("import monai", "pass", "imported")
        self.during = lambda: None

    def build(self, program, definition, output, *, arguments, line, **_):
        self.builds += 1
        self.arguments = dict(arguments)
        for text in self.result.stdout.splitlines():
            line(text)
        sif_files.write(output, labels=self.labels)
        self.during()
        return self.result

    def verify(self, path, **_):
        return verify.Report(path, "monai", (self.verdict,))

    def make(self, **options):
        return build.build("monai", how="full", report=self.seen.append, **options)


@pytest.fixture
def stand_in(monkeypatch, tmp_path, site):
    found = StandIn()
    program = apptainer.Program(tmp_path / "usr/bin/apptainer", "apptainer", (1, 4, 5), "PATH")
    monkeypatch.setattr(apptainer, "find", lambda: program)
    monkeypatch.setattr(apptainer, "build", found.build)
    monkeypatch.setattr(verify, "verify", found.verify)
    monkeypatch.setattr(squashfs, "extract", lambda *_, **__: {})
    monkeypatch.setattr(hostpip, "read", dict)
    monkeypatch.setattr(files, "free_bytes", lambda path: 10**12)
    found.labels = {"toolkit.version": "1.4.0", "toolkit.torch.version": "2.3.0+rocm6.0"}
    return found


def left(tmp_path):
    """Return what is in the folders of finished images and of work."""
    hidden = (".state", ".cache", "logs")
    finished = [p.name for p in (tmp_path / "build").glob("*") if p.name not in hidden]
    return sorted(finished + [p.name for p in (tmp_path / "tmp").iterdir()])


def test_a_build_is_published_under_a_name_that_tells_what_is_in_it(tmp_path, stand_in, base):
    built = stand_in.make(base=str(base))
    name = "monai-1.4.0-torch2.3.0+rocm6.0.sif"
    assert built.path == tmp_path / "build" / name
    assert left(tmp_path) == [name, "monai.sif"]
    assert os.readlink(tmp_path / "build/monai.sif") == name
    assert stand_in.seen[0] == f"base of monai: {base} (option --base)"
    assert stand_in.arguments["FROM"] == str(base)
    assert stand_in.arguments["BASE_NAME"] == "vendor.sif"
    assert stand_in.arguments["BASE_REASON"] == "option --base"
    assert built.changed


def test_nothing_is_done_twice(tmp_path, stand_in, base):
    first = stand_in.make(base=str(base))
    second = stand_in.make(base=str(base))
    assert (second.path, second.changed, second.report) == (first.path, (), None)
    assert stand_in.builds == 1
    assert stand_in.make(base=str(base), force=True).changed == ("--force",)
    assert stand_in.builds == 2
    os.utime(base, (1, 1))
    assert stand_in.make(base=str(base)).changed == ()  # what is in it counts
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    assert stand_in.make(base=str(base)).changed == ("base's content has changed",)
    assert stand_in.make(base=str(base), packages=["einops"]).changed == (
        "further packages has changed",
    )
    assert stand_in.builds == 4


def test_a_finished_file_that_was_changed_or_taken_away_is_made_again(tmp_path, stand_in, base):
    path = stand_in.make(base=str(base)).path
    path.write_bytes(path.read_bytes() + b"x")
    assert "changed since it was built" in stand_in.make(base=str(base)).changed[0]
    path.unlink()
    assert "not there" in stand_in.make(base=str(base)).changed[0]
    (state,) = (tmp_path / "build/.state").glob("*.json")
    state.write_text("{")
    assert "not known how it was made" in stand_in.make(base=str(base)).changed[0]
    state.write_text("[]")
    assert "not known how it was made" in stand_in.make(base=str(base)).changed[0]
    assert stand_in.make(base=str(base)).changed == ()


def test_a_named_output_gets_that_name_alone(tmp_path, stand_in, base):
    output = tmp_path / "own/x.sif"
    assert stand_in.make(base=str(base), output=output).path == output
    assert os.listdir(output.parent) == ["x.sif"]


def test_further_packages_reach_the_definition_as_one_value(stand_in, base):
    stand_in.make(base=str(base), packages=["einops>=0.6", "a; python_version < '3.9'"])
    assert stand_in.arguments["PACKAGES"] == (
        "'einops>=0.6' 'a; python_version < '\"'\"'3.9'\"'\"''"
    )


def test_a_base_takes_no_further_packages(stand_in):
    with pytest.raises(UsageError, match="takes no further packages"):
        build.build("pytorch-cpu", packages=["x"], report=print)
    assert stand_in.builds == 0


def test_a_failed_build_leaves_the_image_that_there_was(tmp_path, stand_in, base):
    stand_in.make(base=str(base))
    before = left(tmp_path)
    stand_in.result = processes.Result(255, "refused: torch 2.13.0 would replace the base's")
    with pytest.raises(ToolkitError) as caught:
        stand_in.make(base=str(base), force=True)
    assert caught.value.message == ("building monai failed: torch 2.13.0 would replace the base's")
    log = tmp_path / "build/logs/monai.log"
    assert str(log) in caught.value.hint
    assert log.read_text() == stand_in.result.stdout + "\n"
    assert left(tmp_path) == before
    # The old image is what it was: it needs no build.
    assert stand_in.make(base=str(base)).changed == ()


def test_an_image_that_does_not_hold_is_not_published(tmp_path, stand_in, base):
    stand_in.verdict = verify.Result("import monai", "fail", "monai is not installed")
    with pytest.raises(ToolkitError, match="import monai: monai is not installed"):
        stand_in.make(base=str(base))
    assert left(tmp_path) == []


@pytest.mark.parametrize("error", [Interrupted(15), KeyboardInterrupt(), OSError(5, "I/O")])
def test_whatever_ends_a_build_leaves_nothing(tmp_path, stand_in, base, error):
    def during():
        raise error

    stand_in.during = during
    with pytest.raises(type(error)):
        stand_in.make(base=str(base))
    assert left(tmp_path) == []
    stand_in.during = lambda: None
    stand_in.make(base=str(base))


def test_a_disk_that_fills_is_told_by_its_remedy(tmp_path, stand_in, base):
    def during():
        # As of a file that is copied: the first name is of what is read.
        raise OSError(28, "No space left on device", "/read/from", None, "/written/to")

    stand_in.during = during
    with pytest.raises(ToolkitError, match=r"No space left .* set TMPDIR or TOOLKIT_TMPDIR"):
        stand_in.make(base=str(base))
    assert left(tmp_path) == []


@pytest.mark.parametrize("short", ["tmp", "build"])
def test_too_little_room_is_said_before_anything_starts(
    tmp_path, stand_in, base, monkeypatch, short
):
    place = tmp_path / short
    free = {True: 5 * 10**8, False: 10**12}
    monkeypatch.setattr(
        files, "free_bytes", lambda path: free[Path(path).absolute().is_relative_to(place)]
    )
    with pytest.raises(ToolkitError, match="too little disk space") as caught:
        stand_in.make(base=str(base))
    assert str(place) in caught.value.message
    assert "0.5 GB free" in caught.value.message
    assert "TOOLKIT_" in caught.value.hint
    assert stand_in.builds == 0
    assert left(tmp_path) == []


def test_an_unknown_image_leaves_not_even_a_folder(tmp_path, stand_in):
    with pytest.raises(UsageError, match="unknown image 'monia'") as caught:
        build.build("monia", report=print)
    assert caught.value.hint == "did you mean monai?"
    assert not (tmp_path / "build").exists()


def test_half_made_images_of_killed_builds_are_taken_away(tmp_path, stand_in, base):
    (tmp_path / "build").mkdir()
    dead = tmp_path / f"build/.partial-{socket.gethostname()}-999999999-monai.sif"
    alive = tmp_path / f"build/.partial-{socket.gethostname()}-{os.getppid()}-monai.sif"
    elsewhere = tmp_path / "build/.partial-another-host-999999999-monai.sif"
    elsewhere.touch()
    dead.touch()
    alive.touch()
    stand_in.make(base=str(base))
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()


# Names and reasons.


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({"toolkit.version": "1.4.0", "toolkit.torch.version": "2.3.0"}, "x-1.4.0-torch2.3.0.sif"),
        ({"toolkit.version": "2.13.0+cpu", "toolkit.torch.version": "2.13.0+cpu"},
         "x-2.13.0+cpu.sif"),
        ({"toolkit.torch.version": "2.3.0"}, "x-torch2.3.0.sif"),
        ({}, "x.sif"),
    ],
)  # fmt: skip
def test_file_name(tmp_path, labels, name):
    assert making.file_name("x", sif_files.write(tmp_path / "y.sif", labels=labels)) == name


def test_what_of_a_build_is_shown():
    shown = [
        buildlog.worth_showing(line) for line in (LOGS / "pytorch-cpu.log").read_text().split("\n")
    ]
    shown = [line for line in shown if line]
    assert shown[0] == "Starting build..."
    assert "constraints of the base: none" in shown
    assert "adding torch 2.13.0+cpu" in shown
    assert "torch 2.13.0+cpu is the base's own" in shown
    assert any(line.startswith("Successfully installed") for line in shown)
    assert shown[-1].startswith("Build complete: ")
    assert not any(line.startswith(("+ ", "WARNING", "INFO")) for line in shown)


def test_why_a_package_was_refused():
    said = buildlog.why_failed((LOGS / "intruder.log").read_text())
    assert said == (
        "files of torch 2.13.0+cpu are not those of the base:"
        " torch/functional.py, written by intruder 1.0"
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("refused: one\nrefused: two\nFATAL:   While performing build", "one; two"),
        ("+ x\ncp: error: No space left on device\nFATAL:   exit status 1",
         "No space left on device: set TMPDIR"),
        ("refused: the list: [Errno 28] No space left on device", "set TMPDIR"),
        ("FATAL:   write /o/.partial-h-1-x.sif: no space left on device", "another place"),
        ("E: Unable to locate package x\nFATAL:   exit status 100", "E: Unable to locate package"),
        ("ERROR: first\nERROR: last\nFATAL:   exit status 1", "last"),
        ("FATAL:   Unable to build from x.def: no such file", "Unable to build from x.def"),
        ("FATAL:   Get \"https://x/v2/\": dial tcp: lookup x: no such host", "network"),
        ("Segmentation fault\n\n", "Segmentation fault"),
        ("", "nothing was printed"),
    ],
)  # fmt: skip
def test_why_failed(output, said):
    assert said in buildlog.why_failed(output)


def test_a_refusal_goes_before_a_network_that_wavered():
    retry = "WARNING: Retrying after connection broken: Connection timed out"
    said = buildlog.why_failed(f"{retry}\nrefused: torch 2.13.0 would replace the base's\n")
    assert said == "torch 2.13.0 would replace the base's"


# What is refused before anything is built.


@pytest.mark.parametrize(
    ("name", "ours", "force", "said"),
    [
        ("folder", False, True, "is a folder"),
        ("base.sif", True, True, "is the base itself"),
        ("notes.txt", False, False, "exists and was not made by this toolkit"),
        ("notes.txt", True, False, ""),
        ("notes.txt", False, True, ""),
        ("new.sif", False, False, ""),
        ("/dev/null", True, True, "is no file"),
    ],
)
def test_what_is_not_ours_is_not_written_over(tmp_path, name, ours, force, said):
    (tmp_path / "folder").mkdir()
    for file in ("base.sif", "notes.txt"):
        (tmp_path / file).write_text("precious")
    link = tmp_path / name

    def check():
        orders.check_output(link, below=[tmp_path / "base.sif"], ours=ours, force=force)

    if not said:
        return check()
    with pytest.raises(UsageError, match=said):
        check()
    return None


@pytest.mark.parametrize(
    "text",
    ["tqdm", "tqdm >=4.6, <5", "a-b[c,d]==1.0+cpu", "x; python_version < '3.9'", "x (>1)",
     "x @ https://index.example/x.whl", "x[y] ~= 1.0 ; sys_platform == 'linux'", "scipy!=1.*"],
)  # fmt: skip
def test_what_is_a_requirement_is_taken(text):
    orders.check_packages(catalogue.load("monai"), [text])


@pytest.mark.parametrize(
    "text",
    ["a\nFROM=/x", "", "{{ FROM }}", "tqdm\x1b[1m", "--pre", "-r file", "./x.whl", "/x/y.whl",
     "https://index.example/x.whl", "foo; ", "foo bar", "x==", "x>=1,", "../x", "x[", "-"],
)  # fmt: skip
def test_what_is_no_requirement_is_refused(text):
    with pytest.raises(UsageError, match="is no requirement"):
        orders.check_packages(catalogue.load("monai"), [text])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    workspace.require_writable(tmp_path / "new" / "newer")
    with pytest.raises(UsageError, match="nothing can be written to"):
        workspace.require_writable(tmp_path / "file" / "below")


def test_a_file_with_another_hash_is_named():
    output = (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have"
        " updated the package versions, please update the hashes.\n"
        "    tqdm==4.67.1 from file:///mnt/w/tqdm-4.67.1.whl (from -r r.txt (line 2)):\n"
        "        Expected sha256 aa11\n"
        "             Got        bb22\n\n"
        "FATAL:   While performing build: while running %post section: exit status 1\n"
    )
    said = "tqdm==4.67.1 is another file than the lock names: sha256 bb22, not aa11"
    assert buildlog.why_failed(output) == said


def test_a_failure_elsewhere_is_not_blamed_on_a_retry():
    output = (
        "WARNING: Retrying after connection broken by 'Connection refused'\n"
        "ValueError: No closing quotation\n"
        "FATAL:   While performing build: while running %post section: exit status 1\n"
    )
    assert buildlog.why_failed(output) == "ValueError: No closing quotation"
    lost = "\x1b[31mFATAL:   conveyor failed: dial tcp: lookup x: no such host\x1b[0m"
    assert buildlog.why_failed(lost).startswith("the network was not reached")
    assert "FATAL" not in buildlog.why_failed(lost)

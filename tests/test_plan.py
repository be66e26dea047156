"""Plans: rows, sizes, the choice of the base, and the real thing in a real base."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from images import run_toolkit
from typer.testing import CliRunner
from wheels import make_wheel

from toolkit import apptainer, catalogue, hostpip, making, orders, paths, plan, processes, sif
from toolkit.cli import app
from toolkit.errors import ToolkitError, UsageError

#: What ``guard.py plan`` prints.
ANSWER: dict[str, Any] = {
    "python": "3.10.12",
    "torch": {"version": "2.3.0a0+gitd2f9472", "hip": "6.0.3", "cuda": None, "git_version": ""},
    "constraints": ["torch==2.3.0a0+gitd2f9472", "numpy<2"],
    "kept": [{"name": "torch", "version": "2.3.0a0+gitd2f9472", "asked": []}],
    "added": [
        {"name": "monai", "version": "1.4.0", "filename": "monai-1.4.0-py3-none-any.whl",
         "hashes": ["sha256:00"], "asked": ["you ask for monai==1.4.0"], "size": None,
         "url": "https://index.example/monai-1.4.0-py3-none-any.whl"},
        {"name": "nibabel", "version": "5.3.2", "filename": "nibabel-5.3.2-py3-none-any.whl",
         "hashes": [], "asked": ["you ask for nibabel>=5"], "size": 3293839, "url": ""},
    ],
    "changed": [
        {"name": "pillow", "version": "11.3.0", "was": "8.0", "filename": "pillow.whl",
         "hashes": [], "asked": ["you ask for pillow>=9"], "size": None,
         "url": "https://index.example/pillow.whl"},
    ],
    "refused": [],
}  # fmt: skip
REFUSED: dict[str, Any] = ANSWER | {
    "added": [],
    "changed": [],
    "refused": [
        {"name": "torch", "version": ">=2.4.1", "asked": ["monai 1.5.0 asks for torch>=2.4.1"],
         "why": "the base has torch 2.3, which must stay", "remedy": "monai 1.4.0 fits this base.",
         "text": "monai 1.5.0 asks for torch>=2.4.1; the base has torch 2.3, which must stay"},
        {"name": "", "version": "", "asked": [], "why": "", "text": "pip said nothing",
         "remedy": ""},
    ],
}  # fmt: skip


def planned(answer: dict[str, Any] = ANSWER, known: dict[str, int] | None = None) -> plan.Plan:
    return plan.Plan(
        image="monai",
        base="vendor.sif",
        reason="option --base",
        python=answer["python"],
        torch=answer["torch"]["version"],
        rows=plan.rows(answer, known or {}),
        refusals=tuple(plan.Refusal(r["text"], r["remedy"]) for r in answer["refused"]),
    )


def test_rows_have_a_state_and_a_size() -> None:
    rows = plan.rows(ANSWER, {"https://index.example/monai-1.4.0-py3-none-any.whl": 1511882})
    assert [(r.state, r.name, r.version, r.was, r.size) for r in rows] == [
        ("kept", "torch", "2.3.0a0+gitd2f9472", "", None),
        ("added", "monai", "1.4.0", "", 1511882),
        ("added", "nibabel", "5.3.2", "", 3293839),
        ("changed", "pillow", "11.3.0", "8.0", None),
    ]
    assert rows[1].asked == ("you ask for monai==1.4.0",)
    # A failure that is about no package has no row; it is told all the same.
    assert [r.name for r in plan.rows(REFUSED, {})] == ["torch", "torch"]


def test_the_summary_counts() -> None:
    assert plan.summary(planned()) == (
        "2 added, 1 changed, 0 refused; 3.3 MB to download and 2 of unknown size;"
        " torch 2.3.0a0+gitd2f9472 stays as it is"
    )
    assert plan.summary(planned(REFUSED)).startswith(
        "0 added, 0 changed, 2 refused; nothing to download; torch"
    )


def test_what_is_refused_is_an_error_with_a_remedy() -> None:
    plan.require_possible(planned())
    with pytest.raises(ToolkitError) as error:
        plan.require_possible(planned(REFUSED))
    assert error.value.code == 1
    assert error.value.message == (
        "monai cannot be built on vendor.sif: monai 1.5.0 asks for torch>=2.4.1;"
        " the base has torch 2.3, which must stay. Also: pip said nothing"
    )
    assert error.value.hint == "monai 1.4.0 fits this base."


# Sizes.


class Index(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        user = self.headers.get("Authorization", "")
        if self.path == "/moved.whl":
            self.send_response(302)
            self.send_header("Location", "/a.whl")
        elif self.path == "/private.whl" and not user:
            self.send_response(401)
            self.send_header("Content-Length", "99")
        elif self.path == "/gone.whl":
            self.send_response(404)
            self.send_header("Content-Length", "12")
        elif self.path == "/silent.whl":
            self.send_response(200)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "1234567")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_sizes_are_asked_of_the_server(index: str) -> None:
    names = ("a", "moved", "private", "gone", "silent")
    urls = [f"http://{index}/{name}.whl" for name in names]
    assert plan.sizes(urls, {}) == {urls[0]: 1234567, urls[1]: 1234567}
    login = {"extra-index-url": f"file:///x http://me:p%40ss@{index}/simple"}
    assert plan.sizes(urls[2:], login) == {urls[2]: 1234567}
    assert plan.sizes(["http://127.0.0.1:1/x.whl", "what is this"], {}) == {}
    assert plan.sizes([], {}) == {}


# The base.


def test_a_base_is_no_image_to_plan(tmp_path: Path) -> None:
    image = catalogue.load("pytorch-cpu")
    with pytest.raises(UsageError, match="is itself a base"):
        plan.base_of("pytorch-cpu", image, option="", site="", report=print)


def test_a_base_in_a_registry_is_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fetch(base: orders.Base, *_: Any) -> orders.Base:
        seen.append(base.reference)
        return base._replace(path=tmp_path / "x.sif")

    monkeypatch.setattr(making, "fetch_base", fetch)
    reference = "docker://registry.example/x:1"
    found = plan.base_of("monai", catalogue.load("monai"), option=reference, site="", report=print)
    assert found[0] == tmp_path / "x.sif"
    assert seen == [reference]


def test_a_base_that_has_not_been_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_BUILD_DIR", str(tmp_path))
    monkeypatch.delenv("TOOLKIT_BASE", raising=False)
    image = catalogue.load("monai")
    with pytest.raises(ToolkitError, match="pytorch-cpu has to be built first") as error:
        plan.base_of("monai", image, option="", site="local", report=print)
    assert error.value.code == 1
    assert "toolkit build pytorch-cpu" in error.value.hint
    (tmp_path / "pytorch-cpu-2.sif").write_bytes(b"")
    (tmp_path / "pytorch-cpu.sif").symlink_to("pytorch-cpu-2.sif")
    monkeypatch.setattr(sif, "read", lambda path: None)
    monkeypatch.setattr(sif, "require_architecture", lambda path, header: None)
    found, reason = plan.base_of("monai", image, option="", site="local", report=print)
    assert found == tmp_path / "pytorch-cpu-2.sif"
    assert reason.startswith("default")
    assert set(tmp_path.rglob("*")) == {tmp_path / "pytorch-cpu.sif", found}


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_a_folder_that_cannot_be_downloaded_to(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="comma or a colon"):
        plan.require_folder(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        plan.require_folder(tmp_path / "file")
    plan.require_folder(tmp_path / "new" / "folder")
    there = tmp_path / "new" / "folder" / "requirements.txt"
    there.write_text("my-own==1\n")
    with pytest.raises(UsageError, match=r"requirements\.txt is not of an earlier plan"):
        plan.require_folder(there.parent)
    assert there.read_text() == "my-own==1\n"
    assert (tmp_path / "new" / "folder").is_dir()


# The command line, with what a container would have printed.


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let containers print an answer; return what was asked."""
    seen: dict[str, Any] = {"answer": ANSWER}

    def execute(image: Path, command: list[str], **options: Any) -> processes.Result:
        seen.update(image=image, command=command, **options)
        (host,) = [b.split(":")[0] for b in options["binds"] if b.endswith(f":{hostpip.INSIDE}:ro")]
        seen["files"] = {p.name for p in Path(host).iterdir()}
        seen["more"] = (Path(host) / "more.txt").read_text()
        cache = Path(host).parent / "cache"
        seen["cache"] = {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_symlink()}
        (cache / "new").write_text("")
        return processes.Result(0, "INFO: x\n" + json.dumps(seen["answer"]))

    monkeypatch.setattr(apptainer, "execute", execute)
    monkeypatch.setattr(plan, "base_of", lambda *a, **k: (tmp_path / "vendor.sif", "site x"))
    monkeypatch.setattr(plan, "sizes", lambda urls, pip: dict.fromkeys(urls, 1000))
    monkeypatch.setattr(hostpip, "read", dict)
    cache = tmp_path / "build" / ".cache" / "pip" / "http" / "a"
    cache.mkdir(parents=True)
    (cache / "entry").write_text("cached")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TOOLKIT_BUILD_DIR", str(tmp_path / "build"))
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path / "tmp"))
    return seen


def tree(folder: Path, names: str = "*") -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob(names))


def test_one_container_and_nothing_written(answered: dict[str, Any], tmp_path: Path) -> None:
    before = tree(tmp_path / "build")
    found = plan.plan("monai", packages=["einops>=0.6", "x; y == 'z'"], report=lambda line: None)
    assert answered["command"][:3] == ["python3", "/mnt/guard.py", "plan"]
    assert answered["command"][3] == "/mnt/monai.toml"
    assert {"guard.py", "monai.toml", "pip.conf"} <= answered["files"]
    assert answered["more"] == """'einops>=0.6' 'x; y == '"'"'z'"'"''"""
    assert "PIP_CONFIG_FILE=/mnt/pip.conf" in answered["options"]
    # What the builds have downloaded can be read, and stays as it is.
    assert answered["cache"] == {"http/a/entry"}
    assert tree(tmp_path / "build") == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [row.size for row in found.rows] == [None, 1000, 3293839, 1000]


def test_the_table_and_the_exit_code(answered: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["plan", "monai"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["state", "package", "version", "bytes", "who", "asks"]
    assert lines[1].split() == ["kept", "torch", "2.3.0a0+gitd2f9472", "-", "-"]
    assert lines[2].split(maxsplit=4)[:4] == ["added", "monai", "1.4.0", "1000"]
    assert lines[4].split(maxsplit=5)[:5] == ["changed", "pillow", "8.0", "->", "11.3.0"]
    assert lines[-1].startswith("2 added, 1 changed, 0 refused; 3.3 MB")


def test_a_refused_plan_still_has_its_table(answered: dict[str, Any]) -> None:
    answered["answer"] = REFUSED
    done = CliRunner().invoke(app, ["plan", "monai"])
    assert isinstance(done.exception, ToolkitError)
    assert done.exception.code == 1
    assert "refused  torch    >=2.4.1" in done.stdout
    done = CliRunner().invoke(app, ["plan", "monai", "--json"])
    assert isinstance(done.exception, ToolkitError)
    found = json.loads(done.stdout)
    assert found["refusals"][0]["remedy"] == "monai 1.4.0 fits this base."
    assert [row["state"] for row in found["rows"]] == ["kept", "refused"]


def test_nothing_tells_where_packages_come_from(answered: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["plan", "monai", "--json"])
    assert done.exit_code == 0
    assert "index.example" not in done.stdout


def test_a_download_that_failed(answered: dict[str, Any], tmp_path: Path) -> None:
    answered["answer"] = ANSWER | {"downloaded": [], "there": [], "failed": "No space left"}
    with pytest.raises(ToolkitError, match="No space left"):
        plan.plan("monai", download=tmp_path / "into", report=lambda line: None)
    assert f"{tmp_path / 'into'}:/mnt/download" in answered["binds"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuchimage"],
        ["pytorch-cpu"],
        ["monai", "--with", "  "],
        ["monai", "--wheelhouse", "/no/such/folder"],
        ["monai", "--base", "/no/such.sif"],
        ["monai", "--no-such-option"],
    ],
)
def test_wrong_calls(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2 or getattr(done.exception, "code", 0) == 2, done.output


# The real thing.


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fill a folder with small wheels of what the entry of monai asks for."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    make_wheel(folder, "monai", "1.4.0", requires=["torch>=1.9", "numpy<2,>=1.24"])
    make_wheel(folder, "monai", "1.5.0", requires=["torch>=99"])
    pins = catalogue.load("monai").pins
    for name in ("nibabel", "scipy", "pillow", "tensorboardX", "tqdm"):
        make_wheel(folder, name, pins[name])
    make_wheel(folder, "pytorch_ignite", "0.5.2", requires=["torch<3,>=1.3"])
    return folder


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    before = [tree(folder) for folder in folders]
    yield
    assert [tree(folder) for folder in folders] == before


@pytest.mark.image
def test_a_plan_in_the_base_writes_only_the_folder_to_download_to(
    cpu_sif: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    into, home, temporary = tmp_path / "into", tmp_path / "home", tmp_path / "tmp"
    for folder in (into, home, temporary):
        folder.mkdir()
    environment = {"HOME": str(home), "TOOLKIT_TMPDIR": str(temporary)}
    # Of the catalogue what is of this image: a test beside may build another one, and lock it.
    before = tree(paths.containers(), "monai*")
    with unchanged(home, temporary, wheelhouse):
        done = run_toolkit(
            *("plan", "monai", "--base", cpu_sif, "--wheelhouse", wheelhouse, "--json"),
            *("--download", into),
            environment=environment,
        )
    assert done.code == 0, done.stderr
    assert tree(paths.containers(), "monai*") == before
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["torch"]["state"] == "kept"
    assert rows["torch"]["version"] == found["torch"] == "2.13.0+cpu"
    assert rows["numpy"]["state"] == "kept"
    assert rows["monai"]["state"] == "added"
    wheel = wheelhouse / rows["monai"]["filename"]
    assert rows["monai"]["size"] == wheel.stat().st_size
    fetched = {p.name for p in into.iterdir()} - {"requirements.txt"}
    assert (
        fetched
        == set(found["downloaded"])
        == {p.name for p in wheelhouse.iterdir()} - {"monai-1.5.0-py3-none-any.whl"}
    )
    assert (into / wheel.name).read_bytes() == wheel.read_bytes()
    assert (into / "requirements.txt").read_text().count("--hash=sha256:") == len(fetched)
    plan.require_folder(into)  # of a plan: it may be filled again
    assert os.stat(into / wheel.name).st_uid == os.geteuid()


@pytest.mark.image
def test_what_does_not_fit_the_base_or_is_missing(cpu_sif: Path, wheelhouse: Path) -> None:
    arguments = ("plan", "monai", "--base", cpu_sif, "--wheelhouse", wheelhouse)
    with unchanged(wheelhouse):
        done = run_toolkit(*arguments, "--with", "monai==1.5.0")
    assert done.code == 1
    assert "monai 1.5.0 asks for torch>=99; the base has torch 2.13.0+cpu" in done.stderr
    assert "monai 1.4.0 fits this base" in done.stderr
    assert "refused  torch" in done.stdout
    done = run_toolkit(*arguments, "--with", "nosuchthing")
    assert done.code == 1
    assert "nosuchthing is not in the folder of wheels: you ask for nosuchthing" in done.stderr
    assert "Traceback" not in done.stderr
    (tqdm,) = wheelhouse.glob("tqdm-*.whl")
    whole = tqdm.read_bytes()
    tqdm.write_bytes(whole[: len(whole) // 2])
    try:
        done = run_toolkit(*arguments)
    finally:
        tqdm.write_bytes(whole)
    assert done.code == 1
    assert str(tqdm) in done.stderr and "toolkit plan --download" in done.stderr, done.stderr

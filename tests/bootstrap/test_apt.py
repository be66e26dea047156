"""The private apt: what it reads of the host, and what it hands to apt."""

import shutil
import subprocess

import pytest

from toolkit import processes
from toolkit.bootstrap import apt
from toolkit.errors import ToolkitError

ONE_LINE = """\
# a comment
deb [arch=amd64 signed-by=/k/debian-archive-keyring.gpg] http://m.example/debian bookworm main
deb-src http://m.example/debian bookworm main
deb http://m.example/debian/ bookworm-updates main contrib # more
deb [ check-valid-until=no lang+=de ] http://s.example/debian-security bookworm-security main
deb [trusted=yes] mirror+file:/etc/apt/mirrors/debian.list trixie main
deb http://flat.example/ ./
deb cdrom:[Debian GNU/Linux 12 _Bookworm_]/ bookworm main
#deb http://off.example/debian bookworm main
"""

DEB822 = """\
Types: deb deb-src
URIs: http://a.example/debian http://b.example/debian
# between the lines
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBGPL0BUBEADmW5NdOOHw
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main
"""


def test_one_line_format():
    found = apt.parse_one_line(ONE_LINE)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://m.example/debian", "bookworm"),
        ("http://m.example/debian/", "bookworm-updates"),
        ("http://s.example/debian-security", "bookworm-security"),
        ("mirror+file:/etc/apt/mirrors/debian.list", "trixie"),
    ]
    assert found[1].components == ("main", "contrib")
    # Which architectures and languages the host takes does not matter here; the key does.
    assert found[0].options == {"Signed-By": "/k/debian-archive-keyring.gpg"}
    assert found[2].options == {"Check-Valid-Until": "no"}
    assert found[3].options == {"Trusted": "yes"}


def test_deb822_format():
    found = apt.parse_deb822(DEB822)
    assert [(s.uri, s.suite) for s in found] == [
        ("http://a.example/debian", "bookworm"),
        ("http://b.example/debian", "bookworm"),
        ("http://a.example/debian", "bookworm-updates"),
        ("http://b.example/debian", "bookworm-updates"),
    ]
    assert found[0].components == ("main", "contrib")
    assert found[0].options["Signed-By"].splitlines()[1:3] == [
        "-----BEGIN PGP PUBLIC KEY BLOCK-----",
        ".",
    ]


def test_host_sources_reads_both_formats(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/debian.sources.bak").write_text(DEB822)
    assert len(apt.host_sources(etc=tmp_path)) == 8


def test_no_sources_at_all(tmp_path):
    assert apt.host_sources(etc=tmp_path) == []


def test_debian_itself_comes_before_others_that_use_its_suite_names():
    vendor = apt.Source("https://packages.vendor.example", "bookworm", ("main",))
    docker = apt.Source("https://docker.example/linux/debian", "bookworm", ("stable",))
    debian = apt.Source("http://m.example/debian", "bookworm", ("main",))
    signed = apt.Source(
        "http://m.example/d", "bookworm", ("main",), {"Signed-By": str(apt.KEYRING)}
    )
    assert apt.mirrors([vendor, docker, debian, signed]) == [signed, debian, vendor]


def test_ubuntu_is_not_debian():
    ubuntu = apt.parse_one_line("deb http://m.example/ubuntu noble main universe")
    assert apt.mirrors(ubuntu) == []
    assert apt.wanted("sid", ubuntu, "", late=False) == []


def test_wanted_keeps_options_and_takes_updates_where_the_host_does():
    host = apt.parse_one_line(
        "deb [signed-by=/k.gpg] http://m.example/debian trixie main\n"
        "deb [signed-by=/k.gpg] http://m.example/debian trixie-updates main\n"
        "deb http://s.example/debian-security trixie-security main\n"
    )
    (plain,) = apt.wanted("sid", host, "", late=False)
    assert [(s.uri, s.suite) for s in plain] == [("http://m.example/debian", "sid")]
    assert plain[0].options == {"Signed-By": "/k.gpg"}
    (late,) = apt.wanted("bookworm", host, "", late=True)
    assert [s.suite for s in late] == ["bookworm", "bookworm-updates", "bookworm-security"]


def test_a_mirror_that_was_named_wins():
    host = apt.parse_one_line("deb http://m.example/debian trixie main")
    ((source,),) = apt.wanted("sid", host, "http://mine.example/debian", late=True)
    assert source.uri == "http://mine.example/debian"
    assert source.options == {"Signed-By": str(apt.KEYRING)}


def test_sources_survive_being_written():
    found = apt.parse_deb822(DEB822)
    again = apt.parse_deb822(apt.sources_text(found))
    assert again == found


def test_uris_and_file_names(tmp_path):
    text = (
        "Reading package lists...\n"
        "'http://m.example/pool/a_1%3a2.3-4_amd64.deb' a_1%3a2.3-4_amd64.deb 120 SHA256:00\n"
        "'http://m.example/pool/b_5_all.deb' b_5_all.deb 7 SHA256:11\n"
    )
    files = apt.parse_uris(text)
    assert files == [("a_1%3a2.3-4_amd64.deb", 120), ("b_5_all.deb", 7)]
    package = apt.parse_file_name(tmp_path / files[0][0])
    assert (package.name, package.version) == ("a", "1:2.3-4")


def test_passwords_are_not_shown():
    assert apt.without_user("https://me:secret@m.example/debian") == "https://m.example/debian"
    assert apt.without_user("http://m.example/debian") == "http://m.example/debian"


def test_configuration_as_apt_itself_reads_it(tmp_path):
    """The folders are private and hooks are gone, while the host's own settings stay."""
    parts = tmp_path / "host"
    parts.mkdir()
    (parts / "01proxy").write_text(
        'Acquire::http::Proxy "http://proxy.example:3128";\n'
        'APT::Update::Post-Invoke { "touch /nowhere"; };\n'
        'APT::Architectures { "amd64"; "i386"; };\n'
        'Acquire::Languages { "de"; "en"; };\n'
    )
    first = tmp_path / "first.conf"
    first.write_text(f'Dir::Etc::parts "{parts}";\n')
    config = tmp_path / "apt.conf"
    config.write_text(apt.config_text(tmp_path / "a folder", "amd64"))
    done = subprocess.run(
        ["apt-config", "-c", str(config), "dump"],
        env={"APT_CONFIG": str(first), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.rstrip(";").split(" ", 1) for line in done.stdout.splitlines())
    values = {key.lower(): value for key, value in lines}
    assert values["acquire::http::proxy"] == '"http://proxy.example:3128"'
    assert "touch" not in done.stdout
    assert "i386" not in done.stdout
    assert values["acquire::languages::"] == '"none"'
    assert values["dir::state::lists"].startswith(f'"{tmp_path}/a folder')
    assert values["dir::etc::parts"] == f'"{parts}"'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for `fetch`, on a host whose apt sources name a mirror that does not answer."""
    monkeypatch.setenv("TOOLKIT_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    return tmp_path / "apt"


@pytest.mark.slow
def test_fetch_without_a_network_says_so_and_what_to_do(folder):
    with pytest.raises(ToolkitError, match=r"no Debian mirror gives sid: .*127\.0\.0\.1") as caught:
        apt.fetch(["hello"], suite="sid", folder=folder, line=lambda text: None)
    assert "it goes on from here" in caught.value.hint


def test_fetch_without_a_mirror(tmp_path, monkeypatch):
    monkeypatch.delenv("TOOLKIT_DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr(apt, "host_sources", lambda: [])
    with pytest.raises(ToolkitError, match="name no Debian mirror"):
        apt.fetch(["hello"], suite="sid", folder=tmp_path, line=lambda text: None)


def test_fetch_without_apt(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    apt.architecture.cache_clear()
    with pytest.raises(ToolkitError, match="neither apt-get nor dpkg"):
        apt.fetch(["hello"], suite="sid", folder=tmp_path, line=lambda text: None)


def test_fetch_downloads_from_a_mirror_and_goes_on(tmp_path, monkeypatch):
    """A real apt against a mirror on the disk: one package, and what it depends on."""
    mirror = make_mirror(tmp_path / "mirror", {"main-thing": "other-thing", "other-thing": ""})
    source = apt.Source(f"file:{mirror}", "trixie", ("main",), {"Trusted": "yes"})
    monkeypatch.delenv("TOOLKIT_DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr(apt, "host_sources", lambda: [source])
    lines: list[str] = []
    folder = tmp_path / "a folder" / "apt"
    packages, sources = apt.fetch(["main-thing"], suite="sid", folder=folder, line=lines.append)
    assert {p.name for p in packages} == {"main-thing", "other-thing"}
    assert [s.suite for s in sources] == ["sid"]
    assert all(p.path.exists() for p in packages)
    assert any("downloading 2 packages" in text for text in lines)
    packages[0].path.unlink()
    again, _ = apt.fetch(["main-thing"], suite="sid", folder=folder, line=lines.append)
    assert again == packages
    assert any("1 are there from an earlier call" in text for text in lines)


def make_mirror(root, packages):
    """Make a Debian mirror with the suite sid: empty packages, each with what it depends on."""
    binary = root / "dists/sid/main/binary-all"
    machine = processes.run(["dpkg", "--print-architecture"]).stdout.strip()
    native = root / f"dists/sid/main/binary-{machine}"
    pool = root / "pool"
    for path in (binary, native, pool):
        path.mkdir(parents=True)
    index = ""
    for name, depends in packages.items():
        tree = root / "tree" / name
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1:2.0\nArchitecture: all\nMaintainer: m <m@example>\n"
        control += f"Depends: {depends}\n" if depends else ""
        control += "Description: for a test\n"
        (tree / "DEBIAN/control").write_text(control)
        file = pool / f"{name}_2.0_all.deb"
        subprocess.run(["dpkg-deb", "--build", tree, file], check=True, capture_output=True)
        size, digest = file.stat().st_size, processes.run(["sha256sum", file]).stdout.split()[0]
        index += f"{control}Filename: pool/{file.name}\nSize: {size}\nSHA256: {digest}\n\n"
    (native / "Packages").write_text(index)
    digest = processes.run(["sha256sum", native / "Packages"]).stdout.split()[0]
    (root / "dists/sid/Release").write_text(
        f"Suite: sid\nCodename: sid\nArchitectures: {machine}\nComponents: main\nSHA256:\n"
        f" {digest} {len(index.encode())} main/binary-{machine}/Packages\n"
    )
    return root

"""The host's pip settings, handed into a build on purpose."""

import stat
from pathlib import Path

import pytest

from toolkit import hostpip, processes
from toolkit.errors import UsageError

#: What ``pip config list`` printed with settings in files and in the environment.
LISTED = r"""
:env:.find-links='/wheels'
:env:.extra-index-url='file:///mirror/simple https://more.example/simple'
:env:.quiet='1'
global.index-url='https://index.example/it\'s'
global.timeout='5'
global.disable-pip-version-check='true'
install.timeout='7'
install.find-links='/other'
freeze.timeout='99'
"""


def test_the_nearest_setting_holds():
    assert hostpip.parse_config_list(LISTED) == {
        "find-links": "/wheels",
        "extra-index-url": "file:///mirror/simple https://more.example/simple",
        "index-url": "https://index.example/it's",
        "timeout": "7",
    }


@pytest.mark.parametrize(
    "text",
    ["", "ERROR: no such thing", "global.timeout=", "global.timeout=os.system('x')", "\x00='1'"],
)
def test_what_cannot_be_read_is_left_out(text):
    assert hostpip.parse_config_list(text) == {}


def test_this_hosts_settings_by_pip_itself(monkeypatch, tmp_path):
    configuration = tmp_path / "pip.conf"
    configuration.write_text("[global]\nindex-url = https://one.example\nretries = 2\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "11")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    found = hostpip.read(environment={"https_proxy": "http://proxy.example:3128"})
    assert found["index-url"] == "https://one.example"
    assert found["retries"] == "2"
    assert found["timeout"] == "11"
    assert found["proxy"] == "http://proxy.example:3128"


def test_certificates_and_proxy_of_the_environment_are_second(monkeypatch):
    listed = processes.Result(0, "global.cert='/pip.pem'\n")
    monkeypatch.setattr(processes, "run", lambda command: listed)
    environment = {"SSL_CERT_FILE": "/ssl.pem", "HTTPS_PROXY": "http://p"}
    assert hostpip.read(environment=environment) == {"cert": "/pip.pem", "proxy": "http://p"}
    monkeypatch.setattr(processes, "run", lambda command: processes.Result(0, ""))
    environment["REQUESTS_CA_BUNDLE"] = "/requests.pem"
    assert hostpip.read(environment=environment)["cert"] == "/requests.pem"


def test_a_wheelhouse_is_all_there_is(tmp_path, folder):
    wheels = tmp_path / "with blanks é"
    with pytest.raises(UsageError, match="is no folder"):
        hostpip.only(wheels)
    wheels.mkdir()
    settings = hostpip.gather(torch_index="https://more.example", wheelhouse=wheels)
    assert settings == hostpip.only(wheels)
    staged = hostpip.stage(settings, folder, cache=tmp_path / "cache")
    lines = (folder / "pip.conf").read_text().splitlines()
    assert "no-index = true" in lines
    assert f"find-links = {hostpip.INSIDE}/find-links-0" in lines
    assert "index-url" not in " ".join(lines)
    assert f"{wheels}:{hostpip.INSIDE}/find-links-0:ro" in staged.binds


def test_a_folder_that_cannot_be_bound(tmp_path):
    (tmp_path / "a:b").mkdir()
    with pytest.raises(UsageError, match="a comma or a colon"):
        hostpip.only(tmp_path / "a:b")


def test_a_further_index_is_added_to_the_hosts(monkeypatch):
    known = {"extra-index-url": "https://one.example"}
    monkeypatch.setattr(hostpip, "read", lambda: dict(known))
    assert hostpip.gather() == known
    found = hostpip.gather(torch_index="https://two.example")
    assert found == {"extra-index-url": "https://one.example https://two.example"}


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("/wheels", "/wheels"),
        ("file:///a%20b/c", "/a b/c"),
        ("https://index.example/simple", None),
        ("git+ssh://host/x", None),
    ],
)
def test_local_path(place, path):
    assert hostpip.local_path(place) == (Path(path) if path else None)


def test_local_path_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hostpip.local_path("wheels") == tmp_path / "wheels"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "staged"
    folder.mkdir()
    return folder


def test_stage_binds_folders_and_names_them_as_seen_inside(tmp_path, folder):
    for name in ("wheels", "mirror/simple"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ca.pem").write_text("certificate")
    settings = {
        "find-links": f"{tmp_path}/wheels {tmp_path}/gone https://links.example",
        "index-url": "https://user:secret@index.example/simple",
        "extra-index-url": f"file://{tmp_path}/mirror/simple",
        "cert": f"{tmp_path}/ca.pem",
        "client-cert": f"{tmp_path}/none.pem",
        "timeout": "5",
    }
    staged = hostpip.stage(settings, folder, cache=tmp_path / "cache")
    inside = hostpip.INSIDE
    assert staged.config == f"{inside}/pip.conf"
    assert (folder / "pip.conf").read_text().splitlines() == [
        "[global]",
        f"cache-dir = {inside}/cache",
        f"cert = {inside}/cert.pem",
        f"extra-index-url = file://{inside}/extra-index-url-0/simple",
        f"find-links = {inside}/find-links-0 https://links.example",
        "index-url = https://user:secret@index.example/simple",
        "timeout = 5",
    ]
    assert (folder / "cert.pem").read_text() == "certificate"
    assert set(staged.binds) == {
        f"{folder}:{inside}:ro",
        f"{tmp_path}/cache:{inside}/cache",
        f"{tmp_path}/wheels:{inside}/find-links-0:ro",
        f"{tmp_path}/mirror:{inside}/extra-index-url-0:ro",
    }
    # The first bind is what the others are mounted into: their places must be there.
    assert staged.binds[0] == f"{folder}:{inside}:ro"
    for bind in staged.binds[1:]:
        place = bind.split(":")[1].removeprefix(inside + "/")
        assert (folder / place).is_dir()
    assert (tmp_path / "cache").is_dir()


def test_what_pip_says_of_folders_is_said_of_the_hosts(tmp_path):
    settings = {"find-links": f"{tmp_path} https://a/b", "index-url": f"file://{tmp_path}/simple/"}
    inside = hostpip.INSIDE
    said = f"{inside}/find-links-0/x.whl, {inside}/find-links-01, '{inside}/index-url-0'"
    told = hostpip.on_host(said, settings)
    assert told == f"{tmp_path}/x.whl, {inside}/find-links-01, '{tmp_path}'"


def test_passwords_are_for_this_user_alone(tmp_path, folder):
    hostpip.stage({"index-url": "https://a:b@c"}, folder, cache=tmp_path / "cache")
    assert stat.S_IMODE((folder / "pip.conf").stat().st_mode) == 0o600


def test_a_setting_of_folders_that_are_all_gone_is_left_out(tmp_path, folder):
    hostpip.stage({"find-links": "/no/such/folder"}, folder, cache=tmp_path / "cache")
    assert "find-links" not in (folder / "pip.conf").read_text()

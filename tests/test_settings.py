"""Settings: option, environment, site file, default."""

import pytest

from toolkit import settings, sites


def test_the_nearest_source_holds():
    site = {"base": "/site.sif"}
    environment = {"TOOLKIT_BASE": "/environment.sif"}
    every = settings.resolve("base", option="/o.sif", site=site, environment=environment)
    assert every == settings.Setting("base", "/o.sif", "option --base")
    two = settings.resolve("base", option="", site=site, environment=environment)
    assert two == settings.Setting("base", "/environment.sif", "environment TOOLKIT_BASE")
    one = settings.resolve("base", site=site, site_source="site jade", environment={})
    assert one == settings.Setting("base", "/site.sif", "site jade")
    assert settings.resolve("base", environment={}) == settings.Setting("base", "", "default")


def test_an_empty_variable_is_not_set():
    found = settings.resolve("build_dir", environment={"TOOLKIT_BUILD_DIR": ""})
    assert found == settings.Setting("build_dir", "build", "default")


def test_an_option_is_spelt_as_on_the_command_line():
    found = settings.resolve("build_dir", option="/x", environment={})
    assert found.source == "option --build-dir"


def test_this_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("TOOLKIT_SITE", "lumi")
    assert settings.resolve("site").value == "lumi"


def test_no_such_setting():
    with pytest.raises(KeyError):
        settings.resolve("bsae")


def test_every_setting_says_what_it_is_for():
    assert all(known.about for known in settings.KNOWN)
    assert len({known.name for known in settings.KNOWN}) == len(settings.KNOWN)


@pytest.mark.parametrize("name", sites.names())
def test_site_files_set_only_what_exists(name):
    assert sites.load(name).settings.keys() <= {known.name for known in settings.KNOWN}


def test_the_active_site_counts_after_option_and_environment():
    settings.use_site({"tmpdir": "/site"}, "site x")
    assert settings.resolve("tmpdir", environment={}).value == "/site"
    assert settings.resolve("tmpdir", environment={}).source == "site x"
    assert settings.resolve("tmpdir", environment={"TOOLKIT_TMPDIR": "/own"}).value == "/own"
    assert settings.resolve("tmpdir", site={}, environment={}).source == "default"

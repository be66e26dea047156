from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import real_build
from real_build import DATA, undated

from toolkit import apptainer, definition, paths
from toolkit.definition import Entry
from toolkit.errors import ToolkitError, UsageError

HEAD = "Bootstrap: localimage\nFrom: base.sif\n"
DATE = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone(timedelta(0), "UTC"))


def read(text: str | bytes, **arguments: str) -> definition.Definition:
    return definition.parse(
        HEAD.encode() + text if isinstance(text, bytes) else HEAD + text, arguments
    )


def after(text: str, state: dict[str, Entry] | None = None, **options) -> dict[str, Entry | None]:
    return definition.metadata(read(text), state or {}, defaults={}, date=DATE, **options)


def written(text: str, name: str, state: dict[str, Entry] | None = None, **options) -> str:
    entry = after(text, state, **options)[f".singularity.d/{name}"]
    assert entry
    return entry.content.decode()


# Definitions that Apptainer 1.4.5 refuses, each with a part of what we say to it.
REFUSED = {
    "nothing": ("", "empty"),
    "only comments": ("# x\n\n# y\n", "empty"),
    "no header": ("%post\n true\n", "no header"),
    "a section before the header": ("%help\nx\n" + HEAD, "no header"),
    "a header without a colon": ("Bootstrap localimage\n", "no colon"),
    "an unknown header": (HEAD + "Color: red\n", "'color' is unknown"),
    "a number where none goes": (HEAD + "From3: x\n", "'from3' is unknown"),
    "a header that goes on in a comment": (HEAD + "Include: a \\\n# x\n", "include"),
    "an unknown section": (HEAD + "%psot\n true\n", "'%psot'"),
    "several unknown sections": (HEAD + "%psot\n x\n%foo\n x\n", "'%psot', '%foo'"),
    "a percent sign alone": (HEAD + "%\n x\n", "'%'"),
    "an indented section": (HEAD + "   %post\n true\n", "'%post'"),
    "a format in a here document": (HEAD + "%post\n cat << E\n  %d\nE\n", "'%d'"),
    "a tab after a section's name": (HEAD + "%post\t-c /bin/sh\n x\n", "unknown section"),
    "an app section in capitals": (HEAD + "%AppInstall foo\n x\n", "%AppInstall foo"),
    "an app without a name": (HEAD + "%appinstall\n x\n", "names no app"),
    "two blanks before an app's name": (HEAD + "%apprun  foo\n x\n", "names no app"),
    "a section without text": ("%post", "no text"),
    "another stage in a here document": (HEAD + "%post\ncat << E\nBootstrap: x\nE\n", "no colon"),
    "an argument without a value": (HEAD + "%post\n echo {{ X }}\n", "{{ X }} has no value"),
    "an argument for a section": (HEAD + "{{ S }}\n x\n", "no colon"),
    "a lone quote": (HEAD + '%files\n "\n', "names no file"),
    "a section of 64 KiB": (HEAD + "%help\n" + "x" * (65536 - 6) + "\n", "64 KiB"),
    "a section of nearly 64 KiB and another": (
        *(HEAD + "%help\n" + "x" * (65529 - 7) + "\n%labels\n a b\n", "64 KiB"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_apptainer_refuses_is_refused(name: str):
    text, part = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        definition.parse(text, name="x.def")
    assert part in caught.value.message
    assert caught.value.message.startswith("x.def: ")


def test_sections_just_below_64_kib_are_read():
    assert len(read("%help\n" + "x" * (65535 - 7) + "\n").script("help").text) == 65529
    nearly = read("%help\n" + "x" * (65528 - 7) + "\n%labels\n a b\n")
    assert nearly.labels == {"a": "b"}


def test_value_for_no_argument_is_refused():
    with pytest.raises(UsageError, match="WRONG"):
        read("%post\n true\n", WRONG="1")


def test_value_of_several_lines_is_refused():
    with pytest.raises(UsageError, match="several lines"):
        read("%post\n {{ A }}\n", A="a\n%setup\n b")


def test_arguments_are_replaced_as_apptainer_does():
    post = (
        "%post\n # {{ X }}\n echo a#{{ Y }} # {{ X }}\n"
        " echo '#!{{Y}}' '# {{ X }}' {{Y}}\n {{\tZ }}{{ Z}}\n"
    )
    found = read(post, Y=" 1 ", Z="{{ Y }}").script("post").text
    assert found == " # {{ X }}\n echo a#1 # {{ X }}\n echo '#!1' '# {{ X }}' {{Y}}\n 11\n"


def test_defaults_of_arguments_may_use_others():
    text = "%arguments\n A={{ B }}{{C}}\n nothing\n =x\n # D=1\n B=b{{ C }}\n C = c=c \n"
    found = read(f"{text}%post\n {{{{ A }}}}\n")
    assert found.arguments == {"A": "{{ B }}{{C}}", "B": "b{{ C }}", "C": "c=c"}
    # Once only, and by its spelling, as Apptainer does.
    assert found.script("post").text == " b{{ C }}c=c\n"


def test_what_is_kept_of_a_definition_is_read_again_as_it_is():
    once = read(
        "%arguments\n A={{ B }}\n B={{ A }}\n%post\n {{ A }} {{ GIVEN }}\n", GIVEN="{{ X }}"
    )
    again = definition.parse(once.raw, filled=True)
    assert again == replace(once, arguments=again.arguments)
    assert once.script("post").text == " {{ A }} {{ X }}\n"


def test_section_may_come_from_an_argument():
    assert read("%labels\n a b\n{{ S }}\n x\n", S="%post").script("post").text == " x\n"


def test_comments_above_the_header_are_not_kept():
    text = f"# x\n\n{HEAD}# y\n%help\n h\n"
    found = definition.parse(text)
    assert found.raw.decode() == text[len("# x\n\n") :]
    assert found.header == {"bootstrap": "localimage", "from": "base.sif"}


def test_header_lines_go_on_and_end_with_comments():
    text = "bootstrap: localimage # x\nFROM: base.sif\nInclude: a \\\n   b \\n\\\n c # d\n"
    found = definition.parse(text + "OtherURL12: x:y\nOSVersion: \\\nSetopt: z\n").header
    assert found.pop("bootstrap") == "localimage"
    assert found == {
        "from": "base.sif", "include": "a b \nc", "otherurl12": "x:y", "setopt": "z"
    }  # fmt: skip


def test_stages_are_counted_and_the_last_one_is_read():
    found = definition.parse(HEAD + "Stage: one\n%help\n 1\n" + HEAD + "%help\n 2\n")
    assert found.stages == 2
    assert found.script("help").text == " 2\n"
    assert found.raw.decode().count("Bootstrap") == 2


def test_repeated_sections_are_joined_and_the_last_options_count():
    found = read("%post -u\n a\n%Post\n b\n%%post -v\n c\n%post\n d\n").script("post")
    assert found == definition.Script("-v", " a\n b\n c\n d\n")


def test_line_ends_of_dos_are_read_and_kept():
    text = f"{HEAD}%post\n true\n".replace("\n", "\r\n").encode()
    found = definition.parse(text)
    assert found.raw == text
    assert found.header["from"] == "base.sif"
    assert found.script("post").text == " true\n"


def test_bytes_that_are_no_text_are_kept():
    found = read(b"%help\n \xff z\n%labels\n a \xff\n")
    assert found.raw.endswith(b"%help\n \xff z\n%labels\n a \xff\n")
    changed = definition.metadata(found, {}, defaults={}, date=DATE)
    help_text, labels = (changed[f".singularity.d/{n}"] for n in ("runscript.help", "labels.json"))
    assert help_text and help_text.content == b" \xff z\n\n"
    assert labels and b'"a": "\\ufffd"' in labels.content


def test_labels_are_split_at_the_first_blank():
    assert definition.read_labels(" A  b c \n\n# x\n d\te\n f\n A z") == {
        "A": "z", "d\te": "", "f": ""
    }  # fmt: skip


FILES = {
    "src": ("src", ""),
    "src dst more": ("src", "dst"),
    "src # comment": ("src", "#"),
    '"a b" "c d/"': ("a b", "c d/"),
    "'a b' c": ("'a b", "' c"),
    'a"b c"d e': ("a", "b c"),
    "{a,b}  /c": ("{a,b}", "/c"),
    "x/{{ A }}/y /{{ A }}": ("x/{{ A }}/y", "/{{ A }}"),
}


@pytest.mark.parametrize("line", FILES)
def test_files_are_split_as_apptainer_does(line: str):
    stage = definition._Stage()
    definition._add_files(stage, "", f"\n # no\n  {line}  \n\n")
    assert stage.files == [definition.Files("", (FILES[line],))]


def test_only_files_sections_without_words_come_from_the_host():
    found = read("%files #c\n a b\n%files\n c d\n%files  # x\n e f\n%files \n g h\n%files y\n i\n")
    assert [pair for f in found.files if f.host for pair in f.pairs] == [
        ("a", "b"), ("c", "d"), ("g", "h")
    ]  # fmt: skip
    assert not definition.unsupported(found)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (HEAD + "Stage: a\n" + HEAD, "several stages"),
        (HEAD + "%files from a\n x y\n", "several stages"),
        (HEAD + "%setup\n x\n", "%setup"),
        (HEAD + "%pre\n x\n", "%pre"),
        ("Bootstrap: docker\nFrom: x\n", "Bootstrap: docker"),
        (HEAD + "Fingerprints: 0123 # x\n", "Fingerprints"),
    ],
)
def test_what_no_layer_can_do_is_named_with_the_remedy(text: str, part: str):
    (sentence,) = definition.unsupported(definition.parse(text))
    assert part in sentence
    assert "--how full" in sentence


def test_definitions_of_this_project_can_be_layers():
    given = {"BOOTSTRAP": "localimage", "FROM": "x.sif"}
    for path in sorted(paths.definitions().glob("*.def")):
        found = definition.parse(path.read_bytes(), given, name=path.name)
        assert not definition.unsupported(found)
        assert definition.post_command(found) == ["/bin/sh", "-ex", "/.post.script"]
        assert b"{{ PROJECT }}" not in found.raw


@pytest.mark.parametrize(
    ("args", "command"),
    [
        ("", ["/.post.script"]),
        ("-u # x", ["-u", "/.post.script"]),
        ("-c /bin/bash", ["-c", "/bin/bash /.post.script"]),
        ("-x -c /bin/bash -e -u", ["-x", "-c", "/bin/bash -e -u /.post.script"]),
    ],
)
def test_post_runs_with_the_shell_that_it_asks_for(args: str, command: list[str]):
    assert definition.post_command(read(f"%post {args}\n x\n")) == ["/bin/sh", "-ex", *command]


def test_post_without_the_shell_that_it_promises_is_refused():
    with pytest.raises(UsageError, match="names no shell"):
        definition.post_command(read("%post -c\n x\n"))


def test_apps_are_installed_after_post_even_without_one():
    found = definition.post_script(read("%appinstall b x\n 1\n%apprun a\n 2\n%appinstall b\n 3\n"))
    words = " ".join(found.split())
    assert words == (
        "cd / . /scif/apps/b/scif/env/01-base.sh cd /scif/apps/b 1 3 cd /"
        " cd / . /scif/apps/a/scif/env/01-base.sh cd /scif/apps/a cd /"
    )
    assert definition.post_script(read("%help\n x\n")) == ""


# Sources -------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name in ("x", "y.py", "z.py", ".hidden.py", "dir/a", "dir/sub/b", "s p"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


EXPANDED = {
    "*.py": ["y.py", "z.py"],
    "?.py": ["y.py", "z.py"],
    "[!y].py": ["z.py"],
    "[^y].py": ["z.py"],
    "d*/a": ["dir/a"],
    "**/a": ["dir/a"],
    "**/b": ["**/b"],
    "{x,dir/{a,sub}}": ["x", "dir/a", "dir/sub"],
    "{x}": ["{x}"],
    "{x,{y}": ["{x,{y}"],
    "a{,b}{c,d}": ["ac", "ad", "abc", "abd"],
    "none*": ["none*"],
    "s p": ["s p"],
    "$A/x": ["here/x"],
    "${A}x": ["herex"],
    "$NONE": [],
    "~/x": ["/home/me/x"],
    "~": ["/home/me"],
    "dangling": ["dangling"],
}


@pytest.mark.parametrize("source", EXPANDED)
def test_sources_are_expanded_as_by_a_shell(sources: Path, source: str):
    variables = {"A": "here", "HOME": "/home/me"}
    found = definition.expand(source, folder=sources, environment=variables)
    assert found == EXPANDED[source]


@pytest.mark.parametrize("source", ["$(id)", "`id`", "a;b", "a'b", "{1..3}", "a\\*", "$", "a&b"])
def test_shell_code_as_a_source_is_refused(sources: Path, source: str):
    with pytest.raises(UsageError, match="shell code"):
        definition.expand(source, folder=sources, environment={})


MOVED = {
    "x /opt/y": ("x", "/opt/y"),
    "x opt/y/": ("x", "/opt/y/"),
    "x /../../y": ("x", "/y"),
    "x /": ("x", "/"),
    "x": ("x", "/x"),
    "../{folder}/x": ("x", "/{folder}/x"),
    "dir/ /opt/": ("dir", "/opt/"),
    "dir/": ("dir", "/dir/"),
    "dir/. /opt": (".", "/opt"),
    "dir/sub/.. /opt": (".", "/opt"),
}


@pytest.mark.parametrize("line", MOVED)
def test_files_go_where_apptainer_puts_them(sources: Path, line: str):
    found = read(f"%files\n {line.format(folder=sources.name)}\n")
    (moved,) = definition.transfers(found, folder=sources, environment={})
    name, place = MOVED[line]
    assert (moved.name, moved.destination) == (name, place.format(folder=sources.name))
    assert moved.source.exists() and moved.parents


@pytest.mark.parametrize("line", ["none /x", "none* /x", "dangling /x", "dir/none"])
def test_missing_source_is_refused(sources: Path, line: str):
    with pytest.raises(UsageError, match="does not exist") as caught:
        definition.transfers(read(f"%files\n {line}\n"), folder=sources, environment={})
    assert line.split()[0] in caught.value.message
    with pytest.raises(UsageError, match="%appfiles foo"):
        definition.app_transfers(read(f"%appfiles foo\n {line}\n"), folder=sources)


def test_files_of_apps_go_into_their_folder(sources: Path):
    found = read("%appfiles foo\n x # c\n # d\n\n dir lib/d\n x  bin\n y.py ../../../etc/\n")
    moved = definition.app_transfers(found, folder=sources)
    assert [(m.name, m.destination) for m in moved] == [
        ("x", "/scif/apps/foo/x"),
        ("dir", "/scif/apps/foo/lib/d"),
        ("x", "/scif/apps/foo/ bin"),
        ("y.py", "/etc"),
    ]
    assert not any(m.parents for m in moved)


def test_copy_script_puts_files_where_cp_and_apptainer_would(tmp_path: Path):
    """Run in a folder for lack of a container; that of a real build is compared below."""
    staged, root = tmp_path / "staged", tmp_path / "root"
    for name in ("0/x", "1/dir/a", "2/a", "3/x", "4/it's x", "5/x"):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(name)
    (staged / "0/x").chmod(0o600)
    (root / "there").mkdir(parents=True)
    (root / "nowhere").symlink_to("new/folder")
    (root / "file").symlink_to("new/file")
    moves = [
        ("0", "x", "/made/for/y"), ("1", "dir", "/there"), ("2", ".", "/there"),
        ("3", "x", "/nowhere/"), ("4", "it's x", "/nowhere/a b/"), ("5", "x", "/file"),
    ]  # fmt: skip
    script = definition.copy_script(
        [
            (str(staged / place), definition.Transfer(Path(name), name, f"{root}{destination}"))
            for place, name, destination in moves
        ]
    )
    subprocess.run(["sh", "-c", script], check=True, umask=0o077)
    found = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}
    assert found == {
        "made/for/y": "0/x",
        "there/dir/a": "1/dir/a",
        "there/a": "2/a",
        "new/folder/x": "3/x",
        "new/folder/a b/it's x": "4/it's x",
        "new/file": "5/x",
        "file": "5/x",
    }
    assert (root / "made/for").stat().st_mode & 0o777 == 0o755
    assert (root / "made/for/y").stat().st_mode & 0o777 == 0o600


def test_copy_script_makes_no_folders_for_apps_and_stops_at_an_error(tmp_path: Path):
    (tmp_path / "x").write_text("")
    transfer = definition.Transfer(tmp_path / "x", "x", f"{tmp_path}/none/y", parents=False)
    more = definition.Transfer(tmp_path / "x", "x", f"{tmp_path}/later")
    script = definition.copy_script([(str(tmp_path), transfer), (str(tmp_path), more)])
    assert subprocess.run(["sh", "-c", script], capture_output=True).returncode != 0
    assert not (tmp_path / "none").exists() and not (tmp_path / "later").exists()


# What is written -----------------------------------------------------------------------------


def test_complete_base_is_changed_in_nothing_but_the_list_of_apps():
    recorded = json.loads((DATA / "everything.json").read_text())
    base = real_build.from_text(recorded["base"])
    assert definition.prepare(read(""), base, defaults={}) == {}
    name = ".singularity.d/env/94-appsbase.sh"
    older = base | {name: Entry("file", 0o700, b"of another app")}
    assert definition.prepare(read(""), older, defaults={}) == {name: Entry("file", 0o700)}


def test_what_a_base_lacks_is_made():
    defaults = {".singularity.d/runscript": Entry("file", 0o755, b"of Apptainer")}
    base = {
        ".": Entry("folder", 0o555),
        "etc": Entry("folder", 0o700),
        "etc/hosts": Entry("file", 0o600, b"kept"),
        "tmp": Entry("link", target="/var/tmp"),
        ".run": Entry("file", 0o644, b"kept"),
    }
    made = definition.prepare(read(""), base, defaults=defaults)
    assert made["."].mode == 0o755
    assert made["etc/hosts"] == Entry("file", 0o644, b"kept")
    assert made[".singularity.d/runscript"].content == b"of Apptainer"
    assert made["environment"].target == ".singularity.d/env/90-environment.sh"
    assert not {"etc", "tmp", ".run"} & set(made)
    order = list(made)
    assert order.index("var") < order.index("var/tmp")


def test_apps_of_the_base_keep_what_the_definition_does_not_name():
    base = {
        "scif/apps/foo/scif/runscript": Entry("file", 0o700, b"old"),
        "scif/apps/foo/scif/startscript": Entry("file", 0o755, b"old"),
        "scif/apps/foo/bin": Entry("folder", 0o700),
    }
    found = read("%apprun foo\n new\n%appfiles foo\n x scif/env/90-environment.sh\n")
    made = definition.prepare(found, base, defaults={})
    assert made["scif/apps/foo/scif/runscript"] == Entry("file", 0o700, b"#!/bin/sh\n\n new\n\n")
    assert not {"scif/apps/foo/scif/startscript", "scif/apps/foo/bin"} & set(made)
    variables = made[".singularity.d/env/94-appsbase.sh"].content.decode()
    for name in ("SCIF_APPRUN_foo", "SCIF_APPSTART_foo", "SCIF_APPENV_foo", "SCIF_APPLABELS_foo"):
        assert f"export {name}=" in variables


def test_names_of_apps_are_made_names_of_variables():
    made = definition.prepare(read("%apprun a.b-c\n x\n"), {}, defaults={})
    assert "scif/apps/a.b-c/scif/runscript" in made
    assert (
        b"SCIF_APPROOT_a_b_c=/scif/apps/a_b_c\n"
        in made[".singularity.d/env/94-appsbase.sh"].content
    )


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("%runscript\n x\n", "#!/bin/sh\n\n x\n\n"),
        ("%runscript -x # y\n x\n", "#!/bin/sh -x \n\n x\n\n"),
        ("%runscript -u\n #!/bin/bash -l \n x\n", "#!/bin/bash -l -u\n\n x\n\n"),
        ("%runscript\n\n#!/bin/bash\n x\n", "\n\n#!/bin/bash\n x\n\n"),
        ("%runscript\n\n", "#!/bin/sh\n\n\n\n"),
    ],
)
def test_scripts_get_the_interpreter_that_they_ask_for(section: str, content: str):
    assert written(section, "runscript") == content


def test_scripts_of_the_base_stay_where_the_definition_has_none():
    state = {f".singularity.d/{name}": Entry("file") for name in ("runscript", "test")}
    assert not set(state) & set(after("%startscript\n x\n", state))


def test_environment_is_added_to_that_of_the_base():
    name = "env/90-environment.sh"
    state = {f".singularity.d/{name}": Entry("file", 0o750, b"old\n")}
    assert written("%environment\n x\n", name, state) == "old\n\n x\n\n"
    assert written("%environment\n x\n", name) == "#!/bin/sh\n\n x\n\n"
    changed = after("%environment\n x\n", state)[f".singularity.d/{name}"]
    assert changed and changed.mode == 0o750


def test_definition_of_the_base_becomes_history():
    state = {
        ".singularity.d/Singularity": Entry("file", 0o600, b"old"),
        ".singularity.d/bootstrap_history": Entry("folder"),
        ".singularity.d/bootstrap_history/Apptainer7": Entry("file"),
        ".singularity.d/bootstrap_history/other/deeper": Entry("file"),
    }
    changed = after("", state)
    old = changed[".singularity.d/bootstrap_history/Apptainer1"]
    assert old == Entry("file", 0o600, b"old")
    assert changed[".singularity.d/Singularity"] == Entry("file", 0o644, HEAD.encode())
    assert ".singularity.d/bootstrap_history" not in changed


def labels(text: str, state: dict[str, Entry] | None = None, **options) -> dict[str, str]:
    found: dict[str, str] = json.loads(written(text, "labels.json", state, **options))
    return found


def test_labels_come_from_base_post_build_and_definition_in_this_order():
    state = {
        ".singularity.d/labels.json": Entry(
            "file", content=b'{"a": "base", "b": "base", "n": null}'
        ),
        ".build.labels": Entry("file", content=b"b post\norg.label-schema.usage post\n"),
    }
    changed = after("%help\n x\n%labels\n c <&>\n a new\n", state)
    assert changed[".build.labels"] is None
    found = labels("%help\n x\n%labels\n c <&>\n a new\n", state)
    assert (found["a"], found["b"], found["c"], found["n"]) == ("new", "post", "<&>", "")
    assert found["org.label-schema.usage"] == "/.singularity.d/runscript.help"
    assert found["org.label-schema.build-date"] == "Wednesday_4_March_2026_5:6:7_UTC"
    assert found["org.label-schema.usage.singularity.deffile.from"] == "base.sif"
    assert "\\u003c\\u0026\\u003e" in written("%labels\n c <&>\n", "labels.json", state)


def test_labels_of_apptainer_come_from_its_empty_image():
    known = {
        "org.label-schema.build-arch": "amd64",
        "org.label-schema.build-date": "another day",
        "org.label-schema.usage.singularity.deffile.from": "empty",
        "org.opencontainers.image.created": "another day",
    }
    defaults = {".singularity.d/labels.json": Entry("file", content=json.dumps(known).encode())}
    changed = definition.metadata(read(""), {}, defaults=defaults, date=DATE)
    entry = changed[".singularity.d/labels.json"]
    assert entry
    assert json.loads(entry.content) == {
        "org.label-schema.build-arch": "amd64",
        "org.label-schema.build-date": "Wednesday_4_March_2026_5:6:7_UTC",
        "org.label-schema.usage.singularity.deffile.bootstrap": "localimage",
        "org.label-schema.usage.singularity.deffile.from": "base.sif",
        "org.opencontainers.image.created": "2026-03-04T05:06:07Z",
    }


def test_without_force_labels_and_help_of_the_base_stay():
    state = {
        ".singularity.d/labels.json": Entry("file", content=b'{"a": "base"}'),
        ".singularity.d/runscript.help": Entry("file", content=b"old"),
    }
    text = "%help\n x\n%labels\n a new\n b new\n"
    found = labels(text, state, force=False)
    assert (found["a"], found["b"]) == ("base", "new")
    assert ".singularity.d/runscript.help" not in after(text, state, force=False)
    assert written(text, "runscript.help", state) == " x\n\n"


@pytest.mark.parametrize("content", ["", "[]", "0", '""', "x", '{"a": 1}'])
def test_broken_labels_in_the_image_are_refused(content: str):
    state = {".singularity.d/labels.json": Entry("file", content=content.encode())}
    with pytest.raises(ToolkitError, match="holds no labels"):
        after("", state)


def test_descriptor_tells_what_inspect_would():
    def entry(text: str) -> Entry:
        return Entry("file", content=text.encode())

    app = "scif/apps/foo/scif"
    state = {
        ".singularity.d/env/10-docker2singularity.sh": entry("a\n\n"),
        ".singularity.d/env/91-environment.sh": entry(""),
        ".singularity.d/env/95-my-environment.sh": entry("b"),
        ".singularity.d/env/92-other.sh": entry("c"),
        ".singularity.d/test": Entry("link", target="runscript"),
        ".singularity.d/runscript": entry("r <\u2028"),
        ".singularity.d/startscript": Entry("folder"),
        app: Entry("folder"),
        f"{app}/env/10-docker.sh": entry("d"),
        f"{app}/env/90-environment.sh": entry("e"),
        f"{app}/labels.json": entry('{"b": 1, "a": "x"}'),
        "scif/apps/.hidden/scif": Entry("folder"),
        "scif/apps/bare/scif": Entry("folder"),
        "scif/apps/bare/scif/labels.json": entry("broken"),
    }
    assert definition.inspect_json(state).decode() == (
        '{"data":{"attributes":{"apps":{"bare":{},"foo":{"environment":'
        '{"/scif/apps/foo/scif/env/90-environment.sh":"e"},"labels":{"a":"x","b":""}}},'
        '"environment":{"/.singularity.d/env/10-docker2singularity.sh":"a",'
        '"/.singularity.d/env/91-environment.sh":"","/.singularity.d/env/95-my-environment.sh":"b"},'
        '"runscript":"r \\u003c\\u2028","test":"r \\u003c\\u2028"}},"type":"container"}'
    )


def test_snapshot_reads_what_is_needed_and_no_more(tmp_path: Path):
    for name in (".singularity.d/env", "scif/apps/a/scif/env", "scif/apps/a/lib/deep", "usr/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "scif/apps/a/lib/large").write_text("x")
    (tmp_path / ".singularity.d/env/x.sh").write_text("y")
    (tmp_path / ".singularity.d/env/x.sh").chmod(0o641)
    (tmp_path / "singularity").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".singularity.d/pipe")
    found = definition.snapshot(tmp_path)
    assert found[".singularity.d/env/x.sh"] == Entry("file", 0o641, b"y")
    assert found["singularity"] == Entry("link", 0o777, target="nowhere")
    assert found[".singularity.d/pipe"].kind == "other"
    assert found["scif/apps/a/scif/env"].kind == "folder"
    assert not {"usr", "scif/apps/a/lib/large", "scif/apps/a/lib/deep", "tmp"} & set(found)


# Against what Apptainer made -----------------------------------------------------------------


def build_like_apptainer(text: bytes, base: dict[str, Entry], defaults: dict[str, Entry], **wrote):
    """Return what we make of a definition: entries, descriptor, definition."""
    recipe = definition.parse(text, {"BASE": "base.sif"})
    state = {**base, **definition.prepare(recipe, base, defaults=defaults), **wrote}
    changes = definition.metadata(recipe, state, defaults=defaults, date=DATE)
    state = {name: entry for name, entry in {**state, **changes}.items() if entry}
    return state, definition.inspect_json(state), recipe.raw


def test_everything_is_as_apptainer_1_4_5_made_it():
    recorded = json.loads((DATA / "everything.json").read_text())
    base, empty, image = (
        real_build.from_text(recorded[name]) for name in ("base", "defaults", "image")
    )
    post = {
        ".singularity.d/env/91-environment.sh": image[".singularity.d/env/91-environment.sh"],
        ".build.labels": Entry("file", content=b"post.label from post\nAuthor never\n"),
    }
    text = (DATA / "everything.def").read_bytes()
    state, descriptor, raw = build_like_apptainer(text, base, empty, **post)
    assert real_build.to_text(state) == recorded["image"]
    assert undated(descriptor).decode() == recorded["descriptor"]
    assert raw.decode() == recorded["definition"]


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Return mode and content of every path of a root folder."""
    return {
        str(p.relative_to(root)): (
            p.lstat().st_mode,
            str(p.readlink())
            if p.is_symlink()
            else undated(p.read_bytes()).hex()
            if p.is_file()
            else "",
        )
        for p in root.rglob("*")
    }


def materialize(root: Path, entries: Mapping[str, Entry | None]) -> None:
    for name, entry in entries.items():
        path = root / name
        if entry is None:
            path.unlink()
        elif entry.kind == "link":
            path.symlink_to(entry.target)
        else:
            if entry.kind == "folder":
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(entry.content)
            path.chmod(entry.mode)


def run_in(root: Path, command: list[str], *binds: str) -> None:
    """Run a command in a root folder as a build runs %post."""
    words = ["--userns", "--writable", "--cleanenv", "--pwd", "/", "--no-mount", "tmp"]
    words += [w for k, v in definition.POST_ENVIRONMENT.items() for w in ("--env", f"{k}={v}")]
    words += [w for bind in binds for w in ("--bind", bind)]
    program = str(apptainer.find().path)
    done = subprocess.run(
        [
            "unshare",
            "--map-root-user",
            program,
            "-q",
            "--build-config",
            "exec",
            *words,
            root,
            *command,
        ],
        env=os.environ | {"HOST_VARIABLE": "set"},
        capture_output=True,
        text=True,
        umask=definition.UMASK,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.image
def test_image_is_the_same_as_from_apptainer_build(tmp_path: Path):
    real_build.sources(tmp_path)
    base = real_build.unpack(real_build.base(tmp_path))
    defaults = real_build.defaults(tmp_path).entries
    real_build.build(tmp_path / "full.sif", DATA / "everything.def", "--build-arg", "BASE=base.sif")
    full = real_build.unpack(tmp_path / "full.sif")

    recipe = definition.parse((DATA / "everything.def").read_bytes(), {"BASE": "base.sif"})
    assert not definition.unsupported(recipe)
    root = base.root
    for name in (definition.POST_SCRIPT, "/.stage"):
        (root / name[1:]).mkdir() if name == "/.stage" else (root / name[1:]).touch()
    materialize(root, definition.prepare(recipe, base.entries, defaults=defaults))
    stage, script, staged = tmp_path / "stage", tmp_path / "script", []
    moved = definition.app_transfers(recipe, folder=tmp_path)
    moved += definition.transfers(recipe, folder=tmp_path, environment={})
    for number, transfer in enumerate(moved):
        (stage / str(number)).mkdir(parents=True)
        copy = [transfer.source, stage / str(number) / transfer.name]
        subprocess.run(["cp", "-fLr", *copy], check=True, umask=definition.UMASK)
        staged.append((f"/.stage/{number}", transfer))
    script.write_text(definition.copy_script(staged))
    run_in(
        root,
        ["sh", definition.POST_SCRIPT],
        f"{script}:{definition.POST_SCRIPT}",
        f"{stage}:/.stage",
    )
    script.write_text(definition.post_script(recipe))
    run_in(root, definition.post_command(recipe), f"{script}:{definition.POST_SCRIPT}")
    (root / definition.POST_SCRIPT[1:]).unlink()
    (root / ".stage").rmdir()
    state = definition.snapshot(root)
    date = datetime.now().astimezone()
    materialize(root, definition.metadata(recipe, state, defaults=defaults, date=date))

    assert (root / "opt/said").read_text() == "/.post.script / 0002 /root unset\nmore\n"
    ours, theirs = tree(root), tree(full.root)
    assert {n: ours.get(n) for n in theirs} == theirs
    assert set(ours) == set(theirs)
    assert undated(definition.inspect_json(definition.snapshot(root))) == undated(full.descriptor)
    assert recipe.raw == full.definition

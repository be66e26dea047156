"""How Gaudi is handed to containers, by the jobs and by the toolkit; no Gaudi is needed."""

import os
import subprocess
from pathlib import Path

import pytest
from test_jobs import called, project, script, toolkit  # noqa: F401  # project is a fixture

from toolkit import apptainer, catalogue, definition, making, orders, paths
from toolkit.errors import UsageError

pytestmark = pytest.mark.slow

VARIABLES = {
    "GC_KERNEL_PATH": "/usr/lib/habanalabs/libtpc_kernels.so",
    "HABANA_PLUGINS_LIB_PATH": "/opt/habanalabs/habana_plugins",
    "HABANA_SCAL_BIN_PATH": "/opt/habanalabs/engines_fw",
}
FILES = (
    *("dev/accel/accel0", "dev/accel/accel_controlD0", "dev/accel/accel10", "dev/hl0"),
    *("dev/hl_controlD0", "dev/infiniband/uverbs1", "dev/infiniband/uverbs2", "dev/hlx"),
    *("sys/class/infiniband/hbl_0/device/infiniband_verbs/uverbs1",),
    # Of another card, and one without its file.
    *("sys/class/infiniband/mlx5_0/device/infiniband_verbs/uverbs2",),
    *("sys/class/infiniband/hbl_1/device/infiniband_verbs/uverbs9",),
)
EXPECTED = [
    *("/dev/accel/accel0", "/dev/accel/accel10", "/dev/accel/accel_controlD0", "/dev/hl0"),
    *("/dev/hl_controlD0", "/dev/infiniband/uverbs1"),
]


@pytest.fixture
def root(tmp_path):
    """A root folder of a host with Gaudis."""
    for name in FILES:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "root"


def variables_of(arguments):
    """Return what --env hands in."""
    values = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--env"]
    return dict(value.partition("=")[::2] for value in values)


# The jobs


def test_each_device_file_is_bound_by_itself(root):
    done = subprocess.run(
        ["bash", "-c", '. "$1"; gaudi_files "$2"', "bash", paths.jobs() / "common.sh", root],
        capture_output=True,
        text=True,
    )
    assert sorted(done.stdout.split()) == sorted(EXPECTED), done.stderr
    assert sorted(apptainer.gaudi_files(root)) == sorted(EXPECTED)


@pytest.mark.parametrize(
    ("version", "flag"),
    [
        ("apptainer version 1.4.5", False),
        ("apptainer version 1.5.0", True),
        ("apptainer version 1.5.0~rc.1+dfsg", True),
        ("apptainer version 1.10.2", True),
        ("apptainer version 2.0.0", True),
        ("singularity-ce version 4.3.0", False),
        ("", False),
    ],
)
def test_the_option_is_used_where_apptainer_has_it(project, version, flag):  # noqa: F811
    program = project / ".tools/bin/apptainer"
    program.write_text(program.read_text().replace("apptainer version 1.4.5", version))
    done = script(project, PROGRAM="true", TOOLKIT_DEVICE="hpu")
    assert done.returncode == 0, done.stderr
    arguments, _ = called(project)
    assert ("--intel-hpu" in arguments) == flag
    found = apptainer.Program(program, *apptainer.parse_version(version), "")
    assert (apptainer.device_options("hpu", found, root=project) == ["--intel-hpu"]) == flag
    assert not {"--rocm", "--nv"} & set(arguments)


def test_a_job_gets_what_gaudis_library_needs(project):  # noqa: F811
    done = script(
        project,
        PROGRAM='ls -d "$SCRATCH"/toolkit-*/tmp/habana_logs',
        TOOLKIT_DEVICE="hpu",
        SCRATCH=str(project.parent / "scratch"),
        HABANA_VISIBLE_MODULES="3,1",
        HABANA_VISIBLE_DEVICES="3",
    )
    assert done.returncode == 0, done.stderr
    # A folder of the job's own, which the container sees as /tmp.
    assert done.stdout.strip().endswith("/tmp/habana_logs")
    arguments, variables = called(project)
    given = variables_of(arguments)
    assert given.items() >= VARIABLES.items()
    assert given["HABANA_LOGS"] == "/tmp/habana_logs"
    assert given["PT_HPU_LAZY_MODE"] == "0"
    assert variables["APPTAINERENV_HABANA_VISIBLE_MODULES"] == "3,1"
    # Docker's runtime alone reads it.
    assert "APPTAINERENV_HABANA_VISIBLE_DEVICES" not in variables


def test_eager_and_lazy_are_one_setting(project):  # noqa: F811
    assert (
        script(project, PROGRAM="true", TOOLKIT_DEVICE="hpu", PT_HPU_LAZY_MODE="1").returncode == 0
    )
    assert variables_of(called(project)[0])["PT_HPU_LAZY_MODE"] == "1"


def test_what_the_user_passes_stays(project):  # noqa: F811
    done = script(
        project,
        PROGRAM="true",
        TOOLKIT_DEVICE="hpu",
        TOOLKIT_PASS="HABANA_LOGS GC_KERNEL_PATH",
        HABANA_LOGS="/results/logs",
        GC_KERNEL_PATH="/mine,/theirs",
    )
    assert done.returncode == 0, done.stderr
    arguments, variables = called(project)
    assert not {"HABANA_LOGS", "GC_KERNEL_PATH"} & set(variables_of(arguments))
    assert variables["APPTAINERENV_HABANA_LOGS"] == "/results/logs"
    assert variables["APPTAINERENV_GC_KERNEL_PATH"] == "/mine,/theirs"


def test_other_devices_get_nothing_of_it(project):  # noqa: F811
    assert script(project, PROGRAM="true", TOOLKIT_DEVICE="cpu").returncode == 0
    arguments, _ = called(project)
    assert not [a for a in arguments if "habana" in a.lower() or "hpu" in a.lower()]


@pytest.mark.parametrize("given", [["--device", "hpu"], ["--device=hpu"]])
@pytest.mark.parametrize("name", ["pytorch_check", "monai_check", "train", "mednist"])
def test_jobs_take_the_device(project, name, given):  # noqa: F811
    (project / "program.py").write_text("")
    (project.parent / "data").mkdir()
    own = ["echo", "--device", "7"] if name == "train" else []
    done = script(
        project, name, *given, *own, TOOLKIT_DRY_RUN="1", MEDNIST_DATA=str(project.parent / "data")
    )
    assert done.returncode == 0, done.stderr
    assert "PT_HPU_LAZY_MODE=0" in done.stdout
    if name == "train":  # what follows the program is the program's
        assert done.stdout.rstrip().endswith("echo --device 7")
    elif name == "mednist":
        assert done.stdout.count("--device hpu") == done.stdout.count("--device") == 1
    else:
        assert "--device" not in done.stdout


def test_a_device_is_refused_that_there_is_not(project):  # noqa: F811
    for arguments, said in (
        (["--device", "tpu"], "must be rocm, cuda, hpu or cpu"),
        (["--device"], "--device has no value"),
        (["--device=cpu", "--epochs"], "this job takes no arguments: --epochs"),
    ):
        done = script(project, "pytorch_check", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    done = script(project, "pytorch_check", "--device=auto", TOOLKIT_DRY_RUN="1")
    assert done.returncode == 0, done.stderr


def test_submit_takes_the_device(project):  # noqa: F811
    home = {"TOOLKIT_HOME": str(project), "HOME": str(project)}
    options = ["--site", "local", "--dry-run"]
    done = toolkit("submit", "monai_check", *options, "--device", "hpu", **home)
    assert done.returncode == 0, done.stderr
    assert "TOOLKIT_DEVICE=hpu" in done.stdout
    assert "PT_HPU_LAZY_MODE=0" in done.stdout
    done = toolkit("submit", "monai_check", *options, "--device", "tpu", **home)
    assert done.returncode == 2
    assert "tpu" in done.stderr


# The toolkit


def program(version, name="apptainer"):
    return apptainer.Program(Path("/usr/bin/apptainer"), name, version, "")


def test_how_the_toolkit_hands_devices_in(root):
    assert apptainer.device_options("rocm", program((1, 5, 0))) == ["--rocm"]
    assert apptainer.device_options("cuda", program((1, 5, 0))) == ["--nv"]
    assert apptainer.device_options("cpu", program((1, 5, 0))) == []
    assert apptainer.device_options("hpu", program((1, 5, 0)), root=root) == ["--intel-hpu"]
    bound = apptainer.device_options("hpu", program((1, 4, 5)), root=root)
    assert bound[::2] == ["--bind"] * len(EXPECTED)
    assert sorted(bound[1::2]) == sorted(EXPECTED)
    # SingularityCE counts otherwise.
    assert apptainer.device_options("hpu", program((4, 3, 0), "singularity"), root=root) == bound


def test_variables_of_the_toolkits_containers(monkeypatch):
    for name in (*VARIABLES, "HABANA_LOGS", "PT_HPU_LAZY_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert apptainer.device_variables("rocm") == {}
    found = apptainer.device_variables("hpu")
    # Not one folder for all users of a host.
    assert found.pop("HABANA_LOGS") == f"/tmp/habana_logs-{os.geteuid()}"
    assert found == VARIABLES | {"PT_HPU_LAZY_MODE": "0"}
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    monkeypatch.setenv("GC_KERNEL_PATH", "/mine")
    found = apptainer.device_variables("hpu")
    assert (found["PT_HPU_LAZY_MODE"], found["GC_KERNEL_PATH"]) == ("1", "/mine")
    assert apptainer.for_container({"A": "b"}, program((1, 4, 5))) == {"APPTAINERENV_A": "b"}
    assert apptainer.for_container({"A": "b"}, program((3, 9, 0), "singularity")) == {
        "SINGULARITYENV_A": "b"
    }


# The image


def test_the_vendors_image_is_asked_for(monkeypatch):
    monkeypatch.delenv("TOOLKIT_GAUDI_IMAGE", raising=False)
    image = catalogue.load("pytorch-gaudi")
    with pytest.raises(UsageError, match="of Intel's image") as caught:
        orders.choose_base(image)
    assert "TOOLKIT_GAUDI_IMAGE" in caught.value.hint
    monkeypatch.setenv("TOOLKIT_GAUDI_IMAGE", "docker://registry.example/a/b-2.11.0:latest")
    found = orders.choose_base(image)
    assert (found.path, found.name) == (None, "registry.example/a/b-2.11.0:latest")
    assert making._start(image, found, Path("/none"), print) == {"FROM": found.name}
    monkeypatch.setenv("TOOLKIT_GAUDI_IMAGE", "b 2:latest")
    with pytest.raises(UsageError, match="is no reference"):
        orders.choose_base(image)


def test_the_definition_names_no_image_of_its_own():
    text = (paths.definitions() / "pytorch-gaudi.def").read_bytes()
    with pytest.raises(UsageError, match="FROM"):
        definition.parse(text, {}, name="pytorch-gaudi.def")
    given = {"FROM": "registry.example/a/b:latest"}
    recipe = definition.parse(text, given, name="pytorch-gaudi.def")
    assert recipe.header["from"] == given["FROM"]
    assert recipe.header["bootstrap"] == "docker"

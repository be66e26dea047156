"""The site files and how one is found."""

import pytest

from toolkit import paths, sites, slurm
from toolkit.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "jobs/sites").mkdir(parents=True)
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    return paths.sites()


@pytest.mark.parametrize("name", sites.names())
def test_every_site_is_well_formed(name):
    site = sites.load(name)
    assert site.description
    assert site.source
    assert sum(p.default for p in site.partitions.values()) == (1 if site.partitions else 0)
    # Its options are ones that sbatch knows, and it refuses none of them itself.
    own = slurm.parse_options([*site.options, *site.gpu_option.format(count=2).split()])
    assert own.keys() <= slurm.VALUED | slurm.FLAGS
    assert not own.keys() & {option.lstrip("-") for option in site.rejects}
    assert slurm.gpu_count(own)


def test_the_sites_that_there_are():
    assert sites.names() == ["archer2", "frontier", "jade", "local", "lumi"]


def test_facts_of_jade():
    site = sites.load("jade")
    assert site.device == "rocm"
    assert site.default_partition == "short"
    assert {name: p.max_minutes for name, p in site.partitions.items()} == {
        "short": 12 * 60,
        "medium": 2 * 1440,
        "long": 30 * 1440,
    }
    assert site.scratch == "/scratch/slurm-$SLURM_JOB_ID"
    assert site.settings["base"].endswith("/PyTorch-2.3.0-AMD.sif")
    assert site.settings["data"] == "$DATA"
    assert site.gpus_per_node == 8


def test_facts_of_the_others():
    assert sites.load("lumi").gpu_option == "--gpus-per-node={count}"
    assert sites.load("lumi").environment["NCCL_SOCKET_IFNAME"] == "hsn0,hsn1,hsn2,hsn3"
    assert sites.load("lumi").cpu_bind == "map_cpu:49,57,17,25,1,9,33,41"
    assert "/pfs" in sites.load("lumi").binds
    assert sites.load("frontier").scratch == "/mnt/bb/$USER"
    assert [sites.load(n).gpus_per_node for n in ("lumi", "frontier", "archer2")] == [8, 8, 4]
    assert {name: p.max_minutes for name, p in sites.load("lumi").partitions.items()} == {
        "standard-g": 2 * 1440,
        "small-g": 3 * 1440,
        "dev-g": 180,
    }
    assert [p.max_nodes for p in sites.load("lumi").partitions.values()] == [1024, 4, 32]
    batch, extended = sites.load("frontier").partitions.values()
    assert [batch.minutes(n) for n in (1, 91, 92, 183, 184, 9472)] == [120] * 2 + [360] * 2 + [
        720
    ] * 2
    assert (extended.minutes(1), extended.max_nodes) == (1440, 64)
    assert sites.load("archer2").partitions["gpu"].max_minutes == 720
    assert sites.load("archer2").rejects == ("--ntasks", "--cpus-per-task")
    assert sites.load("archer2").options == ("--qos=gpu-shd",)
    assert [n for n in sites.names() if sites.load(n).account_required] == [
        "archer2",
        "frontier",
        "lumi",
    ]


def test_local_assumes_nothing():
    site = sites.load("local")
    assert not site.partitions
    assert not site.account_required
    assert site.device == "cpu"
    assert site.default_partition == ""


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("jade-login1", "jade"),
        ("node3.jade.example", "jade"),
        ("login05.frontier.olcf.ornl.gov", "frontier"),
        ("laptop", "local"),
        ("notjade", "local"),
    ],
)
def test_detect(hostname, name):
    assert sites.detect(hostname=hostname) == name


def test_unknown_site_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        sites.load("lum")
    assert "unknown site 'lum'" in caught.value.message
    assert "lumi" in caught.value.hint


def test_a_site_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "mine"\n')
    assert sites.load(str(path)).description == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('description = "x"\ndevice = "rcom"\n', "device: 'rcom' is unknown"),
        ('description = "x"\ngpu_option = "--gres=gpu:1"\n', "gpu_option: .* has no {count}"),
        (
            'description = "x"\ngpu_option = "--gres=gpu:{kind}:{count}"\n',
            "gpu_option: .*{kind}:{count}' is no option of sbatch",
        ),
        ('description = "x"\ngpu_option = "\'--gpus={count}"\n', "gpu_option: .* is no option"),
        ('description = "x"\ngpu_option = "gpus={count}"\n', "gpu_option: .* is no option"),
        ('description = "x"\noptions = ["foo"]\n', "options: 'foo' is not an option of sbatch"),
        ('description = "x"\noptions = ["--foo=1"]\n', "options: 'foo' is no option of sbatch"),
        (
            'description = "x"\ngpu_option = "--gpsu={count}"\n',
            "gpu_option: 'gpsu' is no option of sbatch",
        ),
        ('description = "x"\nrejects = ["--ntaks"]\n', "rejects: 'ntaks' is no option of sbatch"),
        ('description = "x"\nrejects = ["-Z"]\n', "rejects: 'Z' is no option of sbatch"),
        ('description = "x"\nrejects = [""]\n', "rejects: '' is no option of sbatch"),
        ('description = "x"\ngpus_per_node = -4\n', "gpus_per_node: -4 is not a number from 0 on"),
        ('description = "x"\nscratch_gb = -5\n', "scratch_gb: -5.0 is not a number from 0 on"),
        ('description = "x"\nscratch_gb = nan\n', "scratch_gb: nan is not a number from 0 on"),
        (
            'description = "x"\n[partitions.a]\nmax_minutes = -60\n',
            "partitions: a: max_minutes: -60 is not a number from 0 on",
        ),
        (
            'description = "x"\n[partitions.a]\nby_nodes = [[91, 120], [8, 60]]\n',
            r"a: by_nodes: \[\[91, 120\], \[8, 60\]\] are not pairs",
        ),
        ('description = "x"\n[partitions.a]\nby_nodes = [[91]]\n', "by_nodes: .* are not pairs"),
        ('description = "x"\n[partitions.a]\nby_nodes = [9, 1]\n', r"by_nodes\[0\]: 9 is not a"),
        ('description = "x"\ndetect = "*"\n', "detect: '\\*' is no regular expression"),
        (
            'description = "x"\n[environment]\n"A B" = "1"\n',
            "environment: 'A B' is no variable's name",
        ),
        ('description = "x"\npartition = "a"\n', "unknown key 'partition'"),
        ('description = "x"\n[partitions.a]\nmax_minutes = "12h"\n', "max_minutes: '12h' is not"),
        ('description = "x"\n[settings]\ndatta = "a"\n', "settings: unknown key 'datta'"),
        ('description = "x"\nscratch_gb = "9"\n', "scratch_gb: '9' is not a float"),
        (
            'description = "x"\n[partitions]\na = {default = true}\nb = {default = true}\n',
            "more than one is the default",
        ),
        ('device = "cpu"\n', "missing key 'description'"),
        ("description =\n", "is not valid TOML"),
    ],
)
def test_malformed_files_are_refused(folder, text, message):
    (folder / "bad.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        sites.load("bad")
    assert "bad.toml" in caught.value.message


def test_options_that_a_site_rejects_may_be_written_in_any_way(folder):
    (folder / "some.toml").write_text(
        'description = "x"\nrejects = ["-n", "--cpus-per-t", "hold"]\n'
    )
    assert sites.load("some").rejects == ("--ntasks", "--cpus-per-task", "--hold")

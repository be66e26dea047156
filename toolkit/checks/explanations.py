"""What each finding means, written once: for the table, ``--explain`` and docs/checks.md."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from toolkit.errors import UsageError


@dataclass(frozen=True)
class Explanation:
    """The long form of a finding.

    Attributes
    ----------
    tier : str
        ``host``, ``image`` or ``device``.
    title : str
        What is looked at, in a few words.
    about : str
        How it is found out, and what goes wrong without it.
    expected : str
        What should be.
    remedy : str
        The command or setting that mends it.
    source : str
        Where that is written.
    """

    tier: str
    title: str
    about: str
    expected: str
    remedy: str
    source: str


#: What Apptainer's --rocm brings in, and how to do without it.
WITHOUT_ROCM_OPTION = (
    "run with `--containall --bind /dev/kfd,/dev/dri` instead of `--rocm`, or use Apptainer 1.4.0"
    " or later"
)
KFD = "Linux kernel, drivers/gpu/drm/amd/amdkfd/kfd_topology.c"
AMDGPU = "Linux kernel documentation, 'AMDGPU driver information' (GPU memory and partitions)"
ISOLATION = "AMD ROCm documentation, 'GPU isolation techniques'"
INSTALL = "AMD ROCm documentation, 'Installation prerequisites: configuring permissions'"
MATRIX = "AMD ROCm documentation, 'User and kernel-space support matrix'"
APPTAINER_GPU = "Apptainer user guide, 'GPU support', and etc/rocmliblist.conf of its releases"
TORCH_HIP = "PyTorch documentation, 'HIP (ROCm) semantics'"
TORCH_CUDA = "PyTorch documentation, torch.cuda"
SLURM_GRES = "Slurm documentation, 'Generic resource scheduling', and sbatch's output variables"
MIOPEN = "MIOpen documentation, 'Find and performance databases' and 'Kernel cache'"
NVIDIA = "NVIDIA driver README, chapter 'Using the /proc file system interface'; nvidia-smi manual"
CUDA_ENV = "NVIDIA CUDA programming guide, 'CUDA environment variables'"
HABANA = "Intel Gaudi documentation, 'Installation' and 'hl-smi utility'"
HABANA_ENV = "Intel Gaudi documentation, 'Runtime environment variables'"
ACCEL = "Linux kernel documentation, 'Compute accelerators'; include/uapi/drm/habanalabs_accel.h"
CGROUP = "Linux kernel documentation, 'Control group v2' and 'cgroups v1: memory, cpusets'"
DEVICES = "toolkit/checks/devices.toml names the source of each mark; docs/benchmarks.md"
TORCH_CPU = "PyTorch documentation, 'CPU threading and TorchScript inference'"

EXPLANATIONS: dict[str, Explanation] = {
    "rocm.hardware": Explanation(
        "host",
        "AMD GPUs in this machine",
        "Looks for devices of AMD (vendor 0x1002) among /sys/class/kfd, /sys/class/drm and"
        " /sys/bus/pci. If there are none, nothing else about ROCm can hold: this is a login node,"
        " a node of another partition, or a container that does not show /sys.",
        "at least one AMD GPU",
        "run this on a GPU node, in a job: `srun --gres=gpu:1 toolkit check --rocm`",
        KFD,
    ),
    "rocm.driver": Explanation(
        "host",
        "The amdgpu driver",
        "Reads /sys/module/amdgpu: whether the module is there, whether it finished loading, and"
        " its version. The version is the driver's own, not that of ROCm; a driver that comes with"
        " the kernel has none.",
        "amdgpu loaded and live",
        "root loads it with `modprobe amdgpu`; `dmesg | grep amdgpu` says why it would not load",
        INSTALL,
    ),
    "rocm.kfd": Explanation(
        "host",
        "/dev/kfd opens to read and write",
        "Opens /dev/kfd, which every ROCm program does first. It is opened for real: inside user"
        " namespaces group names and modes mislead. Programs say 'Unable to open /dev/kfd"
        " read-write' or see no GPU at all.",
        "/dev/kfd opens to read and write",
        "join the group that owns it (`sudo usermod -aG render,video $USER`, then log in again); in"
        " a container add `--rocm` or `--bind /dev/kfd,/dev/dri`",
        INSTALL,
    ),
    "rocm.render": Explanation(
        "host",
        "The render devices open to read and write",
        "Opens /dev/dri/renderD* of each GPU that the topology names; the numbers need not be"
        " consecutive. Without them ROCm shows 0 GPUs although /dev/kfd is there: on many systems"
        " they belong to the group render while /dev/kfd belongs to video. A device that the cgroup"
        " of a job hides (EPERM) is another job's and not counted as a fault.",
        "each GPU's render device opens to read and write",
        "join the group render (`sudo usermod -aG render,video $USER`, then log in again)",
        INSTALL,
    ),
    "rocm.topology": Explanation(
        "host",
        "What GPUs the driver found",
        "Decodes /sys/class/kfd/kfd/topology/nodes/*/properties: target (gfx942 and the like),"
        " compute units (simd_count / simd_per_cu), XCCs, links, and the memory from the memory"
        " banks, as local_mem_size is 0 on MI300X. Nodes without a gfx_target_version are CPUs.",
        "at least one GPU node with a target and compute units",
        "`dmesg | grep -e kfd -e amdgpu` names why the driver set no GPU up",
        KFD,
    ),
    "rocm.count": Explanation(
        "host",
        "No GPU of the node is missing",
        "Compares the GPUs that the driver made usable with those on the PCI bus, with those that"
        " Slurm or `--expect` names, with the other end of each link, and, failing these, with the"
        " sizes that nodes come in (1, 2, 4, 8 or 16 of one model). A GPU that fell off the bus is"
        " gone from all lists until the node is reset.",
        "as many GPUs as the node has",
        "drain the node (`scontrol update nodename=NODE state=drain reason='GPU lost'`), look at"
        " `dmesg | grep -e amdgpu -e AER`, then power-cycle it",
        AMDGPU,
    ),
    "rocm.models": Explanation(
        "host",
        "All GPUs are of one model",
        "Compares target, compute units and memory of the GPUs. A job across different models waits"
        " for the slowest, and an image must hold code for each target.",
        "one model, or a job that asks for one of them",
        "ask Slurm for one model (`--gres=gpu:MODEL:N`), or mask the others with"
        " ROCR_VISIBLE_DEVICES",
        KFD,
    ),
    "rocm.partition": Explanation(
        "host",
        "Compute and memory partition mode",
        "Reads current_compute_partition and current_memory_partition of each card, and compares"
        " with the number of XCCs of its nodes. In CPX one MI300X shows as 8 devices of 38 compute"
        " units: device counts, memory and speed differ from what most instructions assume.",
        "the same mode on every GPU of the node",
        "root sets it for all with `amd-smi set --compute-partition SPX` (or `rocm-smi"
        " --setcomputepartition SPX`) while no job runs",
        AMDGPU,
    ),
    "rocm.links": Explanation(
        "host",
        "xGMI links between the GPUs",
        "Reads io_links and p2p_links of the GPU nodes. GPUs of one hive (the same hive_id) reach"
        " each other over xGMI (link type 11); with a link missing, all-reduce falls back to PCIe"
        " and takes several times as long.",
        "every GPU of a hive linked with every other, or at least with one",
        "drain the node and look at `rocm-smi --showtopo` and `dmesg | grep -i xgmi`",
        KFD,
    ),
    "rocm.memory": Explanation(
        "host",
        "GPU memory that is already used",
        "Compares mem_info_vram_used with mem_info_vram_total. What is used before a job starts is"
        " a process that an earlier job left, or another job on the same GPU: out-of-memory errors"
        " at sizes that ought to fit.",
        "less than 5 % and less than 2 GiB of each GPU used",
        "`rocm-smi --showpids` names the processes; end them, or have the site clean up in its"
        " epilog",
        AMDGPU,
    ),
    "rocm.errors": Explanation(
        "host",
        "Memory errors that could not be corrected",
        "Reads the ras/*_err_count files of each card: `ue` counts errors that were not corrected."
        " Results of such a GPU are not to be trusted.",
        "no uncorrected error",
        "drain the node; the GPU's bad pages are retired at the next reset (`rocm-smi"
        " --showretiredpages`)",
        "Linux kernel documentation, 'AMDGPU RAS support'",
    ),
    "rocm.affinity": Explanation(
        "host",
        "CPUs near the GPUs",
        "Compares numa_node and local_cpulist of each GPU with the CPUs that this process may run"
        " on. A process on the far socket copies to the GPU at a fraction of the speed.",
        "CPUs of each GPU's own NUMA node",
        "let Slurm bind them (`--gpu-bind=closest`, or `--cpu-bind` with the cores near the GPU)",
        "Linux kernel documentation, 'PCI bus sysfs attributes' (numa_node, local_cpulist)",
    ),
    "rocm.iommu": Explanation(
        "host",
        "iommu=pt on the kernel's command line",
        "Reads /proc/cmdline. With several GPUs and a translating IOMMU, RCCL warns of instability"
        " and collectives hang.",
        "iommu=pt (or the IOMMU off) where several GPUs work together",
        "root adds iommu=pt to the kernel's command line (GRUB_CMDLINE_LINUX, then update-grub or"
        " grub2-mkconfig) and reboots",
        "AMD Instinct documentation, 'System optimization: IOMMU'; RCCL's start-up warning",
    ),
    "rocm.masks": Explanation(
        "host",
        "Variables that hide GPUs",
        "Works out what ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES and"
        " GPU_DEVICE_ORDINAL leave together. The ROCR variable is applied first; the others count"
        " inside what it left, so ROCR=2,3 with HIP=2,3 leaves nothing ('No HIP GPUs are"
        " available'). HIP_VISIBLE_DEVICES wins over CUDA_VISIBLE_DEVICES. Set but empty, a"
        " variable hides every GPU; after a number that does not exist the rest is ignored.",
        "one variable, or a second that counts from 0 within the first",
        "unset the second: `unset HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL`",
        ISOLATION,
    ),
    "rocm.override": Explanation(
        "host",
        "HSA_OVERRIDE_GFX_VERSION",
        "This variable makes ROCm take a GPU for another. It is meant for consumer cards without"
        " support; on an Instinct card it makes code for the wrong target run: crashes or wrong"
        " numbers.",
        "not set on Instinct cards",
        "`unset HSA_OVERRIDE_GFX_VERSION`",
        "AMD ROCR-Runtime, environment variables",
    ),
    "rocm.caches": Explanation(
        "host",
        "Caches of MIOpen and Triton on a local file system",
        "Finds the file system (from /proc/self/mountinfo) under MIOPEN_USER_DB_PATH,"
        " MIOPEN_CUSTOM_CACHE_DIR and TRITON_CACHE_DIR, or under the home where they default to."
        " Several ranks on one shared folder end in 'database disk image is malformed' or 'Stale"
        " file handle'. MIOPEN_USER_DB, which is often seen, does nothing.",
        "node-local folders, one per user and job",
        'export MIOPEN_USER_DB_PATH="$TMPDIR/miopen" MIOPEN_CUSTOM_CACHE_DIR="$TMPDIR/miopen"'
        ' TRITON_CACHE_DIR="$TMPDIR/triton"; mkdir -p these before the ranks start',
        MIOPEN,
    ),
    "rocm.tools": Explanation(
        "host",
        "rocm-smi or amd-smi agrees with the driver",
        "Reads the JSON of rocm-smi or amd-smi where a recorded tree holds it, in the spelling of"
        " old and new releases, and compares the number of GPUs with the topology.",
        "as many GPUs as the topology has",
        "`amd-smi static --json` on the node; a tool of another ROCm release than the driver may"
        " not know the GPU",
        "AMD SMI and ROCm SMI documentation, command-line tools",
    ),
    "cuda.hardware": Explanation(
        "host",
        "NVIDIA GPUs in this machine",
        "Looks for devices of NVIDIA (vendor 0x10de) among /proc/driver/nvidia/gpus, /sys/bus/pci"
        " and /dev/nvidia*. If there are none, nothing else about CUDA can hold.",
        "at least one NVIDIA GPU",
        "run this on a GPU node, in a job: `srun --gres=gpu:1 toolkit check --cuda`",
        NVIDIA,
    ),
    "cuda.driver": Explanation(
        "host",
        "The NVIDIA driver",
        "Reads /proc/driver/nvidia/version. 'Driver/library version mismatch' of nvidia-smi means"
        " that the driver's libraries were updated and its module was not reloaded.",
        "the driver loaded, its libraries of the same version",
        "root loads it with `modprobe nvidia`; after an update of the driver reboot the node",
        NVIDIA,
    ),
    "cuda.devices": Explanation(
        "host",
        "/dev/nvidia* open to read and write",
        "Opens nvidiactl, nvidia-uvm and each GPU's device file. Without nvidia-uvm CUDA says"
        " 'unknown error' although nvidia-smi works.",
        "nvidiactl, nvidia-uvm and a device file per GPU open to read and write",
        "root runs `nvidia-modprobe -u -c=0` (or nvidia-persistenced at boot) to make them; in a"
        " container add `--nv`",
        NVIDIA,
    ),
    "cuda.smi": Explanation(
        "host",
        "What nvidia-smi reports",
        "Runs nvidia-smi (or reads its recorded CSV) for name, memory and driver of each GPU.",
        "one row per GPU",
        "`nvidia-smi` on the node tells the reason; 'No devices were found' with devices on the PCI"
        " bus calls for `dmesg | grep -i nvrm`",
        NVIDIA,
    ),
    "cuda.count": Explanation(
        "host",
        "No GPU of the node is missing",
        "Compares the GPUs that nvidia-smi reports with those on the PCI bus, in"
        " /proc/driver/nvidia/gpus, and with what Slurm or `--expect` names.",
        "as many GPUs as the node has",
        "drain the node, look at `dmesg | grep -i -e xid -e 'fallen off the bus'`, then power-cycle"
        " it",
        NVIDIA,
    ),
    "cuda.models": Explanation(
        "host",
        "All GPUs are of one model",
        "Compares the names that the driver gives.",
        "one model, or a job that asks for one of them",
        "ask Slurm for one model (`--gres=gpu:MODEL:N`), or mask the others with"
        " CUDA_VISIBLE_DEVICES",
        NVIDIA,
    ),
    "cuda.memory": Explanation(
        "host",
        "GPU memory that is already used",
        "Compares memory.used with memory.total. What is used before a job starts belongs to a"
        " process that an earlier job left, or to another job on the same GPU.",
        "less than 5 % and less than 2 GiB of each GPU used",
        "`nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv` names the processes",
        NVIDIA,
    ),
    "cuda.errors": Explanation(
        "host",
        "Memory errors that could not be corrected",
        "Reads ecc.errors.uncorrected.volatile.total.",
        "no uncorrected error since the last reset",
        "drain the node and reset the GPU (`nvidia-smi --gpu-reset`); see `nvidia-smi -q -d"
        " ROW_REMAPPER`",
        NVIDIA,
    ),
    "cuda.mig": Explanation(
        "host",
        "MIG mode",
        "Reads mig.mode.current. With MIG on, a process sees one slice of one GPU, whatever"
        " CUDA_VISIBLE_DEVICES lists, and collectives between slices do not work.",
        "the same mode on every GPU of the node",
        "root sets it with `nvidia-smi -mig 0` while no job runs",
        "NVIDIA Multi-Instance GPU user guide",
    ),
    "cuda.affinity": Explanation(
        "host",
        "CPUs near the GPUs",
        "Compares numa_node and local_cpulist of each GPU with the CPUs that this process may run"
        " on.",
        "CPUs of each GPU's own NUMA node",
        "let Slurm bind them (`--gpu-bind=closest`, or `--cpu-bind` with the cores near the GPU)",
        "Linux kernel documentation, 'PCI bus sysfs attributes' (numa_node, local_cpulist)",
    ),
    "cuda.masks": Explanation(
        "host",
        "CUDA_VISIBLE_DEVICES",
        "Works out what the variable leaves. Set but empty it hides every GPU; after a number that"
        " does not exist the rest is ignored.",
        "numbers of GPUs that are there, or UUIDs",
        "`unset CUDA_VISIBLE_DEVICES`, or let Slurm set it (`--gres=gpu:N`)",
        CUDA_ENV,
    ),
    "cuda.caches": Explanation(
        "host",
        "Caches of CUDA and Triton on a local file system",
        "Finds the file system under CUDA_CACHE_PATH and TRITON_CACHE_DIR, or under the home where"
        " they default to. Several ranks on one shared folder end in 'Stale file handle'.",
        "node-local folders, one per user and job",
        'export CUDA_CACHE_PATH="$TMPDIR/cuda" TRITON_CACHE_DIR="$TMPDIR/triton"',
        CUDA_ENV,
    ),
    "hpu.hardware": Explanation(
        "host",
        "Gaudi devices in this machine",
        "Reads /sys/class/accel/accel*/device/vendor: 0x1da3 is Habana (device 0x1000 and 0x1010"
        " Gaudi, 0x1020 Gaudi 2, 0x1060 Gaudi 3). Other accelerators, such as Intel's NPUs, are in"
        " the same class and not meant. Older drivers make /dev/hl* instead.",
        "at least one Gaudi",
        "run this on a Gaudi node, in a job that has the node for itself (`srun --exclusive`)",
        ACCEL,
    ),
    "hpu.driver": Explanation(
        "host",
        "The habanalabs driver",
        "Reads /sys/module/habanalabs and the driver's version.",
        "habanalabs loaded",
        "root loads it with `modprobe habanalabs`; `dmesg | grep habanalabs` says why it would not"
        " load",
        HABANA,
    ),
    "hpu.devices": Explanation(
        "host",
        "The device files of each Gaudi can be read and written",
        "Asks whether /dev/accel/accelN and accel_controlDN (older: /dev/hlN, hl_controlDN) may be"
        " read and written. They are not opened: a Gaudi takes one user at a time and is reset when"
        " that one leaves.",
        "each device and its control device may be read and written",
        "have root set the udev rules of the habanalabs package; in a container bind each file"
        " (`--bind /dev/accel/accel0`), not the folder",
        HABANA,
    ),
    "hpu.smi": Explanation(
        "host",
        "What hl-smi reports",
        "Runs hl-smi (or reads its recorded CSV) for name, driver, module id and memory. Its rows"
        " may be unsorted, and the index is not the module id.",
        "one row per Gaudi",
        "`hl-smi` on the node tells the reason",
        HABANA,
    ),
    "hpu.versions": Explanation(
        "host",
        "One driver and supported devices",
        "Compares the driver versions that hl-smi and /sys give, and whether the driver still"
        " supports the device: from 1.22 on only Gaudi 2 and 3.",
        "one driver version, 1.21 or older for the first Gaudi",
        "install the driver that the image's user space needs; the first Gaudi (AWS DL1) needs 1.21"
        " or older",
        "Intel Gaudi documentation, 'Support matrix'",
    ),
    "hpu.count": Explanation(
        "host",
        "No Gaudi of the node is missing",
        "Compares the devices in /sys with hl-smi's rows and with what Slurm or `--expect` names.",
        "as many devices as the node has",
        "drain the node and look at `dmesg | grep habanalabs`; power-cycle it",
        HABANA,
    ),
    "hpu.memory": Explanation(
        "host",
        "Memory that is already used",
        "Compares memory.used with memory.total of hl-smi's rows. A fresh Gaudi shows several"
        " hundred MiB used by its firmware.",
        "less than 5 % and less than 2 GiB of each device used",
        "`hl-smi` names the processes; end them, or have the site clean up in its epilog",
        HABANA,
    ),
    "hpu.masks": Explanation(
        "host",
        "Variables that choose Gaudis",
        "HABANA_VISIBLE_DEVICES is read by the Docker runtime alone; under Apptainer a process is"
        " kept to some modules with HABANA_VISIBLE_MODULES, a list of module ids.",
        "HABANA_VISIBLE_MODULES with module ids that exist, or neither",
        "`unset HABANA_VISIBLE_DEVICES`; set HABANA_VISIBLE_MODULES to hl-smi's module ids",
        HABANA_ENV,
    ),
    "hpu.mode": Explanation(
        "host",
        "Eager or lazy mode",
        "PT_HPU_LAZY_MODE=0, the default of today's releases, is eager with torch.compile; 1 is"
        " lazy: there `htcore.mark_step()` must follow backward() and optimizer.step(). It"
        " is read at import, so it must be set before.",
        "0 or 1, set before the import",
        "export PT_HPU_LAZY_MODE=0 (eager) or 1 (lazy) in the job script",
        HABANA_ENV,
    ),
    "cpu.cores": Explanation(
        "host",
        "CPU cores of this process",
        "Compares the CPUs that this process may run on (Cpus_allowed_list) with the share that the"
        " cgroup grants (cpu.max, or cpu.cfs_quota_us) and with Slurm's. Programs count cores, not"
        " shares: with 64 cores and a share of 4 they start 64 threads.",
        "a share of as many CPUs as the process sees",
        "export OMP_NUM_THREADS to the share; in Slurm ask for more (`--cpus-per-task=N`)",
        CGROUP,
    ),
    "cpu.memory": Explanation(
        "host",
        "Memory of this process",
        "Reads the limit of the cgroup (memory.max, or memory.limit_in_bytes, of every level) and"
        " what is used of it, and MemAvailable. A process beyond the limit is killed (exit code"
        " 137).",
        "at least 2 GiB and a tenth of the limit free",
        "in Slurm ask for more (`--mem=SIZE`)",
        CGROUP,
    ),
    "cpu.shm": Explanation(
        "host",
        "Room in /dev/shm",
        "Reads the size of /dev/shm from the mount options. Workers of a DataLoader hand tensors"
        " over there: 'DataLoader worker is killed by signal: Bus error'. What lies there counts as"
        " memory of the job.",
        "a tmpfs of at least 1 GiB",
        "root: `mount -o remount,size=50% /dev/shm`; else num_workers=0, or"
        " torch.multiprocessing.set_sharing_strategy('file_system')",
        "PyTorch documentation, 'Multiprocessing best practices'",
    ),
    "cpu.threads": Explanation(
        "host",
        "Thread settings",
        "Compares OMP_NUM_THREADS and MKL_NUM_THREADS, times the ranks on this node, with the CPUs"
        " that the job has. Too many threads wait for each other.",
        "threads times ranks no more than the CPUs",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        TORCH_CPU,
    ),
    "cpu.numa": Explanation(
        "host",
        "NUMA nodes",
        "Compares the NUMA nodes of the allowed CPUs with those whose memory may be used"
        " (Mems_allowed_list). Work that spreads over nodes runs at the speed of the link between"
        " them.",
        "CPUs and memory of the same nodes",
        "in Slurm `--cpu-bind=cores --mem-bind=local`, or `numactl --cpunodebind=N --membind=N`",
        CGROUP,
    ),
    "slurm.gpus": Explanation(
        "host",
        "Slurm's allocation and what is visible",
        "Compares SLURM_GPUS_ON_NODE (or SLURM_JOB_GPUS, SLURM_STEP_GPUS) with the devices that can"
        " be opened and that the masking variables leave. Without `ConstrainDevices=yes` a job sees"
        " GPUs that are not its own.",
        "exactly the devices that Slurm gave",
        "ask for them (`--gres=gpu:N`); the site sets ConstrainDevices=yes in cgroup.conf",
        SLURM_GRES,
    ),
    "image.none": Explanation(
        "image",
        "An image to look into",
        "The image tier starts a container once, with `--image SIF`, and asks its torch what it was"
        " built for. It needs no device.",
        "an image",
        "add `--image build/monai.sif`",
        APPTAINER_GPU,
    ),
    "image.start": Explanation(
        "image",
        "The container starts and its Python answers",
        "Runs a small script of the toolkit with the image's Python and the host's devices.",
        "the container starts",
        "`toolkit doctor` tells what this host lacks to run containers; `toolkit inspect SIF` tells"
        " whether the file is whole",
        APPTAINER_GPU,
    ),
    "image.torch": Explanation(
        "image",
        "The image's torch and what it was built for",
        "Imports torch and reads torch.version.hip, .cuda and .git_version. A torch of another"
        " backend sees no device, whatever the host has: `pip install torch` in a ROCm image puts a"
        " CUDA build there. An import that fails over GLIBC or GLIBCXX under /.singularity.d/libs"
        " took the host's libraries instead of its own.",
        "torch of the backend that is asked for",
        "build on the vendor's image (`toolkit build monai --base SIF`), which keeps its torch",
        TORCH_HIP,
    ),
    "image.targets": Explanation(
        "image",
        "torch holds code for the GPUs of this host",
        "Compares torch.cuda.get_arch_list() with the targets of the host's GPUs. Without it"
        " kernels fail: 'invalid device function' or 'no kernel image is available'.",
        "the host's targets in the list",
        "use an image whose torch was built for this GPU (a newer release of the vendor's)",
        TORCH_HIP,
    ),
    "image.release": Explanation(
        "image",
        "The image's ROCm and the host's driver",
        "Compares the ROCm release in the image (/opt/rocm/.info/version, torch.version.hip) with"
        " the release that the host's amdgpu version belongs to. AMD supports two releases either"
        " way; from 6.4 on, releases up to a year apart.",
        "releases within AMD's support matrix",
        "use an image of a ROCm release near the driver's, or have the site update the driver",
        MATRIX,
    ),
    "image.shadowed": Explanation(
        "image",
        "Host libraries that shadow the image's own",
        "Apptainer's --rocm and --nv put libraries of the host under /.singularity.d/libs, which"
        " comes first on the library path; up to 1.3.6 --rocm also brings HSA, MIOpen, RCCL,"
        " rocBLAS and more. After the import of torch the memory map tells which were really"
        " loaded, and the image's own file of that name which are shadowed. Signs are 'GLIBC_2.33"
        " not found', 'rocBLAS error: Cannot read TensileLibrary.dat', wrong results.",
        "no library of the image replaced by one of the host",
        WITHOUT_ROCM_OPTION,
        APPTAINER_GPU,
    ),
    "image.libraries": Explanation(
        "image",
        "MIOpen, RCCL or cuDNN, NCCL of the image",
        "Reads torch.backends.cudnn.version() and torch.cuda.nccl.version(), which on ROCm are"
        " those of MIOpen and RCCL.",
        "both are there",
        "use the vendor's image; a torch without them trains neither convolutions nor on several"
        " GPUs",
        TORCH_HIP,
    ),
    "image.driver": Explanation(
        "image",
        "The image's user space and the host's driver",
        "For Gaudi: compares the release of habana-torch-plugin in the image with the driver's;"
        " they must be of one release ('synStatus 26' otherwise). For CUDA: the driver must be new"
        " enough for the CUDA release that torch was built with.",
        "versions that work together",
        "use an image of the driver's release, or have the site update the driver",
        "Intel Gaudi documentation, 'Support matrix'; NVIDIA 'CUDA compatibility'",
    ),
    "device.hardware": Explanation(
        "device",
        "Devices to compute on",
        "The device tier needs hardware, a job that has it, and an image (`--image`).",
        "a job on a node with devices",
        "`srun --gres=gpu:1 toolkit check --image SIF`",
        SLURM_GRES,
    ),
    "device.count": Explanation(
        "device",
        "The container sees the devices of the host",
        "Compares torch's device count with the devices that the host has, that Slurm gave and that"
        " the masking variables leave.",
        "as many devices in the container as on the host",
        "start the container with `--rocm` or `--nv`; under --containall bind /dev/kfd, /dev/dri",
        TORCH_CUDA,
    ),
    "device.properties": Explanation(
        "device",
        "What torch tells of a device",
        "Prints get_device_properties() of each device and compares its target and compute units"
        " with the host's topology. 'amdgpu.ids: No such file' is harmless: only the name is then"
        " missing.",
        "the same target and compute units as the host's topology",
        "look for masking variables and HSA_OVERRIDE_GFX_VERSION; compare with `rocminfo`",
        TORCH_CUDA,
    ),
    "device.fp32": Explanation(
        "device",
        "A matrix product in fp32 agrees with the CPU's",
        "Multiplies two random matrices on each device and compares with a product in double"
        " precision on the CPU.",
        "a relative error below 0.0001",
        "try another GPU of the node; if only this one is wrong, drain the node and tell the site",
        TORCH_CUDA,
    ),
    "device.bf16": Explanation(
        "device",
        "A matrix product in bf16 agrees with the CPU's",
        "The same in bfloat16. torch.cuda.is_bf16_supported() always says True on ROCm, so it is"
        " computed.",
        "a relative error below 0.02",
        "try another GPU of the node; if only this one is wrong, drain the node and tell the site",
        TORCH_HIP,
    ),
    "bench.run": Explanation(
        "device",
        "The measurement ran to its end on every device",
        "`--bench` starts a process per device in the container. One that crashes, hangs or cannot"
        " use its device is ended and named, with what it was doing; the others go on.",
        "every device measured",
        "run `toolkit check --image SIF` on the node; if a device alone does this, drain the node",
        TORCH_CUDA,
    ),
    "bench.copy": Explanation(
        "device",
        "Copy bandwidth of a device's own memory",
        "Copies a buffer of several times the largest cache, filled with random values; a copy"
        " counts as read and written. Slow memory makes everything slow that is no matrix product.",
        "the mark of the device",
        "look for another process on the device (`rocm-smi --showpids`, `nvidia-smi`), for the"
        " memory partition mode, and at the memory clock; else drain the node",
        DEVICES,
    ),
    **{
        f"bench.matmul.{name}": Explanation(
            "device",
            f"Speed of matrix products in {name}",
            "Multiplies large square matrices of random values (zeros or constants draw less power"
            " and run at higher clocks), in a few sizes and ways, and keeps the fastest.",
            "the mark of the device",
            "look at clocks, power cap and temperature under load (`rocm-smi`, `nvidia-smi -q -d"
            " PERFORMANCE`), for another process on the device, and compare with another image;"
            " torch 2.3 for ROCm needs TORCH_BLAS_PREFER_HIPBLASLT=1; else drain the node",
            DEVICES,
        )
        for name in ("bf16", "fp16", "tf32", "fp32", "fp64", "int8", "fp8")
    },
    **{
        f"bench.{name}": Explanation(
            "device",
            f"Bandwidth from {way}",
            "Copies between pinned memory of the host and the device, one device at a time.",
            "as much as the node's other devices",
            "compare the link with what it should be (`lspci -vv`, LnkSta), and bind the job to the"
            " CPUs near the device (`--gpu-bind=closest`)",
            DEVICES,
        )
        for name, way in (("h2d", "host to device"), ("d2h", "device to host"))
    },
    "bench.allreduce": Explanation(
        "device",
        "All-reduce across the devices of the job on this node",
        "Sums a buffer over one process per device with RCCL, NCCL, HCCL or, on the CPU, gloo with"
        " two processes. Told is the bus bandwidth, 2(n-1)/n times size over time, which does not"
        " depend on the number of devices.",
        "the sum is right and the bandwidth that of the links",
        "look at the links (`rocm-smi --showtopo`, `nvidia-smi topo -m`), at `iommu=pt`, and at"
        " what NCCL_DEBUG=INFO prints",
        "NVIDIA nccl-tests, doc/PERFORMANCE.md (bus bandwidth)",
    ),
    "bench.outlier": Explanation(
        "device",
        "Equal devices are equally fast",
        "Compares each figure of devices of one model with their median: off by more than 10 %, and"
        " by more than the spread of the figures, is named; slower by more than 25 % fails. A job"
        " across the devices waits for the slowest.",
        "within 10 % of the median of the node's devices",
        "measure again on the idle node; if it is the same device, drain the node, tell the site",
        DEVICES,
    ),
}

#: Messages that people meet, and what they mean. Searched for in what a container says.
SYMPTOMS: tuple[tuple[str, str, str], ...] = (
    (r"GLIBC(XX)?_[0-9.]+.{0,40}not found", "libraries of the host, of another release, were"
     " loaded", WITHOUT_ROCM_OPTION),
    (r"TensileLibrary|rocBLAS error: Cannot read", "rocBLAS of the host was loaded",
     WITHOUT_ROCM_OPTION),
    (r"[Uu]nable to open /dev/kfd", "/dev/kfd is not in the container, or not permitted",
     "add `--rocm` or `--bind /dev/kfd,/dev/dri`; join the group that owns /dev/kfd"),
    (r"No HIP GPUs are available", "no GPU is left, often by two masking variables",
     "`unset HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES`; see `toolkit check --explain rocm.masks`"),
    (r"invalid device function|no kernel image is available", "torch holds no code for this GPU",
     "use an image whose torch was built for it; see `toolkit check --explain image.targets`"),
    (r"database disk image is malformed", "a MIOpen database on a shared file system",
     "set MIOPEN_USER_DB_PATH to a node-local folder"),
    (r"Stale file handle", "a cache on a shared file system",
     "set TRITON_CACHE_DIR and MIOPEN_CUSTOM_CACHE_DIR to a node-local folder"),
    (r"synStatus\W{0,3}8\b", "the Gaudi is in use or its device file is not bound",
     "bind each /dev/accel/accelN file, not the folder; ask for the node exclusively"),
    (r"synStatus\W{0,3}26\b", "the image's user space does not match the habanalabs driver",
     "use an image of the driver's release"),
    (r"[Oo]ut of memory", "the device's memory is used already",
     "see `toolkit check --explain rocm.memory`"),
    (r"Found no NVIDIA driver|driver version is insufficient", "no NVIDIA driver, or one too old",
     "start the container with --nv on a node with an NVIDIA driver that is new enough"),
    (r"No module named '?torch'?", "the image has no torch", "build on a PyTorch image"),
)  # fmt: skip


def explain(id: str) -> str:
    """Return the long form of a finding, for people.

    Raises
    ------
    UsageError
        If there is no such finding.
    """
    known = EXPLANATIONS.get(id)
    if known is None:
        close = difflib.get_close_matches(id, EXPLANATIONS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "docs/checks.md lists them all"
        raise UsageError(f"no finding is called {id!r}", hint=hint)
    return (
        f"{id} ({known.tier} tier): {known.title}\n\n{known.about}\n\n"
        f"Expected: {known.expected}\nRemedy:   {known.remedy}\nSource:   {known.source}"
    )

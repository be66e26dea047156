"""Print torch's version and the properties of each device that it sees."""

import importlib.util

import torch

devices = torch.cuda
if importlib.util.find_spec("habana_frameworks"):
    import habana_frameworks.torch  # noqa: F401  # adds torch.hpu

    devices = torch.hpu

print("Version:", torch.__version__)
print("Devices:", devices.device_count())

for i in range(devices.device_count()):
    print("Device", i, ":", devices.get_device_properties(i))

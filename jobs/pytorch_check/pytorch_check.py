"""Print torch's version and the properties of each device that it sees."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

import devices
import torch

properties = devices.seen()
print("Version:", torch.__version__)
print("Devices:", len(properties))

for i, each in enumerate(properties):
    print("Device", i, ":", each)

"""Start JupyterLab on this host's loopback, with the port and the token that job.sh chose."""

import importlib.util
import os
import sys

if importlib.util.find_spec("jupyterlab") is None:
    print(
        "error: there is no JupyterLab in the image\n"
        "  Make one with it by `toolkit build monai --with jupyterlab --output build/lab.sif`\n"
        "  and run it by `toolkit submit jupyter --image build/lab.sif`.",
        file=sys.stderr,
    )
    sys.exit(2)

with open(os.path.expanduser("~/server")) as stream:
    port, token = stream.read().split()

# In a file of the job's private home, since everybody on the node sees command lines.
folder = os.path.expanduser("~/.jupyter")
os.makedirs(folder, mode=0o700, exist_ok=True)
path = os.path.join(folder, "jupyter_server_config.py")
with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
    stream.write(
        "c.ServerApp.ip = '127.0.0.1'\n"
        "c.ServerApp.port = %d\n"
        "c.ServerApp.port_retries = 0\n"
        "c.ServerApp.open_browser = False\n"
        "c.ServerApp.root_dir = %r\n"
        "c.ServerApp.allow_root = %r\n"
        "c.IdentityProvider.token = %r\n" % (int(port), os.getcwd(), os.geteuid() == 0, token)
    )
os.execv(sys.executable, [sys.executable, "-m", "jupyterlab"])

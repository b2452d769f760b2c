"""The environment of all tests: no network, two threads without busy waiting, and a temporary cache folder."""

import os
from tempfile import mkdtemp

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["XDG_CACHE_HOME"] = mkdtemp(prefix="scumble-cache-")

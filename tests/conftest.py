"""Shared by all tests: no network, two threads that do not wait in a spin, a cache of their own."""

import os
from tempfile import mkdtemp

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["XDG_CACHE_HOME"] = mkdtemp(prefix="scumble-cache-")

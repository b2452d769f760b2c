import inspect
import json
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
from torch._library import utils as library_utils

from scumble.trainer.mending import MENDED, ask_frames_for_modules, mended, read_no_lines

TELL = """
import json, sys
from contextlib import nullcontext
from scumble.trainer.mending import mended
with mended() if sys.argv[1] == "mended" else nullcontext():
    import torch, transformers, transformers.models, transformers.models.clip
    from transformers.utils import import_utils
fakes = {name: entry.fake_impl.kernels for name, entry in torch._library.simple_registry.singleton._data.items()}
print(json.dumps({
    "reader": import_utils.fetch__all__.__module__,
    "names": [sorted(one._class_to_module.items()) for one in (transformers, transformers.models)],
    "structures": [sorted((key, sorted(set(names))) for key, names in one._import_structure.items())
                   for one in (transformers, transformers.models, transformers.models.clip)],
    "missing": sorted((key, sorted(names)) for key, names in transformers._object_missing_backend.items()),
    "fakes": sorted((name, [one.source for one in kernels]) for name, kernels in fakes.items() if kernels),
}))
"""


def test_mended_imports_find_all_that_plain_ones_do():
    plain, quick = (
        json.loads(subprocess.run([sys.executable, "-c", TELL, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "mended")
    )
    assert quick.pop("reader") == "scumble.trainer.mending"
    assert plain.pop("reader") == "transformers.utils.import_utils"
    assert len(plain["names"][0]) > 1000
    assert len(plain["fakes"]) > 10
    assert quick == plain


def test_the_line_of_a_caller_is_that_of_torch():
    mine = SimpleNamespace()
    read_no_lines(mine)
    assert [mine.get_source(1)] == [library_utils.get_source(1)]


def test_the_module_of_a_frame_is_that_of_inspect():
    mine = SimpleNamespace(inspect=inspect)
    ask_frames_for_modules(mine)
    frame, compared = sys._getframe(), 0
    while frame is not None:
        if "<frozen" not in frame.f_code.co_filename:  # inspect knows of none where there is no file
            assert mine.inspect.getmodule(frame) is inspect.getmodule(frame)
            compared += 1
        frame = frame.f_back
    assert compared > 10
    assert mine.inspect.getmodule(pytest.raises) is inspect.getmodule(pytest.raises)
    assert mine.inspect.signature is inspect.signature


def test_another_version_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "mended_module.py").write_text("fetch = 'as it was'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MENDED, "mended_module", MENDED["transformers.utils.import_utils"])
    finders = list(sys.meta_path)
    with mended():
        assert import_module("mended_module").fetch == "as it was"
    assert sys.meta_path == finders

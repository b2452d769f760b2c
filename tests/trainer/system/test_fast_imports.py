import gc
from importlib import import_module

import pytest

from scumble.trainer.system.fast_imports import hidden, quick_imports


def test_a_hidden_package_is_not_found_until_after(tmp_path, monkeypatch):
    (tmp_path / "rarely_wanted.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("rarely_wanted"), pytest.raises(ImportError):
        import_module("rarely_wanted")
    assert import_module("rarely_wanted").answer == 42
    with hidden("rarely_wanted"):
        assert import_module("rarely_wanted").answer == 42  # who has it keeps it


def test_imports_are_not_searched_for_garbage_even_when_one_fails():
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            import_module("bitsandbytes.not_there")
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()

import gc
from importlib import import_module

import pytest

from scumble.trainer.system.fast_imports import hidden, quick_imports


def test_a_hidden_package_can_be_imported_only_after_the_block(tmp_path, monkeypatch):
    (tmp_path / "rarely_needed.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("rarely_needed"), pytest.raises(ImportError):
        import_module("rarely_needed")
    assert import_module("rarely_needed").answer == 42
    with hidden("rarely_needed"):
        assert import_module("rarely_needed").answer == 42  # imported packages stay available


def test_garbage_collection_is_off_during_imports_and_restored_even_after_a_failure():
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            import_module("bitsandbytes.not_there")
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()

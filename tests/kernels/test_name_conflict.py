import importlib
import sys

import pytest

from kernels import name_conflict


def test_the_distribution_of_this_name_is_refused(tmp_path, monkeypatch):
    name_conflict.refuse_name_conflict()
    (tmp_path / "kernels-0.9.0.dist-info").mkdir()
    (tmp_path / "kernels-0.9.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.9.0\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=r"'kernels' 0\.9\.0 from PyPI is installed .* `pip uninstall kernels`"):
        name_conflict.refuse_name_conflict()

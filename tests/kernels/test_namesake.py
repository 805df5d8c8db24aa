import importlib
import sys

import pytest

from kernels import namesake


def test_the_distribution_of_this_name_is_refused(tmp_path, monkeypatch):
    namesake.refuse_namesake()
    (tmp_path / "kernels-0.9.0.dist-info").mkdir()
    (tmp_path / "kernels-0.9.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.9.0\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=r"'kernels' 0\.9\.0 from PyPI is installed .* `pip uninstall kernels`"):
        namesake.refuse_namesake()

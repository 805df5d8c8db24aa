"""The PyPI distribution `kernels` (Hugging Face's kernel hub) installs into this package's import name."""

from importlib.metadata import PackageNotFoundError, distribution


def refuse_namesake() -> None:
    """Raise ImportError where that distribution is installed: its files and ours would overwrite or hide one another,
    and which of the two an `import kernels` finds would depend on the order of `sys.path`.
    """
    try:
        version = distribution("kernels").version
    except PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'kernels' {version} from PyPI is installed and takes the import name of creche's own package"
        " `kernels`: run `pip uninstall kernels`, then reinstall creche"
    )

"""The PyPI distribution `kernels` (Hugging Face's kernel hub) has the import name of this package."""

from importlib.metadata import PackageNotFoundError, distribution


def refuse_name_conflict() -> None:
    """Raises ImportError if the distribution `kernels` is installed. Its files and ours would overwrite or hide one
    another, and the order of `sys.path` would decide which of the two `import kernels` finds.
    """
    try:
        version = distribution("kernels").version
    except PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'kernels' {version} from PyPI is installed and takes the import name of creche's own package"
        " `kernels`: run `pip uninstall kernels`, then reinstall creche"
    )

"""Text -> cleaned text -> tokenizer -> token files, in a folder of their own. A run prepares its data by itself; this
does it beforehand, and shows what came of it.

    python recipes/prepare.py
    python recipes/prepare.py data.path=wikipedia-leads data.tokenizer.vocab_size=8000
    python recipes/prepare.py data.path=babylm_10M data.cleaner=baby-llama data.boundary=false
    python recipes/prepare.py --config recipes/babies/prepare.yaml data.path=my_texts

Settings: recipes/prepare.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.cli import load
from engine.config.settings import PrepareConfig
from engine.data.prepare import Prepared, prepare
from engine.system.errors import report_errors


def table(prepared: Prepared) -> Table:
    """What is in a prepared folder: each source file, and the splits."""
    manifest = prepared.manifest
    rows = Table("", "documents", "words", "tokens", "tokens per word", caption=str(prepared.folder))
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, counts in [(file["name"], file) for file in manifest["files"]] + list(manifest["splits"].items()):
        documents, words, tokens = (counts[key] for key in ("documents", "words", "tokens"))
        rows.add_row(name, f"{documents:,}", f"{words:,}", f"{tokens:,}", f"{tokens / words:.2f}" if words else "–")
        if name == manifest["files"][-1]["name"]:
            rows.add_section()
    return rows


if __name__ == "__main__":
    with report_errors():
        config = load(PrepareConfig, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        prepared = prepare(config.data)
        Console().print(table(prepared))
        if (attribution := prepared.manifest["attribution"]) is not None:
            print(f"{attribution}. Licence: {prepared.manifest['licence'] or 'not stated'}.")

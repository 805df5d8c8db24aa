"""Prepares text: cleans it, trains a tokenizer and writes token files into a folder of their own.

A run prepares its data by itself; this recipe does it beforehand, and prints what each file and split holds.

    python recipes/prepare.py
    python recipes/prepare.py data.path=wikipedia-leads data.tokenizer.vocab_size=8000
    python recipes/prepare.py data.path=babylm_10M data.cleaner=baby-llama data.boundary=false
    python recipes/prepare.py --config recipes/babies/prepare.yaml data.path=my_texts

The settings are in recipes/prepare.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from engine.cli import load
from engine.config.settings import PrepareConfig
from engine.data.prepare import Prepared, prepare
from engine.system.errors import report_errors
from engine.system.formatting import align_columns


def describe(prepared: Prepared) -> str:
    """Returns a table of what each source file and each split of a prepared folder holds."""
    manifest = prepared.manifest
    rows = [("", "documents", "words", "tokens", "tokens per word")]
    for name, counts in [(file["name"], file) for file in manifest["files"]] + list(manifest["splits"].items()):
        documents, words, tokens = (counts[key] for key in ("documents", "words", "tokens"))
        rows.append((name, f"{documents:,}", f"{words:,}", f"{tokens:,}", f"{tokens / words:.2f}" if words else "–"))
    return "\n".join(align_columns(rows))


if __name__ == "__main__":
    with report_errors():
        config = load(PrepareConfig, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        prepared = prepare(config.data)
        print(f"{prepared.folder}\n{describe(prepared)}")
        if (attribution := prepared.manifest["attribution"]) is not None:
            print(f"{attribution}. Licence: {prepared.manifest['licence'] or 'not stated'}.")

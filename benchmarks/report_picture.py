"""A picture of a run's report.html, as a browser shows it; README.md shows the one in benchmarks/results.

    python benchmarks/report_picture.py runs/mutual
    python benchmarks/report_picture.py runs/mutual --height 2400 --to whole.png

Needs Chromium or Chrome on the PATH (Debian: apt install chromium).
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def picture(report: Path, to: Path, width: int, height: int) -> None:
    """Writes the top `width` × `height` pixels of the page to `to`, as PNG."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-background-networking",
                f"--user-data-dir={folder}/profile",
                f"--window-size={width},{height}",
                f"--screenshot={shot}",
                report.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        Image.open(shot).convert("RGB").save(to, optimize=True)  # A palette would merge two students' colours.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "report.png")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--height", type=int, default=1240)
    arguments = parser.parse_args()
    picture(arguments.run / "report.html", arguments.to, arguments.width, arguments.height)
    print(f"{arguments.to}: {arguments.to.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

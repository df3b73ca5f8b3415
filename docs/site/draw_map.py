"""Draw the map of docs/architecture.md again, as docs/images/map.svg.

    npm pack mermaid && tar -xzf mermaid-*.tgz package/dist/mermaid.min.js
    python docs/site/draw_map.py package/dist/mermaid.min.js

GitHub draws the page's Mermaid source itself. The site shows this drawing, so that no reader's browser loads Mermaid from
another host. The file holds the hash of its source; tests/test_site.py checks it. A Chromium must be installed.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGE = """<!doctype html><meta charset="utf-8"><body><pre class="mermaid">{source}</pre><script>{mermaid}</script><script>
mermaid.initialize({{startOnLoad: true, deterministicIds: true, theme: "neutral", fontFamily: "sans-serif", htmlLabels: false,
  themeVariables: {{fontSize: "24px"}}, flowchart: {{htmlLabels: false, useMaxWidth: false, nodeSpacing: 20, rankSpacing: 34,
    subGraphTitleMargin: {{top: 6, bottom: 16}}}}}});
</script>"""


def drawn(source: str, mermaid: str) -> str:
    """The SVG that Chromium makes of a Mermaid source."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("draw_map.py needs Chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(PAGE.format(source=source.replace("&", "&amp;").replace("<", "&lt;"), mermaid=mermaid), "utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += [
            "--disable-background-networking",
            f"--user-data-dir={folder}/profile",
            "--virtual-time-budget=20000",
        ]
        done = subprocess.run(
            [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True
        )
    found = re.search(r"<svg\b.*?</svg>", done.stdout, re.DOTALL)
    if found is None or "syntax error" in found[0].lower():
        raise SystemExit(f"nothing was drawn: {done.stdout[-2000:]}")
    return found[0].replace("<br>", "<br/>").replace("&nbsp;", "&#160;")


def main() -> None:
    """Write the drawing of the one Mermaid block of the page."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    (source,) = SOURCE.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    svg = drawn(source, Path(sys.argv[1]).read_text("utf-8"))
    mark = f"<!-- drawn by docs/site/draw_map.py from {hashlib.sha256(source.encode()).hexdigest()} -->\n"
    (ROOT / "docs" / "images" / "map.svg").write_text(mark + svg + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""report.html as a browser shows it: nothing fetched or refused, nothing too wide, wide or narrow, light or dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lillama_core.pipeline import Request, compress
from lillama_registry import registry
from lillama_testing.tiny import make_tiny_model

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, on Debian: apt install chromium")

LOOK = """<script>
addEventListener("load", () => {
  const root = document.documentElement, body = getComputedStyle(document.body);
  const boxes = (name) => [...document.querySelectorAll(name)].map((e) => e.getBoundingClientRect());
  const beside = boxes("section, .tile, h1, h2, p").filter((b) => b.right > root.clientWidth + 1).length;
  document.title = JSON.stringify({
    width: root.clientWidth, needed: root.scrollWidth, beside: beside, ink: body.color, page: body.backgroundColor,
    plots: boxes("svg").map((b) => Math.round(b.height)),
    headings: [...document.querySelectorAll("h2")].map((e) => e.innerText),
  });
});
</script>"""


@dataclass
class Shown:
    console: list[str]
    look: dict[str, Any]


def browse(page: Path, width: int, dark: bool, folder: Path) -> Shown:
    """Open ``page`` as it is for what the console says, and a copy that may run `LOOK` for where things are."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"),
        *("--enable-logging=stderr", f"--window-size={width},900", "--dump-dom"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)

    console = [line for line in run(page).stderr.splitlines() if "CONSOLE" in line]
    looked_at = folder / "looked-at.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    looked_at.write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", run(looked_at).stdout, re.DOTALL)
    assert title is not None
    return Shown(console, json.loads(title[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that measured all that it can show."""
    folder = tmp_path_factory.mktemp("report")
    (architecture,) = registry().architectures_for("llama")
    made = make_tiny_model(architecture, "llama", folder / "dense")
    recipe = made.recipe(rescaling_tokens=128, remove_channels=True)
    compress(Request(str(made.folder), folder / "small", recipe, evaluate=True), "quiet")
    return folder / "small" / "report.html"


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (500, True)])
def test_a_browser_shows_the_report(report: Path, width: int, dark: bool, tmp_path: Path) -> None:
    shown = browse(report, width, dark, tmp_path)
    assert shown.console == []
    # But for the scroll bar. Tables and plots that are wider scroll by themselves.
    assert width - 20 <= shown.look["needed"] == shown.look["width"] <= width
    assert shown.look["beside"] == 0
    for heading in ("Size", "Fidelity", "Evaluation", "Speed", "Answers", "Quality and size", "Where the time went"):
        assert heading in shown.look["headings"]
    assert len(shown.look["plots"]) >= 6
    assert min(shown.look["plots"]) > 40
    ink, page = (sum(map(int, re.findall(r"\d+", shown.look[name])[:3])) for name in ("ink", "page"))
    assert (ink > page) == dark


def test_what_a_page_must_not_do_is_seen(report: Path, tmp_path: Path) -> None:
    """So that the test above can fail: a script, and something wider than the page."""
    broken = tmp_path / "broken.html"
    text = report.read_text(encoding="utf-8")
    broken.write_text(text.replace("</main>", "<p style='width: 3000px'>wide</p><script>1</script></main>"), "utf-8")
    shown = browse(broken, 800, False, tmp_path)
    assert any("Content Security Policy" in line for line in shown.console)
    assert shown.look["needed"] > 800
    assert shown.look["beside"] > 0

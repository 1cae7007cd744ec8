"""The report in a real browser."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from loop.record.test_report import attacked  # noqa: F401
from loop.record.written import write as record

from functrain.loop.record.report import compare, write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium"),
]
# What asks about a page is a page around it, as the page itself runs nothing.
AROUND = """<!doctype html><iframe id="page" src="{page}" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement, seen = getComputedStyle(page.body);
  document.title = JSON.stringify({{
    width: root.scrollWidth, height: root.scrollHeight, ran: frame.contentWindow.ran ?? null,
    charts: [...page.querySelectorAll("figure svg[role]")].map(each => each.getBoundingClientRect().width),
    text: [...page.querySelectorAll("svg text")].map(each => each.getBoundingClientRect().height),
    paper: seen.backgroundColor, ink: seen.color,
    line: getComputedStyle(page.querySelector("figure svg[role] path[style*='--c1']")).stroke,
  }});
}};
</script>"""


ASKED = []


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Hands out files, and remembers which."""

    def log_message(self, *_):
        ASKED.append(self.path)


def browser(folder, *arguments):
    own = f"--user-data-dir={folder / 'profile'}"
    return [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", own, *arguments]


@pytest.fixture
def seen(tmp_path):
    """What a browser says of a page at a width."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def of(page, width, *options):
            shutil.copy(page, tmp_path / "page.html")
            (tmp_path / "around.html").write_text(AROUND.format(page="page.html", width=width))
            address = f"http://127.0.0.1:{server.server_port}/around.html"
            command = browser(tmp_path, "--virtual-time-budget=5000", "--dump-dom", *options, address)
            ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", ended.stdout)[1]))

        yield of
        server.shutdown()


def test_a_phone_shows_all_of_it_without_scrolling_aside_in_letters_that_can_be_read(seen, tmp_path):
    page = seen(write(record(tmp_path / "run")).html, 390)
    assert page["width"] == 390
    assert len(page["charts"]) == 5
    assert min(page["charts"]) > 340
    assert min(page["text"]) >= 9
    assert page["ran"] is None


def test_a_wide_window_shows_two_charts_in_a_row(seen, tmp_path):
    page = seen(write(record(tmp_path / "run")).html, 1280)
    assert page["width"] == 1280
    assert max(page["charts"]) < 560


def test_in_the_dark_paper_letters_and_curves_are_others(seen, tmp_path):
    run = write(record(tmp_path / "run")).html
    light, dark = seen(run, 800), seen(run, 800, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    assert light["ink"] != dark["ink"]
    assert light["line"] != dark["line"]


def test_nothing_is_loaded_and_no_attack_runs_even_where_the_browser_is_not_told_to_run_nothing(
    seen,
    attacked,  # noqa: F811
    tmp_path,
):
    written = write(attacked).html
    text = written.read_text()
    bare = re.sub(r"<meta http-equiv[^>]*>", "", text)
    assert bare != text
    written.write_text(bare)
    ASKED.clear()
    page = seen(written, 390)
    assert page["ran"] is None
    assert page["width"] == 390
    assert {*ASKED} <= {"/around.html", "/page.html", "/favicon.ico"}


def test_the_comparison_of_runs_fits_a_phone_too(seen, tmp_path):
    runs = [record(tmp_path / f"a-run-with-a-rather-long-name-{index}") for index in range(4)]
    written, _ = compare(runs, tmp_path / "out")
    assert seen(written.html, 390)["width"] == 390


def test_it_can_be_printed(tmp_path):
    pdf = tmp_path / "report.pdf"
    command = browser(tmp_path, f"--print-to-pdf={pdf}", write(record(tmp_path / "run")).html.as_uri())
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert pdf.read_bytes().startswith(b"%PDF")

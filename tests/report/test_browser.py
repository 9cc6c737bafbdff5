"""The report card in a real browser, where there is one: nothing breaks, nothing is wider than a phone, the buttons work."""

import json
import re
import shutil
import subprocess

import pytest

from luthier.report.card import card

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
PROBE = """<script>
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".wide,pre,svg") && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
  const cases = [...document.querySelectorAll(".case")], shown = () => cases.filter(c => !c.hidden).length;
  const all = shown();
  document.querySelector('.filters button[value="worse"]').click();
  document.body.dataset.found = JSON.stringify({page: document.documentElement.scrollWidth, inner: innerWidth, wide, cases: cases.length, all, worse: shown()});
</script>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_card_in_a_browser(run, tmp_path, width):
    html = card(run)
    file = tmp_path / "card.html"
    file.write_text(html.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", f"--window-size={width},1200", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not re.findall(r"CONSOLE.*", done.stderr), "the console stays empty"
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found["page"] <= found["inner"] and not found["wide"], "only boxes that scroll by themselves are wider than the screen"
    assert found["all"] == found["cases"] > 0 and found["worse"] == html.count('data-is="worse"') < found["cases"]

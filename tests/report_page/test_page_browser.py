"""The report in a real browser: opened from disk without a network, clicked, and looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headlab.report_page import build
from headlab.report_page.build import report
from tests.helpers import made_up
from tests.helpers.browser import Opened, browser

pytestmark = pytest.mark.slow

# the colours of a canvas: a picture of one colour shows nothing
COLOURS = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
# lines, points, bars and heat maps that take up room on the screen
MARKS = """plot => [...plot.querySelectorAll(".scatterlayer path, .barlayer path, .heatmaplayer image")].filter((mark) => {
  const box = mark.getBoundingClientRect();
  return box.width + box.height > 1;
}).length"""


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as found:
        yield found


def opened(running: Any, path: Path, **options: Any) -> Opened:
    found = Opened(running, path, **options)
    found.page.wait_for_selector("html[data-ready]")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    shapes = {"square": made_up.square(4, 5), "ragged": made_up.RAGGED, "sides": made_up.BOTH_SIDES}
    folder = tmp_path_factory.mktemp("pages")
    return {
        name: report(made_up.folder(folder / name, heads, tokens=9, name=f"{name} {made_up.EVIL}"))
        for name, heads in shapes.items()
    }


@pytest.fixture(params=["square", "ragged", "sides"])
def opened_page(request: pytest.FixtureRequest, running: Any, pages: dict[str, Path]) -> Iterator[Opened]:
    found = opened(running, pages[request.param])
    yield found
    asked, said, harm = found.asked, found.said, found.page.evaluate("window.harm")
    found.close()
    assert asked == []  # after whatever the test did
    assert said == []
    assert harm is None


def test_a_click_on_a_head_changes_the_panel(opened_page: Opened) -> None:
    page = opened_page.page
    buttons = page.locator("#grid button")
    before = page.locator("#panel h2").text_content()
    name = next(n for b in buttons.all() if (n := b.get_attribute("data-head")) != before)
    page.click(f'#grid button[data-head="{name}"]')
    assert page.locator("#panel h2").text_content() == name  # at once: nothing waits for what is unpacked
    assert page.locator('#grid button[aria-pressed="true"]').evaluate_all("all => all.map(b => b.dataset.head)") == [name]
    panel = page.locator("#panel").inner_text()
    for part in ("What removal costs", "Attention on the prompts", "Partners", "Its numbers"):
        assert part in panel
    page.wait_for_selector("#panel .pattern canvas[data-drawn]")
    assert page.locator("#panel .pattern canvas").evaluate(COLOURS) > 5


def test_heads_are_reached_by_keyboard_and_named(opened_page: Opened) -> None:
    page = opened_page.page
    stop = page.locator("#grid button[tabindex='0']")  # one of them is reached by Tab, the others by the arrow keys
    before = stop.get_attribute("data-head")
    stop.focus()
    page.keyboard.press("ArrowRight")
    name = page.evaluate("document.activeElement.dataset.head")
    assert name != before
    assert stop.get_attribute("data-head") == name
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"{name}: ")
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").text_content() == name


def test_colours_follow_the_chosen_number(opened_page: Opened) -> None:
    page = opened_page.page
    look = "all => all.map(b => b.style.background + b.getAttribute('aria-label')).join()"
    page.locator("#grid button").first.focus()
    looks = {}
    for option in page.locator("#colour option").all():
        page.select_option("#colour", option.get_attribute("value"))
        looks[option.text_content()] = page.locator("#grid button").evaluate_all(look)
        assert page.locator("#told").inner_text() == page.locator("#grid button").first.get_attribute("aria-label")
    assert {"scores-taylor", "scores-ablation"} < set(looks)
    assert len(set(looks.values())) == len(looks)


def test_pointing_at_a_pattern_tells_the_pair_and_its_weight(opened_page: Opened) -> None:
    page = opened_page.page
    prompt = page.locator(".prompts button").nth(1)
    prompt.click()
    canvas = page.locator("#panel .pattern canvas[data-drawn]")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    told = page.locator("#panel .pattern .told").text_content()
    assert "(0) \u2192" in told
    assert float(told.split(": ")[-1]) >= 0
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] - 3)
    assert page.locator("#panel .pattern .told").text_content() != told


def test_the_prompt_view_draws_every_head(opened_page: Opened) -> None:
    page = opened_page.page
    page.click("#tab-prompts")
    thumbs = page.locator("#thumbs .thumb")
    assert thumbs.count() == page.locator("#grid button").count()
    for thumb in thumbs.all():
        thumb.scroll_into_view_if_needed()
        canvas = thumb.locator("canvas[data-drawn]")
        canvas.wait_for()
        assert canvas.evaluate(COLOURS) > 5
    name = thumbs.last.get_attribute("data-head")
    thumbs.last.click()
    assert page.locator("#panel h2").text_content() == name


def test_every_figure_holds_drawn_marks(opened_page: Opened) -> None:
    page = opened_page.page
    page.click("#tab-figures")
    plots = page.locator("#view-figures .plot")
    assert plots.count() >= 5
    for number in range(plots.count()):
        plot = plots.nth(number)
        plot.scroll_into_view_if_needed()
        page.wait_for_selector(f"#drawn-{number} .plot[data-drawn]")
        assert plot.evaluate(MARKS) > 0, page.locator("#view-figures nav a").nth(number).text_content()
    svg = page.locator("#view-figures svg")
    assert svg.locator("a").count() == 0
    assert svg.locator("[style*='bold']").count() == 0
    written = " ".join(svg.locator("text").evaluate_all("all => all.map(one => one.textContent)"))
    for text in (made_up.EVIL_FILE, "<b>news</b>", made_up.EVIL):
        assert text in written


def test_figures_wait_until_they_are_looked_at(running: Any, pages: dict[str, Path]) -> None:
    found = opened(running, pages["square"])
    assert found.page.evaluate("typeof Plotly") == "undefined"
    found.page.click("#tab-figures")
    found.page.wait_for_selector(".plot[data-drawn]")
    assert found.page.locator(".plot[data-drawn]").count() < found.page.locator(".plot").count()
    found.close()


def test_hostile_text_is_shown_as_text(opened_page: Opened) -> None:
    page = opened_page.page
    assert page.locator("h1").text_content().endswith(made_up.EVIL)
    page.click("#tab-prompts")
    assert made_up.EVIL in page.locator("#prompt-text").text_content()
    page.click("#tab-made")
    assert "</script>" in page.locator("#view-made").inner_text()
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("width", [1280, 1920])
def test_nothing_overflows(running: Any, pages: dict[str, Path], width: int) -> None:
    for path in pages.values():
        found = opened(running, path, viewport={"width": width, "height": 900})
        for tab in ("heads", "prompts", "figures", "made"):
            found.page.click(f"#tab-{tab}")
            assert found.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (path, tab)
        found.close()


def test_half_the_results(running: Any, tmp_path: Path) -> None:
    made_up.timing(made_up.model()).save(tmp_path / "timing.json")
    (tmp_path / "scores-taylor.json").write_text("{")
    found = opened(running, report(tmp_path))
    assert "scores-taylor.json: it is not a headlab result" in found.page.locator("#notice").inner_text()
    assert found.page.locator("#view-figures").is_visible()
    found.page.click("#tab-heads")
    assert "No result in this folder speaks of single heads" in found.page.locator("#grid").inner_text()
    assert found.page.locator("#told").inner_text() == ""
    found.page.click("#tab-prompts")
    assert "There are no attention patterns" in found.page.locator("#thumbs").inner_text()
    found.page.click("#tab-made")
    assert "roles" in found.page.locator("#missing").inner_text()
    assert (found.asked, found.said) == ([], [])
    found.close()


def test_a_figure_that_cannot_be_drawn_says_so(running: Any, pages: dict[str, Path]) -> None:
    found = opened(running, pages["square"])
    found.page.evaluate(
        "loadPlotly().then((library) => { library.newPlot = () => Promise.reject(new Error('no such <b>')); })"
    )
    found.page.click("#tab-figures")
    found.page.wait_for_selector(".figure .failed")
    assert "could not be drawn (no such <b>)" in found.page.locator("#drawn-0").inner_text()
    assert (found.asked, found.said) == ([], [])
    found.close()


def test_an_old_browser_is_told_what_it_lacks(running: Any, pages: dict[str, Path]) -> None:
    found = Opened(running, pages["square"])
    found.page.add_init_script("delete window.DecompressionStream")
    found.page.reload()
    found.page.wait_for_selector("html[data-ready]")
    assert "This browser is too old" in found.page.locator("#notice").inner_text()
    found.page.wait_for_selector("#panel .failed")
    assert found.said == []
    found.close()


def test_a_long_prompt_says_how_coarse_it_is(running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_CELLS", 2 * 4 * 4)
    made_up.pattern(made_up.square(1, 2), made_up.model(), 11).save(tmp_path / "a.safetensors")
    found = opened(running, report(tmp_path))
    found.page.wait_for_selector("#panel .pattern canvas[data-drawn]")
    panel = found.page.locator("#panel .pattern")
    assert "every cell is the largest of 3 x 3 tokens" in panel.inner_text()
    assert "(9\u202610) \u2192" in panel.locator(".told").text_content()
    assert panel.locator(".tokens span").count() == 4
    found.page.click("#tab-prompts")
    assert "every cell is the largest of 3 x 3 tokens" in found.page.locator("#thumbs").inner_text()
    assert (found.asked, found.said) == ([], [])
    found.close()


def test_a_large_report_opens_and_answers(running: Any, tmp_path: Path) -> None:
    path = report(made_up.folder(tmp_path, made_up.square(30, 9), tokens=64, prompts=4, all_kinds=False))
    found = opened(running, path)
    for name in ("L29H8", "L0H0", "L15H4"):
        found.page.click(f'#grid button[data-head="{name}"]')
        assert found.page.locator("#panel h2").text_content() == name
    assert (found.asked, found.said) == ([], [])
    found.close()

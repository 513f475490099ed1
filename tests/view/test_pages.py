"""The pages of the view in a real browser: every page, keys, hostile text, live changes."""

import json
import re
from pathlib import Path

import pytest
from records import fake_runs
from records.fake_runs import write_run
from view.browser import Watched, browser, missing, serve, until

from flowgrain.view.catalog import Catalog
from flowgrain.view.export import export

pytestmark = pytest.mark.skipif(bool(missing()), reason=str(missing()))

HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
HOSTILE_NAME = "<img src=x onerror=window.hacked=1>"
WIDTHS = {"narrow": 360, "wide": 1440, "4k": 3840}
ROUTES = (
    *("runs", "curves?runs=alpha-0%2Calpha-1", "group/alpha-0/20/0", "tree/alpha-0/20/0"),
    *("compare", "arena", "config/alpha-0?diff=nft"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one run, a forward-process run, and a run with hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder / f"alpha-{seed}", seed=seed, steps=20, leaves=12, evaluations=3)
    write_run(folder / "nft", seed=2, method="diffusionnft", leaves=4, alarms=0)
    texts, fake_runs.TEXTS = fake_runs.TEXTS, (HOSTILE,)
    write_run(folder / HOSTILE_NAME, seed=3)
    fake_runs.TEXTS = texts
    return folder


@pytest.fixture(scope="module")
def address(folder: Path):
    with serve([folder]) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium, address):
    """A tab. At the end: no error in the console, no violation of the policy, no other host."""
    watched = Watched(chromium, address, viewport={"width": 1440, "height": 900})
    watched.tab.set_default_timeout(30_000)
    yield watched
    assert watched.tab.evaluate("window.hacked") is None
    assert watched.problems == []
    watched.tab.close()


def texts(tab, selector: str) -> list[str]:
    """The texts of all elements that match."""
    return tab.locator(selector).all_inner_texts()


def numbers(tab, selector: str) -> list[float]:
    """The numbers in the elements that match."""
    return [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts(tab, selector)]


def test_runs_are_searched_sorted_and_selected_with_keys(page) -> None:
    tab = page.open("runs")
    rows = tab.locator("tbody tr")
    assert rows.count() == 4
    tab.keyboard.press("/")
    tab.keyboard.type("alpha")
    until(tab, "document.querySelectorAll('tbody tr').length === 2")
    tab.get_by_role("button", name="Run", exact=True).click()
    tab.wait_for_selector("th[aria-sort=ascending]")
    assert texts(tab, ".run-name") == ["alpha-0", "alpha-1"]
    tab.get_by_role("button", name="Run", exact=True).click()
    tab.wait_for_selector("th[aria-sort=descending]")
    assert texts(tab, ".run-name") == ["alpha-1", "alpha-0"]
    rows.nth(0).focus()
    for key in ("Space", "ArrowDown", "Space", "o"):
        tab.keyboard.press(key)
    tab.wait_for_selector(".chart canvas")
    assert "alpha-0" in tab.url
    assert "alpha-1" in tab.url


@pytest.mark.slow
def test_a_value_of_a_chart_is_shown_and_opens_the_images(page) -> None:
    tab = page.open("curves?runs=alpha-0%2Cnft")
    plot = tab.locator(".chart", has_text="reward/towers").locator(".u-over")
    plot.hover()
    lines = tab.locator(".tooltip .value")
    lines.first.wait_for()
    assert sorted(re.sub(r"\s.*", "", line) for line in lines.all_inner_texts()) == [
        "alpha-0",
        "nft",
    ]
    plot.click()
    tab.wait_for_selector(".shot img")
    assert re.search(r"#/group/(alpha-0|nft)/\d+/0", tab.url)
    page.open("curves?runs=alpha-0")
    chart = tab.locator(".chart", has_text="eval/towers")
    chart.locator("canvas").wait_for()
    chart.locator(".plot").focus()
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):  # the last evaluation, the second
        tab.keyboard.press(key)
    tab.wait_for_selector(".compare")
    assert "b=run%3Aalpha-0%4010" in tab.url


@pytest.mark.slow
def test_seeds_are_one_line_with_a_band(page) -> None:
    tab = page.open("curves?runs=alpha-0%2Calpha-1")
    tab.wait_for_selector(".chart canvas")
    assert texts(tab, ".chip a") == ["alpha-0, 2 seeds"]
    tab.locator(".chart", has_text="reward/towers").locator(".u-over").hover()
    assert " to " in tab.locator(".tooltip .value").inner_text()
    tab.get_by_label("Combine seeds").uncheck()
    until(tab, "document.querySelectorAll('.chip').length === 2")
    tab.get_by_text("Seconds", exact=True).click()
    tab.get_by_label("Log scale").check()
    tab.get_by_label("Metrics").fill("grad_norm")
    until(tab, "document.querySelectorAll('.chart').length === 1")
    tab.locator(".u-over").hover()
    assert "seconds" in tab.locator(".tooltip").inner_text()
    assert "x=seconds&log=on&keys=grad_norm" in tab.url


@pytest.mark.slow
def test_alarms_are_on_runs_curves_and_configuration(page) -> None:
    tab = page.open("runs")
    assert tab.locator("tr", has_text="alpha-0").locator(".badge.alarm").inner_text() == "▲ 1"
    for route in ("curves?runs=alpha-0", "config/alpha-0"):
        page.open(route)
        tab.locator(".alarms summary").click()
        assert "edge_density fell at step 10" in tab.locator(".alarms ul").inner_text()
    page.open("curves?runs=alpha-0&keys=eval/monitor/edge_density")
    plot = tab.locator(".u-over")
    plot.wait_for()
    # A plot that is drawn again has no size for a moment.
    width = tab.wait_for_function("document.querySelector('.u-over')?.offsetWidth").json_value()
    plot.hover(position={"x": width / 2, "y": 20})  # the alarm is at half of the steps
    assert "edge_density, step 10" in tab.locator(".tooltip .alarm-text").inner_text()


@pytest.mark.slow
def test_images_of_a_group_are_sorted_and_filtered(page) -> None:
    tab = page.open("group/alpha-0/20/0")
    tab.wait_for_selector(".shot img")
    advantages = numbers(tab, ".shot .tone b")
    assert len(advantages) == 12
    assert advantages == sorted(advantages, reverse=True)
    tab.get_by_label("Sort by").select_option("towers")
    until(tab, "location.hash.includes('sort=towers')")
    towers = numbers(tab, ".shot .value:nth-child(2) b")
    assert towers == sorted(towers, reverse=True)
    tab.get_by_label("Show").select_option("lowest")
    until(tab, "document.querySelectorAll('.shot').length === 4")
    assert sorted(numbers(tab, ".shot .tone b")) == sorted(advantages)[:4]
    tab.get_by_label("Show").select_option("failed")
    until(tab, "document.querySelectorAll('.shot').length === 1")
    assert "failed" in tab.locator(".shot").inner_text()
    tab.get_by_label("Show").select_option("gamed")
    tab.get_by_label("Monitor", exact=True).wait_for()
    assert "edge_density is one below" in tab.locator(".main [role=status]").inner_text()
    tab.get_by_label("Prompts").select_option("zero")
    tab.get_by_text("No prompt of this step").wait_for()
    tab.get_by_label("Prompts").select_option("failed")
    # all recorded prompts, and the one with a failure
    until(tab, "document.querySelectorAll('.prompt').length === 2")


def test_a_group_is_walked_through_with_keys(page) -> None:
    tab = page.open("group/alpha-0/20/0")
    tab.wait_for_selector(".shot img")
    tab.locator(".shot button").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        tab.keyboard.press(key)
    dialog = tab.locator("dialog[open]")
    assert "2 of 12" in dialog.inner_text()
    tab.keyboard.press("ArrowRight")
    until(tab, "document.querySelector('dialog').innerText.includes('3 of 12')")
    dialog.locator("img.pixels").wait_for()
    tab.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    tab.keyboard.press("[")
    until(tab, "location.hash.startsWith('#/group/alpha-0/14/0')")
    tab.locator("#step-slider").focus()
    tab.keyboard.press("ArrowRight")
    until(tab, "location.hash.startsWith('#/group/alpha-0/20/0')")


def test_a_tree_is_walked_through_and_folded(page) -> None:
    tab = page.open("tree/alpha-0/20/0")
    tab.wait_for_selector(".leaf image")
    assert tab.locator(".leaf").count() == 12
    assert tab.locator("g .edge.stochastic.credited").count() == 12
    assert tab.locator("g .edge.ode").count() == 12  # chains are joined
    tab.get_by_label("Join chains").uncheck()
    until(tab, "document.querySelectorAll('g .edge.ode').length === 12 * 7")
    tab.get_by_label("Join chains").check()
    until(tab, "document.querySelectorAll('g .edge.ode').length === 12")
    tab.locator(".canvas").focus()
    tab.keyboard.press("ArrowRight")
    tab.get_by_role("heading", name="Initial noise").wait_for()
    tab.keyboard.press("Space")
    until(tab, "document.querySelectorAll('.leaf').length === 6")
    tab.keyboard.press("Space")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        tab.keyboard.press(key)
    tab.get_by_role("heading", name="ODE step 7 → 8").wait_for()
    tab.keyboard.press("Enter")
    tab.locator("dialog[open] img").wait_for()
    tab.keyboard.press("Escape")
    before = tab.locator(".canvas g").first.get_attribute("transform")
    tab.keyboard.press("+")
    until(
        tab,
        "before => document.querySelector('.canvas g').getAttribute('transform') !== before",
        arg=before,
    )


@pytest.mark.slow
def test_forward_process_trees_have_credited_images(page) -> None:
    tab = page.open("tree/nft/20/0")
    tab.wait_for_selector(".leaf image")
    assert "4 credited images" in tab.locator(".details").inner_text()
    assert tab.locator("g .edge.ode.credited").count() == 4
    tab.locator(".leaf").first.click()
    assert "advantage" in tab.locator(".details .facts").inner_text()


def test_two_checkpoints_are_compared(page) -> None:
    tab = page.open("compare?a=run:alpha-0@0&b=run:alpha-0@20")
    until(tab, "[...document.images].every(image => image.complete)")
    assert "step 20" in tab.locator(".panes").inner_text()
    tab.keyboard.press("+")
    until(
        tab,
        "[...document.querySelectorAll('.layer')].map(e => e.style.transform.slice(0, 10)).join()"
        " === 'scale(1.5),scale(1.5)'",
    )
    tab.keyboard.press("2")
    tab.get_by_label("Position").fill("30")
    until(tab, "document.querySelector('.over').style.clipPath.endsWith('30%)')")
    tab.locator("h1").click()  # keys in a form field stay there
    tab.keyboard.press("3")
    until(tab, "document.querySelector('.over').style.opacity === '0.5'")
    tab.keyboard.press("4")
    until(tab, "/Mean difference \\d/.test(document.querySelector('.panes').innerText)")
    mean = float(re.search(r"difference ([\d.]+)", tab.locator(".panes").inner_text())[1])
    assert mean > 0
    tab.keyboard.press("]")
    until(tab, "location.hash.includes('image=1')")
    tab.keyboard.press("x")
    until(tab, "location.hash.includes('a=run%3Aalpha-0%4020')")
    # the same prompt and noise in all checkpoints of all runs with these prompts
    tab.get_by_role("button", name="nft · step 20").last.click()
    until(tab, "location.hash.includes('b=run%3Anft%4020')")


@pytest.mark.slow
def test_votes_are_stored_and_counted(page, folder: Path) -> None:
    tab = page.open("arena?a=run:alpha-1@0&b=run:alpha-1@20")
    sides = []
    for number, key in enumerate(("ArrowLeft", "ArrowRight", " ", "ArrowDown"), 1):
        tab.wait_for_selector(f"text=Image {number} of 8")
        left = tab.locator(".choice-image img").first.get_attribute("src")
        sides.append("a" if "alpha-1%400/" in left else "b")
        tab.keyboard.press(key)
    tab.wait_for_selector("text=Image 5 of 8")
    lines = (folder / "alpha-1" / "arena" / "votes.jsonl").read_text().splitlines()
    votes = [json.loads(line) for line in lines]
    assert [vote["left"] for vote in votes] == sides
    other = {"a": "b", "b": "a"}
    assert [vote["vote"] for vote in votes] == [sides[0], other[sides[1]], "tie", "tie"]
    tab.get_by_role("button", name="Show the result").click()
    tab.wait_for_selector(".interval .range")
    assert "95% confidence interval" in tab.locator(".result").inner_text()
    tab.reload()
    tab.wait_for_selector("text=Image 5 of 8")  # judged images are not asked again
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Export the votes").click()
    assert download.value.suggested_filename.endswith(".zip")


def test_settings_differences_and_cost(page) -> None:
    tab = page.open("config/alpha-0?diff=nft")
    tab.wait_for_selector(".differences td")
    assert "method.name" in texts(tab, ".differences code")
    lines = texts(tab, ".yaml span")
    assert "name: alpha-0" in lines
    assert "- name: towers" in lines
    assert "sample" in texts(tab, ".stages dt")
    assert "forward passes of sampling" in tab.locator(".config-side").inner_text()


def test_hostile_names_and_prompts_are_text(page) -> None:
    name = "".join(f"%{byte:02X}" for byte in HOSTILE_NAME.encode())
    for route, shown in {
        "runs": HOSTILE_NAME,
        f"curves?runs={name.replace('%', '%25')}": HOSTILE_NAME,
        f"group/{name}/20/0": HOSTILE,
        f"tree/{name}/20/0": HOSTILE,
        f"compare?a=run:{name}@0&b=run:{name}@20": HOSTILE,
        f"arena?a=run:{name}@0&b=run:{name}@20": HOSTILE,
        f"config/{name}": HOSTILE_NAME,
    }.items():
        tab = page.open(route)
        until(tab, "text => document.body.textContent.includes(text)", arg=shown)
        assert tab.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_page_fits_and_its_controls_have_names(page, width: int) -> None:
    page.tab.set_viewport_size({"width": width, "height": 900})
    for route in ROUTES:
        tab = page.open(route)
        until(tab, "!document.querySelector('main [role=status]')?.innerText.startsWith('Loading')")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, route
        unnamed = tab.locator("button, select, input").evaluate_all(
            "all => all.filter(e => !(e.innerText || e.labels?.length || e.ariaLabel || e.title))"
            ".map(e => e.outerHTML)"
        )
        assert unnamed == [], route


@pytest.mark.slow
def test_focus_is_visible_and_the_colors_can_be_chosen(page) -> None:
    tab = page.open("runs")
    tab.keyboard.press("Tab")
    assert tab.locator(":focus").inner_text() == "Skip to the content"
    for _ in range(2):
        tab.keyboard.press("Tab")
        width = tab.locator(":focus").evaluate("e => getComputedStyle(e).outlineWidth")
        assert width == "2px"
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(background)
    tab.get_by_text("Dark", exact=True).click()
    dark = tab.evaluate(background)
    assert dark != light
    tab.reload()
    tab.wait_for_selector("tbody tr")
    assert tab.evaluate(background) == dark


@pytest.mark.slow
def test_a_running_run_updates_the_pages_without_layout_shift(page, folder: Path) -> None:
    tab = page.open("runs")
    row = tab.locator("tr", has_text="nft")
    assert row.locator(".col-step").inner_text().startswith("20")
    tab.evaluate(
        "new PerformanceObserver(list => { for (const entry of list.getEntries())"
        " window.shift = (window.shift ?? 0) + entry.value; }).observe({type: 'layout-shift'})"
    )
    with (folder / "nft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "reward/towers": 0.5, "seconds": 1.0}) + "\n")
    until(tab, "document.querySelector('tr[data-run=nft] .col-step').innerText.startsWith('21')")
    page.tab.evaluate("location.hash = '#/curves?runs=nft'")
    tab.wait_for_selector(".chart canvas")
    tab.wait_for_timeout(300)
    tab.evaluate("window.shift = 0")
    label = "document.querySelector('[aria-label^=\"reward/towers\"]').ariaLabel"
    before = tab.evaluate(label)
    with (folder / "nft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 22, "reward/towers": 0.25, "seconds": 1.0}) + "\n")
    until(tab, f"{label} !== {json.dumps(before)}")
    assert tab.evaluate("window.shift") == 0


@pytest.mark.slow
def test_only_images_on_the_screen_are_drawn(chromium, tmp_path: Path) -> None:
    write_run(
        tmp_path / "large", steps=1, group_steps=1, prompts=1, leaves=1500, evaluations=1, alarms=0
    )
    with serve([tmp_path]) as address:
        tab = Watched(chromium, address).open("group/large/1/0")
        tab.wait_for_selector(".shot img")
        assert tab.locator(".shot").count() < 100
        tab.evaluate("scrollTo(0, document.body.scrollHeight)")
        tab.wait_for_selector("[data-index='1499'] img")
        assert tab.locator(".shot").count() < 100
        tab.close()


@pytest.mark.slow
def test_an_export_shows_the_same_pages_from_the_disk(chromium, folder: Path, tmp_path) -> None:
    file = tmp_path / "view.html"
    export(Catalog([folder / "alpha-0", folder / "nft"]), file)
    page = Watched(chromium, file.as_uri())
    for route, content in {
        "runs": "tbody tr",
        "curves?runs=alpha-0": ".chart canvas",
        "group/alpha-0/20/0": ".shot img.pixels",
        "tree/alpha-0/20/0": ".leaf image",
        "compare?a=run:alpha-0@0&b=run:nft@20&mode=difference": "canvas.pixels",
        "config/nft": ".yaml span",
    }.items():
        page.open(route).wait_for_selector(content)
    page.tab.goto(f"{file.as_uri()}#/arena")
    page.tab.get_by_text("An exported file stores no votes").wait_for()
    assert page.problems == []
    page.tab.close()
